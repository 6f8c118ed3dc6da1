"""Whether a patch that was made by arithmetic may take the place of another: probes before and after, and the guard."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from revpatch.config import ProbeSetConfig, RollbackConfig, StreamConfig
from revpatch.config_file import load_config
from revpatch.ledger.events import Readings, RunBegun, RunResumed
from revpatch.ledger.history import JOURNAL_NAME
from revpatch.ledger.journal import Journal
from revpatch.patch.patched_model import Patch
from revpatch.surgery.held_out import HeldOut, sets_of
from revpatch.surgery.subject import Subject
from revpatch.training.guard import Keep, ProbeSet, compare_all, decide
from revpatch.training.probe import reading_of
from revpatch.training.resume import CONFIG_NAME
from revpatch.training.startup import REHEARSED


@dataclass(frozen=True)
class Probes:
    """What is probed, and by which rules."""

    sets: list[ProbeSetConfig]
    rollback: RollbackConfig = field(default_factory=RollbackConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)

    @classmethod
    def of(cls, run: Path | None, shards: list[str], blocks: int | None = None) -> Probes:
        """Those that `shards` names; else the probe sets of the run's config, and what its base had written to be held
        out. The rules are the run's in either case, or the defaults where it has no config.

        Raises:
            ValueError: neither names a set.
        """
        file = None if run is None else run / CONFIG_NAME
        config = load_config(file) if file is not None and file.is_file() else None
        if run is not None and config is not None and config.rehearses_own_text and not shards:
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
        """Names of the sets that may not get worse: not those of corpora that no phase in `taught` has taught, nor
        those of the phase that is `given_up`."""
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
    """Where the run's base had written its own text, when it last trained."""
    events = Journal(run / "ledger" / JOURNAL_NAME, readonly=True).events(RunBegun, RunResumed)
    noted = [e.facts[REHEARSED] for e in events if isinstance(e, RunBegun | RunResumed) and REHEARSED in e.facts]
    if not noted:
        raise ValueError(f"{run}: its journal doesn't say where its base's own text lies: name shards with --shards")
    return str(noted[-1])
