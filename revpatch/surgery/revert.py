"""One earlier phase's change taken out of the newest patch: `revpatch ledger revert RUN PHASE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from revpatch.ledger.events import EntryWritten
from revpatch.ledger.history import Ledger, PatchFile
from revpatch.surgery.arithmetic import Tensors, bypassed, check_finite, taken_out
from revpatch.surgery.judgement import Probes, judge
from revpatch.surgery.new_entry import Made, claimed, write
from revpatch.surgery.subject import Subject, check_one_kind, of_base


def revert(
    run: Path,
    phase: str,
    layers: list[int] | None = None,
    shards: list[str] | None = None,
    base: str | None = None,
    blocks: int | None = None,
    force: bool = False,
) -> Made:
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
        found = _commits_of(commits, phase, run)
        newest = of_base(ledger.read(commits[-1].name))
        made_by: dict[str, Any] = {"operation": "revert", "phase": phase, "newest": newest.sha256}
        if layers is None:
            commit = _trained(found, run)
            _refuse_twice(commits, commit, force)
            tensors, parts = _difference(ledger, commits, commit, newest)
            made_by |= {"method": "difference", **parts}
        else:
            tensors = bypassed(newest.tensors, layers)
            made_by |= {"method": "bypass", "layers": sorted(set(layers))}
        check_finite(tensors, f"the revert of {phase}")
        subject = Subject.of(str(ledger.directory / newest.reference), base)
        before, after = subject.patch_of(newest), subject.patch_from(newest, tensors)
        guarded = probes.guarded({entry.phase for entry in commits}, given_up=phase)
        judgement = judge(probes, subject, [before], after, guarded)
        return write(ledger, f"revert-{phase}", tensors, newest, made_by, judgement, force)


def _commits_of(commits: list[EntryWritten], phase: str, run: Path) -> list[EntryWritten]:
    found = [entry for entry in commits if entry.phase == phase]
    if not found:
        raise ValueError(
            f"{run} has no commit of a phase {phase!r}; committed are {', '.join(e.phase for e in commits) or 'none'}"
        )
    return found


def _trained(found: list[EntryWritten], run: Path) -> EntryWritten:
    """The newest of these commits that was not imported: an import stands under its phase's name, but what was learned
    in that phase is not its difference to the commit before it."""
    ours = [entry for entry in found if (entry.made_by or {}).get("operation") != "import"]
    if not ours:
        raise ValueError(
            f"{found[-1].name} was imported into {run}, so what the phase {found[-1].phase!r} changed is unknown "
            "here; bypass sidecars instead (--layers)"
        )
    return ours[-1]


def _refuse_twice(commits: list[EntryWritten], commit: EntryWritten, force: bool) -> None:
    for later in commits[commits.index(commit) + 1 :]:
        made_by = later.made_by or {}
        if not force and made_by.get("commit") == commit.sha256 and made_by.get("method") == "difference":
            raise ValueError(
                f"{commit.name} was taken out already, by {later.name}: to subtract it once more would put its "
                "opposite in; --force does it all the same"
            )


def _difference(
    ledger: Ledger, commits: list[EntryWritten], commit: EntryWritten, newest: PatchFile
) -> tuple[Tensors, dict[str, Any]]:
    """The tensors, and the sha256 of what was subtracted."""
    starts = [e for e in ledger.entries() if e.kind == "start" and e.phase_index == commit.phase_index]
    state = starts[-1] if starts else commits[commits.index(commit) - 1] if commits.index(commit) else None
    if state is None:
        raise ValueError(
            f"{ledger.directory} has neither a start entry of phase {commit.phase!r} nor an earlier commit, so what "
            "the phase changed is unknown; bypass sidecars instead (--layers)"
        )
    after, before = of_base(ledger.read(commit.name)), of_base(ledger.read(state.name))
    check_one_kind(newest, after, before)
    tensors = taken_out(newest.tensors, after.tensors, before.tensors)
    return tensors, {"commit": after.sha256, "before": before.sha256}
