"""Patches made by arithmetic, reverted or merged, measured by probes before they may stand as a commit.

Arithmetic is done parameter by parameter in float64 and rounded once, in the order of the names. A patch is a nonlinear
function of its parameters, so a difference or a mean of parameters is not one of functions: what it does has to be
measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revpatch.config import ProbeSetConfig, RollbackConfig, StreamConfig
from revpatch.config.file import load_config
from revpatch.evaluation.guard import Keep, ProbeSet, compare_all, decide
from revpatch.evaluation.losses import HeldOut, Subject, check_one_kind, of_base, sets_of
from revpatch.evaluation.probe import reading_of
from revpatch.ledger.events import EntryWritten, Readings, RunBegun, RunResumed
from revpatch.ledger.journal import Journal
from revpatch.ledger.ledger import JOURNAL_NAME, LOCK_NAME, Ledger, PatchFile, folder_noted, read_patch
from revpatch.patch.patched_model import Patch
from revpatch.train.resume import CONFIG_NAME, claim
from revpatch.train.startup import FIRST_REPLAY

Tensors = dict[str, Tensor]

_LAST = (".up.weight", ".up.bias")
"""Ends of the names of F's and G's last projections: at zero, a sidecar is the identity, to the bit."""


def taken_out(newest: Tensors, after: Tensors, before: Tensors) -> Tensors:
    """newest − (after − before). If `newest` is `after`, this is `before` to the bit."""
    return {
        name: ((tensor.double() - after[name].double()) + before[name].double()).to(tensor.dtype)
        for name, tensor in newest.items()
    }


def weighted(patches: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """Σ weight·patch: a mean if the weights sum to 1, a sum if each is 1. The base's channels are the first patch's."""
    assert len(patches) == len(weights) > 0
    found = {}
    for name, tensor in patches[0].items():
        if name.endswith(".channels"):
            found[name] = tensor.clone()
            continue
        total = sum(weight * patch[name].double() for patch, weight in zip(patches, weights, strict=True) if weight)
        found[name] = torch.as_tensor(total).to(tensor.dtype).expand_as(tensor).contiguous()
    return found


def bypassed(patch: Tensors, layers: Iterable[int]) -> Tensors:
    """Return the patch with the sidecars after these blocks made the identity; shapes stay, and they can learn again.

    Raises:
        ValueError: there is no sidecar after one of the blocks.
    """
    wanted = set(layers)
    there = layers_with_sidecars(patch)
    if missing := sorted(wanted - set(there)):
        raise ValueError(f"there is no sidecar after block {missing[0]}: the patch has sidecars after blocks {there}")
    return {
        name: torch.zeros_like(tensor) if _layer(name) in wanted and name.endswith(_LAST) else tensor.clone()
        for name, tensor in patch.items()
    }


def layers_with_sidecars(patch: Tensors) -> list[int]:
    """Return the blocks that have a sidecar, in order."""
    return sorted({_layer(name) for name in patch})


def check_finite(patch: Tensors, what: str) -> None:
    """Raises ValueError, naming the tensor, if a value is infinite or not a number."""
    for name, tensor in patch.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what}: {name} holds values that are not finite, so it can't be used")


def _layer(name: str) -> int:
    return int(name.partition(".")[0])


@dataclass(frozen=True)
class Probes:
    """What is probed, and by which rules."""

    sets: list[ProbeSetConfig]
    rollback: RollbackConfig = field(default_factory=RollbackConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)

    @classmethod
    def of(cls, run: Path | None, shards: list[str], blocks: int | None = None) -> Probes:
        """Return those that `shards` names; else the probe sets of the run's config, and what its base had written to
        be held out. The rules are the run's in either case, or the defaults where it has no config.

        Raises:
            ValueError: neither names a set.
        """
        file = None if run is None else run / CONFIG_NAME
        config = load_config(file) if file is not None and file.is_file() else None
        if run is not None and config is not None and config.replays_own_text and not shards:
            config = config.with_own_text(_own_text_of(run))
        if shards:
            sets = sets_of(shards, blocks)
        elif config is None or not config.probes.sets:
            where = "no run was named" if file is None else f"{file} has no probes.sets" if config else f"no {file}"
            raise ValueError(
                f"there is nothing to hold the new patch against ({where}): name held-out shards with --shards"
            )
        else:
            sets = [s.model_copy(update={"max_blocks": blocks}) if blocks else s for s in config.probes.sets]
        return cls(sets) if config is None else cls(sets, config.rollback, config.stream)

    def guarded(self, taught: set[str], given_up: str | None = None) -> set[str]:
        """Return names of the sets that may not get worse: not those of corpora that no phase in `taught` has taught,
        nor those of the phase that is `given_up`."""
        known = taught - {given_up}
        return {s.name for s in self.sets if s.guard_after is None or s.guard_after in known}


@dataclass(frozen=True)
class Judgement:
    """The verdict. `sets` is what the journal keeps: of every set the loss before (`reference`) and after (`loss`),
    in nats per token, and of the guarded ones the guard's comparison."""

    agrees: bool
    reason: str
    sets: Readings


