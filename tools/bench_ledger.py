"""What reading a long ledger costs, beside what is asked.

    python tools/bench_ledger.py [--json FILE] [--entries 10000] [--kib 64] [--large 60] [--rounds 5]

Makes a run of so many good entries in a temporary folder, each with its probe of three held-out sets before it and a
file of so many KiB, and another of a few entries of 4.8 MB (what a patch of a GPT-2 of 124M with r = 64 takes), and
measures:

- the wall time of `python -m revpatch ledger log`, and of `ledger verify --no-hash`, as processes,
  so that the interpreter's start and all imports count; the median of the rounds, and the CPU time of the same;
- bytes/s of `verify`, which hashes, over those of `sha256sum` on the same files, in turn within each round, page cache
  warm. verify's time is taken inside the process, sha256sum's with its start, which is 1 ms.

Prints a table and exits with 1 if a figure does not hold.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from figures import Figure, machine, show
from progress import Progress

from revpatch.durable import sha256_of
from revpatch.ledger.journal import Journal
from revpatch.ledger.maintenance import verify
from revpatch.ledger.patch_file import entry_name

ROOT = Path(__file__).resolve().parent.parent
LARGE = 4_800_000
SETS = {
    name: {
        "loss": 3.4201 + number,
        "reference": 3.4011 + number,
        "rise": 0.019,
        "drift": 0.021,
        "tolerance": 0.03,
        "low": 0.011,
        "high": 0.027,
        "guarded": True,
        "before": 3.3991 + number,
        "base": 3.3991 + number,
        "gate": 0.4126,
        "patch_norm": 1.2345,
    }
    for number, name in enumerate(("state_of_the_union", "jargon", "devil"))
}


def make_run(run: Path, entries: int, size: int) -> Path:
    """A run of good entries of `size` random bytes. Its journal is written at once, as each event would be synced."""
    journal = Journal(run / "ledger/journal.jsonl")
    lines: list[bytes] = []
    journal._write = lines.append  # type: ignore[method-assign, assignment]
    journal.append("phase_start", phase="corpus", phase_index=0, steps=entries)
    for step in range(1, entries + 1):
        name, data = entry_name(0, "corpus", "good", step), os.urandom(size)
        (run / "ledger" / name).write_bytes(data)
        place = {"phase": "corpus", "step": step}
        journal.append("probe", **place, sets=SETS, training={"lm": 3.0})
        found = {"file": name, "sha256": sha256_of(data), "bytes": size}
        journal.append("entry", kind="good", phase_index=0, **place, **found, sets=SETS)
    journal.path.write_bytes(b"".join(lines))
    return run


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def command(*arguments: str, **environment: str) -> None:
    """A command line of this checkout, in a process of its own, into a pipe that is read."""
    subprocess.run(
        [sys.executable, "-m", "revpatch", "ledger", *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


COMMANDS = ("ledger log", "ledger log --json", "ledger verify --no-hash")


def reading(run: Path, entries: int, rounds: int, progress: Progress) -> list[Figure]:
    """Wall time of the commands, with the interpreter's start."""
    ways: tuple[Callable[[], None], ...] = (
        lambda: command("log", str(run)),
        lambda: command("log", str(run), "--json"),
        lambda: command("verify", str(run), "--no-hash"),
    )
    rows = []
    for name, work in zip(COMMANDS, ways, strict=True):
        times = []
        for _ in range(rounds):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            with progress.step(name):
                wall = seconds(work)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append((wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime))
        wall, cpu = (statistics.median(time[which] for time in times) for which in (0, 1))
        rows.append(Figure.at_most(f"{name}, {entries:,} entries", 2, wall, "s"))
        rows.append(Figure.plain("    of this, CPU time", cpu, "s"))
    return rows


def hashing(run: Path, label: str, rounds: int, progress: Progress) -> Figure:
    """Bytes/s of verify over those of sha256sum; each round measures both, so that a busy machine is busy for both."""
    names = sorted(path.name for path in (run / "ledger").glob("*.safetensors"))
    total = sum((run / "ledger" / name).stat().st_size for name in names)

    def sha256sum() -> None:
        subprocess.run(["sha256sum", *names], cwd=run / "ledger", check=True, stdout=subprocess.DEVNULL)

    def ours() -> None:
        report = verify(run)
        assert report.ok and report.bytes_hashed == total, report.problems[:3]

    times = []
    for number in range(rounds + 1):
        with progress.step(f"hashing {label}"):
            both = seconds(sha256sum), seconds(ours)
        if number:  # the first round fills the page cache
            times.append(both)
    ratio = statistics.median(theirs / own for theirs, own in times)
    rate = total / statistics.median(own for _, own in times) / 1e6
    return Figure.at_least(f"hashing {label} ({rate:,.0f} MB/s) / sha256sum", 0.8, ratio, "ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--kib", type=int, default=64)
    parser.add_argument("--large", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    assert shutil.which("sha256sum"), "sha256sum (coreutils) is what hashing is measured against"
    labels = (f"{args.entries:,} entries of {args.kib} KiB", f"{args.large} entries of 4.8 MB")
    hashed = [f"hashing {label}" for label in labels] * (args.rounds + 1)
    progress = Progress("bench_ledger.py", ["writing the runs", *COMMANDS * args.rounds, *hashed])
    with tempfile.TemporaryDirectory() as name:
        with progress.step("writing the runs"):
            many = make_run(Path(name) / "many", args.entries, args.kib * 1024)
            few = make_run(Path(name) / "few", args.large, LARGE)
        rows = reading(many, args.entries, args.rounds, progress)
        rows += [hashing(run, label, args.rounds, progress) for run, label in zip((many, few), labels, strict=True)]
    show(f"reading a ledger\n{machine()}", rows, args.json)
    sys.exit(not all(row.holds for row in rows))


if __name__ == "__main__":
    main()
