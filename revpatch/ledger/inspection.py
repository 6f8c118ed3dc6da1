"""One patch looked at, and two held against each other: what `ledger show` and `ledger diff` tell, without a base."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from revpatch.ledger.events import EntryWritten
from revpatch.ledger.history import PatchFile
from revpatch.ledger.layers import LayerDifference, LayerFacts, check_comparable, check_patch, differences, layers_of
from revpatch.ledger.plain import to_plain
from revpatch.ledger.references import read_patch


@dataclass(frozen=True)
class PatchFacts:
    """A patch file: where it is, what it and the journal say of it, and its layers.

    `recorded` is None for a file that no journal lies beside.
    `parent` is the name of the entry it descends from, or the sha256 of one that is not kept.
    """

    name: str
    path: str
    metadata: dict[str, Any]
    recorded: EntryWritten | None
    parent: str | None
    layers: list[LayerFacts]

    def as_fields(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        plain: dict[str, Any] = to_plain(asdict(self))
        return plain


@dataclass(frozen=True)
class PatchDifference:
    """Two patches of one base. `probes` has, by set, the losses and gates that the journal recorded with each, where
    it recorded them: [of the first, of the second]."""

    names: tuple[str, str]
    layers: list[LayerDifference]
    probes: dict[str, dict[str, list[float | None]]]

    def as_fields(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        plain: dict[str, Any] = to_plain(asdict(self))
        return plain


def inspect(reference: str) -> PatchFacts:
    """What a patch is, its file checked against the journal first.

    Raises:
        FileNotFoundError, EntryError, JournalError: as `read_patch` does; or it is no patch.
    """
    patch = read_patch(reference)
    check_patch(patch.path.name, patch.metadata)
    return PatchFacts(
        patch.path.name,
        str(patch.path),
        patch.metadata,
        patch.event,
        _parent(patch),
        layers_of(patch.tensors),
    )


def compare(first: str, second: str) -> PatchDifference:
    """How two patches differ, layer by layer.

    Raises:
        FileNotFoundError, EntryError, JournalError: as `inspect`; or they are of two bases or shapes.
    """
    a, b = read_patch(first), read_patch(second)
    check_comparable((first, second), (a.metadata, b.metadata), (a.tensors, b.tensors))
    return PatchDifference((first, second), differences(a.tensors, b.tensors), _probes(a, b))


def _parent(patch: PatchFile) -> str | None:
    sha256 = patch.metadata.get("parent")
    if sha256 is None or patch.ledger is None:
        return sha256
    # Entries with the same content have the same sha256: the latest before this one is the parent.
    before = patch.event.seq if patch.event is not None else 0
    named = [entry.name for entry in patch.ledger.entries() if entry.sha256 == sha256 and entry.seq < before]
    return named[-1] if named else str(sha256)


def _probes(*patches: PatchFile) -> dict[str, dict[str, list[float | None]]]:
    sets = [(None if each.event is None else each.event.sets) or {} for each in patches]
    return {
        name: {
            "loss": [found[name].loss if name in found else None for found in sets],
            "gate": [found[name].gate if name in found else None for found in sets],
        }
        for name in {**sets[0], **sets[1]}
    }