def judge(probes: Probes, subject: Subject, before: list[Patch], after: Patch, guarded: set[str]) -> Judgement:
    """Measures the sets before and after, and asks the guard.

    Args:
        probes: the sets and the rules.
        subject: the base.
        before: what the new patch is held against: in each set, the one of these with the highest loss.
        after: the new patch.
        guarded: names of the sets that the guard looks at.

    Raises:
        ValueError, OSError: as `HeldOut`; a guarded set has 1 block, or a loss before that is not finite.
    """
    held_out = HeldOut(subject, probes.sets, stream=probes.stream)
    earlier = [held_out.measure(patch) for patch in before]
    reference = {s.name: max((of[s.name] for of in earlier), key=lambda m: m.loss) for s in probes.sets}
    now = held_out.measure(after)
    watched = [ProbeSet(s.name, s.tolerance) for s in probes.sets if s.name in guarded]
    then, losses = ({name: m.losses for name, m in of.items()} for of in (reference, now))
    comparisons = compare_all(watched, losses, then, then, probes.rollback.max_drift, probes.rollback.confidence)
    verdict = decide(comparisons, rollbacks_so_far=0, max_rollbacks=1)
    compared = {comparison.name: comparison for comparison in comparisons}
    sets = {
        s.name: reading_of(
            now[s.name], reference[s.name].loss, reference[s.name].loss, s.tolerance, compared.get(s.name)
        )
        for s in probes.sets
    }
    if isinstance(verdict, Keep):
        above = [c for c in comparisons if not c.within]
        reason = "; ".join(f"{c.name} rose by {c.drift:.4f}, above its tolerance of {c.tolerance:g}" for c in above)
        return Judgement(verdict.good, reason, sets)
    return Judgement(False, verdict.reason.replace(" since the last good entry", ""), sets)


def _own_text_of(run: Path) -> str:
    """Return where the run's base had written its own text, when it last trained."""
    events = Journal(run / "ledger" / JOURNAL_NAME, readonly=True).events(RunBegun, RunResumed)
    noted = [e.facts[FIRST_REPLAY] for e in events if isinstance(e, RunBegun | RunResumed) and FIRST_REPLAY in e.facts]
    if not noted:
        raise ValueError(f"{run}: its journal doesn't say where its base's own text lies: name shards with --shards")
    return str(noted[-1])


_KEPT = ("base", "tokenizer", "sidecar", "seed")
"""What a made patch says of itself as the one it was made of did."""


