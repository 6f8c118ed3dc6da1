"""Events as a run writes them, for journals that are made up: complete, each field with a plain value."""

from __future__ import annotations

import json
from typing import Any

from revpatch.ledger.events import Event, ProbeReading
from revpatch.ledger.journal import Journal

BASE = {"model": "a/base", "family": "gpt2", "revision": None, "sha256": "b" * 64, "dtype": "float32"}
PLACE = {"model": "a/base", "folder": None}
_WHERE = {"host": "here", "device": "cpu", "threads": 1, "torch": "2.9", "alignment": "0" * 16}
BARE_BASE = {"dtype": "float32", "weights": "c" * 64, "logits": "d" * 64, "where": _WHERE}
RESUME = {"snapshot": None, "changed": {}, "orphans": [], "facts": {"ranks": 1}, "base_at": PLACE}


def reading(loss: float = 3.42, reference: float = 3.40, **changes: Any) -> ProbeReading:
    """Of a guarded set; `changes` are fields of it."""
    known = {"loss": loss, "reference": reference, "rise": loss - reference, "drift": loss - reference}
    known |= {"tolerance": 0.03, "guarded": True, "before": reference, "base": reference, "gate": 0.5}
    return ProbeReading.model_validate({**known, "patch_norm": 1.0, **changes})


_PLACE_IN_PHASE = {"phase": "wiki", "step": 0}
KNOWN: dict[str, dict[str, Any]] = {
    "run": {"base": BASE, "bare_base": BARE_BASE, "base_at": PLACE, "seed": 0, "facts": {"ranks": 1}},
    "phase_start": {"phase": "wiki", "phase_index": 0, "steps": 100},
    "probe": {**_PLACE_IN_PHASE, "sets": {"base": reading()}, "training": {"lm": 3.0}},
    "samples": {"phase": "base", "global_step": 0, "texts": [{"prompt": "the", "text": " cat"}]},
    "entry": {
        "kind": "commit",
        "phase": "wiki",
        "phase_index": 0,
        "step": 0,
        "file": "000_wiki_commit.safetensors",
        "sha256": "0" * 64,
        "bytes": 1,
    },
    "rollback": {
        **_PLACE_IN_PHASE,
        "to_file": "000_wiki_start.safetensors",
        "reason": "base rose",
        "window": [1, 2],
        "new_lr_factor": 0.5,
        "restored": {},
    },
    "commit": {
        **_PLACE_IN_PHASE,
        "file": "000_wiki_commit.safetensors",
        "rollbacks": 0,
        "inverse_error": None,
        "sets": {},
    },
    "quarantine": {
        **_PLACE_IN_PHASE,
        "digest": "e" * 64,
        "shard": 1,
        "since": 5,
        "location": "data/x.tar",
        "reason": "it is cut short",
    },
    "interrupted": _PLACE_IN_PHASE,
    "resume": {"undoes_from": 0, "superseded": [], **RESUME},
    "orphan": {"file": "a.safetensors", "moved_to": "a.safetensors.orphan", "sha256": "f" * 64, "bytes": 1},
    "pruned": {"files": [], "bytes": 0},
    "torn": {"file": "journal.jsonl.torn-1", "bytes": 1},
    "run_end": {"bare_base": BARE_BASE},
}


def add(journal: Journal, kind: str, /, **changes: Any) -> Event:
    """Append an event of the kind, complete, with these fields changed."""
    return journal.append(kind, **{**KNOWN[kind], **changes})


def add_line(journal: Journal, event: str, /, **fields: Any) -> None:
    """Append a line that `Journal.append` may refuse, in the chain, as another version might write it."""
    time = "2025-01-31T12:00:00.000000+00:00"
    record = {"seq": len(journal.records()), "time": time, "event": event, **fields, "previous": journal.head}
    journal._write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
    journal.__init__(journal.path)  # type: ignore[misc]
