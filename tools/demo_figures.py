"""What the demo is asked to reach, beside what a run of it reached, read from the run's ledger.

    python tools/demo_figures.py RUN [RUN_WITH_THE_SAME_SEED] [--json FILE]

Prints a table and exits with 1 if a figure does not hold. The time is from the run's first journal line to its last: 2
ranks on 2 cores, without set-up and start-up.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

from figures import Figure, show

from revpatch.durable import to_plain
from revpatch.ledger.events import PhaseCommitted, RolledBack
from revpatch.ledger.ledger import Ledger, effective


def figures_of(run: Path, again: Path | None) -> list[Figure]:
    """The figures of a demo run, and of a second one with the same seed."""
    ledger = Ledger(run / "ledger", readonly=True)
    events = effective(ledger.journal.events())
    commits = {event.phase: to_plain(event.sets) for event in events if isinstance(event, PhaseCommitted)}
    rollbacks = [event for event in events if isinstance(event, RolledBack) and event.phase == "scrambled"]
    jargon, scrambled = commits["jargon"], commits["scrambled"]
    seconds = (datetime.fromisoformat(events[-1].time) - datetime.fromisoformat(events[0].time)).total_seconds()
    learned = jargon["jargon"]["before"] - jargon["jargon"]["loss"]
    rises = {phase: sets["sotu"]["loss"] - sets["sotu"]["before"] for phase, sets in commits.items()}
    since_base = max(sets["sotu"]["loss"] - sets["sotu"]["base"] for sets in commits.values())
    worse = max(values["loss"] - values["before"] for values in scrambled.values())
    rows = [
        Figure("training time", "<= 300", round(seconds, 1), "s", seconds <= 300),
        Figure("jargon learned in phase 1", ">= 0.9", round(learned, 4), "nats/token", learned >= 0.9),
        *(
            Figure(f"sotu rise at the commit of {phase}", "<= 0.03", round(rise, 4), "nats/token", rise <= 0.03)
            for phase, rise in rises.items()
        ),
        Figure(
            "sotu rise since the base, worst commit", "<= 0.03", round(since_base, 4), "nats/token", since_base <= 0.03
        ),
        Figure(
            "gate on sotu after phase 1",
            "<= 0.25",
            round(jargon["sotu"]["gate"], 4),
            "",
            jargon["sotu"]["gate"] <= 0.25,
        ),
        Figure(
            "gate on jargon after phase 1",
            ">= 0.8",
            round(jargon["jargon"]["gate"], 4),
            "",
            jargon["jargon"]["gate"] >= 0.8,
        ),
        Figure("rollbacks of the scrambled phase", ">= 1", len(rollbacks), "", len(rollbacks) >= 1),
        Figure("worst probe after the scrambled phase", "<= 0", round(worse, 4), "nats/token", worse <= 0),
    ]
    if again is not None:
        ours, theirs = (
            [entry.sha256 for entry in Ledger(folder / "ledger", readonly=True).entries() if entry.kind == "commit"]
            for folder in (run, again)
        )
        rows.append(Figure("commits of two runs with one seed", "same sha256", ours[-1][:16], "", ours == theirs))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("again", type=Path, nargs="?")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = figures_of(args.run, args.again)
    show(f"the demo in {args.run}", rows, args.json)
    sys.exit(not all(row.holds for row in rows))


if __name__ == "__main__":
    main()