@dataclass(frozen=True)
class DerivedCommit:
    """What came of an operation. `name` and `sha256` are None if nothing was written, and `reason` says why."""

    run: str
    made_by: dict[str, Any]
    agrees: bool
    reason: str
    sets: Readings = field(default_factory=dict)
    name: str | None = None
    sha256: str | None = None

    def as_fields(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@contextmanager
def claimed(run: Path, create: bool = False) -> Iterator[Ledger]:
    """The run's ledger, opened for writing while no other process may write to the run.

    Args:
        run: its folder.
        create: a folder that is not there becomes one with a ledger alone.

    Raises:
        FileExistsError, FileNotFoundError: the folder is no run, and none can be made of it.
        ConfigError: another process writes there. JournalError: its journal is damaged.
    """
    if not (run / "ledger" / JOURNAL_NAME).is_file():
        if not create:
            raise FileNotFoundError(f"{run}: expected the folder of a run, found none with ledger/{JOURNAL_NAME} in it")
        if run.exists() and (not run.is_dir() or {path.name for path in run.iterdir()} - {LOCK_NAME, "ledger"}):
            raise FileExistsError(
                f"{run}: it exists and is no run. Nothing was overwritten: name a run, or a folder that is not there"
            )
        run.mkdir(parents=True, exist_ok=True)  # a command that was killed may have left it, without a journal
    lock = claim(run, str(run))
    try:
        ledger = Ledger(run / "ledger")
        ledger.set_aside_orphans()  # a command that was killed between file and journal left one of this very name
        yield ledger
    finally:
        lock.close()


def write(
    ledger: Ledger,
    name: str,
    tensors: Tensors,
    of: PatchFile,
    made_by: dict[str, Any],
    judgement: Judgement | None,
    force: bool = False,
) -> DerivedCommit:
    """Records the patch as the newest commit, if the judgement agrees or `force` is given.

    Args:
        ledger: open for writing.
        name: what stands in the place of a phase's name, as in `002_NAME_commit.safetensors`.
        tensors: the new patch, all of it finite (see `check_finite`).
        of: the entry that it descends from, and whose base, tokenizer and sidecar it has.
        made_by: the operation and the sha256 of all that went into it.
        judgement: the verdict; None if nothing was probed.
        force: write against the verdict; the entry then says so.

    Raises:
        ValueError: the name can't be part of a file's.
    """
    run = ledger.directory.parent
    agrees, reason, sets = (True, "", {}) if judgement is None else (judgement.agrees, judgement.reason, judgement.sets)
    if not agrees and not force:
        return DerivedCommit(str(run), made_by, agrees, reason, sets)
    if not agrees:
        made_by = {**made_by, "forced": reason}
    # Above that of every entry there ever was, and of every phase that the run's config has.
    file = run / CONFIG_NAME
    phases = len(load_config(file).phases) if file.is_file() else 0
    index = max([phases, *(entry.phase_index + 1 for entry in ledger.journal.events(EntryWritten))])
    kept: dict[str, Any] = {key: of.metadata[key] for key in _KEPT if key in of.metadata}
    metadata: dict[str, Any] = {
        "kind": "commit",
        "phase": name,
        "phase_index": index,
        "step": 0,
        "parent": of.sha256,
        **kept,
        "probes": {key: reading.loss for key, reading in sets.items()},
        "made_by": made_by,
    }
    known: dict[str, Any] = {"sets": sets, "made_by": made_by}
    model = of.base["model"]
    if model is not None and (place := folder_noted(of, model)) is not None:  # a new folder's journal says it too
        known["base_at"] = place
    path, sha256 = ledger.record("commit", index, name, 0, tensors, metadata, **known)
    return DerivedCommit(str(run), made_by, agrees, reason, sets, path.name, sha256)


def revert(
    run: Path,
    phase: str,
    layers: list[int] | None = None,
    shards: list[str] | None = None,
    base: str | None = None,
    blocks: int | None = None,
    force: bool = False,
) -> DerivedCommit:
    """Makes newest − (the phase's commit − the state before it), or the newest patch with some sidecars bypassed.

    Probes it against the newest patch, on the run's probe sets or on `shards`, and writes it as a new commit if the
    guard agrees or with `force`. A set that was guarded only because this phase had taught its corpus is measured and
    not guarded: that corpus is what is given up.

    Args:
        run: the run's folder.
        phase: the name of a phase that was committed.
        layers: bypass the sidecars after these blocks, whichever phase taught them, instead of subtracting.
        shards, base, blocks: as in `probe`; shards named here are all guarded.
        force: write against the guard's verdict, or what was taken out already.

    Raises:
        ValueError, OSError: no such phase, or it was taken out already; what `Probes.of` and `HeldOut` raise.
    """
    probes = Probes.of(run, shards or [], blocks)
    with claimed(run) as ledger:
        commits = [entry for entry in ledger.entries() if entry.kind == "commit"]
        if phase not in {entry.phase for entry in commits}:
            committed = ", ".join(entry.phase for entry in commits) or "none"
            raise ValueError(f"{run} has no commit of a phase {phase!r}; committed are {committed}")
        newest = of_base(ledger.read(commits[-1].name))
        made_by: dict[str, Any] = {"operation": "revert", "phase": phase, "newest": newest.sha256}
        if layers is None:
            after, before = (of_base(ledger.read(name)) for name in _ends_of(ledger, commits, phase, force))
            check_one_kind(newest, after, before)
            tensors = taken_out(newest.tensors, after.tensors, before.tensors)
            made_by |= {"method": "difference", "commit": after.sha256, "before": before.sha256}
        else:
            tensors = bypassed(newest.tensors, layers)
            made_by |= {"method": "bypass", "layers": sorted(set(layers))}
        check_finite(tensors, f"the revert of {phase}")
        subject = Subject.of(str(ledger.directory / newest.reference), base)
        guarded = probes.guarded({entry.phase for entry in commits}, given_up=phase)
        old, new = subject.patch_of(newest), subject.patch_from(newest, tensors)
        judgement = judge(probes, subject, [old], new, guarded)
        return write(ledger, f"revert-{phase}", tensors, newest, made_by, judgement, force)


def _ends_of(ledger: Ledger, commits: list[EntryWritten], phase: str, force: bool) -> tuple[str, str]:
    """Return the names of the phase's newest commit that was trained here, and of the state before it."""
    found = [entry for entry in commits if entry.phase == phase]
    # An import stands under its phase's name, but what was learned is not its difference to the commit before it.
    ours = [entry for entry in found if (entry.made_by or {}).get("operation") != "import"]
    if not ours:
        raise ValueError(
            f"{found[-1].name} was imported into {ledger.directory.parent}, so what the phase {phase!r} changed is "
            "unknown here; bypass sidecars instead (--layers)"
        )
    commit, number = ours[-1], commits.index(ours[-1])
    for later in commits[number + 1 :]:
        made_by = later.made_by or {}
        if not force and made_by.get("commit") == commit.sha256 and made_by.get("method") == "difference":
            raise ValueError(
                f"{commit.name} was taken out already, by {later.name}: to subtract it once more would put its "
                "opposite in; --force does it all the same"
            )
    starts = [e for e in ledger.entries() if e.kind == "start" and e.phase_index == commit.phase_index]
    if not starts and number == 0:
        raise ValueError(
            f"{ledger.directory} has neither a start entry of phase {phase!r} nor an earlier commit, so what the "
            "phase changed is unknown; bypass sidecars instead (--layers)"
        )
    return commit.name, (starts[-1] if starts else commits[number - 1]).name


def merge(
    references: tuple[str, str],
    weights: tuple[float, float],
    out: Path,
    shards: list[str] | None = None,
    base: str | None = None,
    blocks: int | None = None,
    force: bool = False,
) -> DerivedCommit:
    """Makes wa·A + wb·B, parameter by parameter, probes it, and writes it as a commit if the guard agrees.

    In each set it is held against the worse of the two: a merge lies between its parents in what each alone has
    learned, and is refused where it is worse than both.

    Args:
        references: FILE, RUN or RUN@REF each; of one base, sidecar config and shape.
        weights: wa, wb. They are taken as they are: (0.5, 0.5) is the mean, (1, 1) the sum.
        out: a run, whose ledger gets the new commit, or a folder that is not there yet, which gets a ledger.
        shards, base, blocks: as in `probe`; without shards, the probe sets of A's run.
        force: write against the guard's verdict.

    Raises:
        ValueError, OSError: the patches don't go together, or not with those in `out`; as `Probes.of`, `HeldOut`.
    """
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ValueError(f"--weights {weights[0]},{weights[1]}: expected two finite numbers that are not both 0")
    a, b = (of_base(read_patch(reference)) for reference in references)
    check_one_kind(a, b)
    run = None if a.ledger is None else a.ledger.directory.parent
    probes = Probes.of(run, shards or [], blocks)
    subject = Subject.of(references[0], base)
    tensors = weighted([a.tensors, b.tensors], weights)
    check_finite(tensors, f"the merge of {a.reference} and {b.reference}")
    parents, after = [subject.patch_of(a), subject.patch_of(b)], subject.patch_from(a, tensors)
    judgement = judge(probes, subject, parents, after, {s.name for s in probes.sets})
    made_by: dict[str, Any] = {
        "operation": "merge",
        "parents": [a.sha256, b.sha256],
        "weights": list(weights),
    }
    if not judgement.agrees and not force:  # before a folder is made
        return DerivedCommit(str(out), made_by, False, judgement.reason, judgement.sets)
    with claimed(out, create=True) as ledger:
        if (newest := ledger.newest()) is not None:
            check_one_kind(of_base(ledger.read(newest.name)), a)
        return write(ledger, "merge", tensors, a, made_by, judgement, force)
