"""The moments at which tests kill a run of the fixture `make_runs`, by what they call them."""

from __future__ import annotations

from typing import Any

MOMENTS: dict[str, dict[str, Any]] = {
    "a rank, in a step": {
        "target": "revpatch.step.engine:AccelerateEngine.train_step",
        "call": 8,
        "when": "before",
    },
    "all ranks, in a step": {
        "target": "revpatch.step.engine:AccelerateEngine.train_step",
        "call": 17,
        "when": "after",
        "rank": "all",
    },
    "before the first snapshot": {"target": "revpatch.train.trainer:Trainer._log", "call": 1, "when": "before"},
    "a snapshot, half": {"target": "revpatch.train.snapshot:write_atomically", "call": 2, "when": "half"},
    "a snapshot, before older ones go": {
        "target": "revpatch.train.snapshot:write_atomically",
        "call": 3,
        "when": "after",
    },
    "a ledger's entry, half": {"target": "revpatch.ledger.patch_file:write_atomically", "call": 4, "when": "half"},
    "an entry without its line": {"target": "revpatch.ledger.ledger:write_entry", "call": 4, "when": "after"},
    "a journal's line, half": {"target": "revpatch.ledger.journal:Journal._write", "call": 14, "when": "half"},
    "a probe": {"target": "revpatch.train.state:Watch.measure", "call": 5, "when": "before"},
    "a rollback, before the state": {"target": "revpatch.train.trainer:restore_state", "call": 2, "when": "before"},
    "a rollback, before its event": {"target": "revpatch.train.trainer:restore_state", "call": 2, "when": "after"},
    "a commit, before its entry": {"target": "revpatch.train.trainer:Trainer._commit", "call": 1, "when": "before"},
    "a commit, before the replay": {"target": "revpatch.train.trainer:write_replay", "call": 1, "when": "before"},
    "a commit, before its event": {"target": "revpatch.train.trainer:write_replay", "call": 1, "when": "after"},
    "a commit, before its snapshot": {
        "target": "revpatch.train.trainer:Trainer.take_snapshot",
        "call": 3,
        "when": "before",
    },
    "before its end is put down": {"target": "revpatch.monitoring.record:Record.end", "call": 1, "when": "before"},
    "between phases": {"target": "revpatch.train.trainer:Trainer._begin", "call": 2, "when": "before"},
}
QUICK = ("a rank, in a step", "a snapshot, half", "an entry without its line", "a rollback, before its event")
