"""All that a GPU is to be asked, in one command of a few minutes: speed, waiting, memory, text, tests, nccl, the demo.

    python tools/gpu_check.py [--json gpu.json] [--minutes 9] [--only PART ...]     # on a machine with an NVIDIA GPU
    python tools/gpu_check.py --cpu [--only PART ...]                               # a dry run on a CPU

Needs this checkout and the packages of its virtual environment (`source launch/setup.sh`; any other Python that has
them does too). What is missing is listed first; a part that can't do without is "not run", with the package's name.

Every part is a process of its own with a time of its own, the most important first: one that hangs or dies costs itself
alone. The JSON file is written anew after each part, and while one runs the part itself writes what it has: what was
measured before a time-out counts. {"head", "minutes", "packages", "parts": [{"name", "status", "seconds", "said"}],
"figures": [{"name", "asked", "measured", "unit", "holds"}]}: what was asked comes first, measured or not.

Exits with 0 if every part was done and every figure that something was asked of holds. A dry run runs every part on
tiny shapes, holds nothing against what is asked and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from figures import Figure, read_figures, show
from progress import clock_time

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
NOT_THERE = 3
"""The exit code of a part whose package is not installed; gpu_parts.py has it too."""
KEPT_LINES = 12
"""Of what a part said last, if it failed."""
WRITING = 3.0
"""Seconds at the end that no part gets."""
SLOWER = 5
"""A dry run shares its cores with other work, and a part that is late there shows nothing."""
EARLY = "the time was up"


@dataclass(frozen=True)
class Part:
    """Something to measure."""

    name: str
    what: str
    seconds: float
    """The longest that it may take."""
    command: tuple[str, ...]
    """A tool of this folder and its options; `--json FILE` and, of gpu_parts.py, the device are added."""
    dry_run: tuple[str, ...] = ()
    """The same on a CPU; the same command if there is none."""
    asked: tuple[tuple[str, str, str], ...] = ()
    """Name, what is asked and unit of its figures that count, as the tool names them."""


def own(name: str, *options: str) -> tuple[str, ...]:
    """A part that gpu_parts.py measures."""
    return ("gpu_parts.py", name, *options)


BENCH = ("bench.py", "--device=cuda", "--dtype=bfloat16", "--block=1024", "--new=8", "--replay=4", "--micro-blocks=12")
PEERS = ("--rounds=5", "--peers=lora-lm,lora-kl,textbook-bf16,textbook-fp32,full-lm")
TINY_BENCH = ("bench.py", "--device=cpu", "--dtype=float32", "--shape=tiny", "--block=32", "--rounds=1", "--threads=1")
TINY_PEERS = ("--new=2", "--replay=1", "--peers=lora-lm,lora-kl", "--without-memory")
TEXT = ("bench_generate.py", "--device=cuda", "--dtype=bfloat16", "--bases=gpt2,demo", "--rounds=3")
TINY_TEXT = ("bench_generate.py", "--bases=demo", "--rounds=1", "--tokens=4", "--threads=1")
LORA = (("lora-lm / ours", ">= 1.3", "times"), ("lora-kl / ours", ">= 2", "times"))
PARTS = (
    Part("machine", "what the GPU is, and its own rates", 45, own("machine")),
    Part(
        "step",
        "tokens a second of the trainer's step",
        90,
        own("step"),
        asked=(
            ("new + replayed tokens a second", ">= 700000", "tokens/s"),
            ("share of peak, by counted operations", ">= 0.5", "of it"),
        ),
    ),
    Part(
        "sync",
        "waiting for the GPU inside a step",
        60,
        own("sync"),
        asked=(("waits for the GPU in a step", "<= 0", "waits"),),
    ),
    Part(
        "generate",
        "text with and without a patch, and launches a token",
        75,
        TEXT,
        TINY_TEXT,
        asked=(("tokens/s with the patch / without, GPT-2's shape", ">= 0.9", "ratio"),),
    ),
    Part(
        "memory",
        "peak memory beside the textbook loop's",
        60,
        own("memory"),
        asked=(("peak memory, ours / textbook loop", "<= 0.25", "of it"),),
    ),
    Part("bench", "a step beside the alternatives", 110, BENCH + PEERS, TINY_BENCH + TINY_PEERS, LORA),
    Part("tests", "the tests that are marked gpu", 75, own("tests"), asked=(("GPU tests that pass", "all", ""),)),
    Part("nccl", "the process group of one rank", 30, own("nccl"), asked=(("nccl with one rank", "works", ""),)),
    Part("step-compiled", "the trainer's step with base.compile", 110, own("step", "--compile")),
    Part("demo", "the demo", 100, own("demo"), asked=(("the demo's run", "ends with 0", "exit code"),)),
    Part(
        "bench-compiled",
        "the alternatives beside a compiled step",
        180,
        (*BENCH, "--rounds=3", "--peers=lora-lm,lora-kl", "--compile"),
        (*TINY_BENCH, *TINY_PEERS, "--compile=aot_eager"),
    ),
)
"""The most important first: what a short lease leaves room for is measured."""


@dataclass
class Outcome:
    """How a part went."""

    name: str
    status: str = "not run yet"
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)
    """Its last lines, if it was not done."""
    figures: list[Figure] = field(default_factory=list)


class Check:
    """One run of the parts.

    Args:
        parts: in their order.
        file: of the JSON.
        minutes: for all of them.
        cpu: whether this is the dry run.
    """

    def __init__(self, parts: Sequence[Part], file: Path, minutes: float, cpu: bool) -> None:
        self.parts, self.file, self.minutes, self.cpu = parts, file, minutes, cpu
        self.began = time.monotonic()
        self.packages = packages(ROOT / "pyproject.toml")
        self.outcomes = {part.name: Outcome(part.name) for part in parts}
        self.stopped = False

    @property
    def so_far(self) -> float:
        """Seconds."""
        return time.monotonic() - self.began

    def run(self) -> None:
        """Every part, and the file after each; without a GPU the first one ends it."""
        self.write()
        for number, part in enumerate(self.parts, start=1):
            longest = part.seconds * (SLOWER if self.cpu else 1)
            room = min(longest, 60 * self.minutes - self.so_far - WRITING)
            if room <= 0:
                self.outcomes[part.name].status = f"not run: {EARLY}"
                continue
            times = f"at most {clock_time(room)}; {clock_time(self.so_far)} of {clock_time(60 * self.minutes)}"
            tell(f"{number} of {len(self.parts)}, {part.name}: {part.what}, {times}")
            self.outcomes[part.name] = self.run_part(part, room)
            tell(f"{part.name}: {self.outcomes[part.name].status}")
            self.write()
            if self.stopped:
                break
            if part.name == "machine" and not self.cpu and self.outcomes[part.name].status.startswith("failed"):
                for other in self.outcomes.values():
                    other.status = "not run: no GPU" if other.name != "machine" else other.status
                break
        self.write()

    def run_part(self, part: Part, room: float) -> Outcome:
        """One part in a process of its own, which is ended with all that it started when its time is up."""
        outcome, began = Outcome(part.name), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "figures.json"
            tool, *options = part.dry_run if self.cpu and part.dry_run else part.command
            command = [sys.executable, str(TOOLS / tool), *options, f"--json={figures}"]
            if tool == "gpu_parts.py":
                command.append(f"--device={'cpu' if self.cpu else 'cuda'}")
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(self.cpu),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            said: deque[str] = deque(maxlen=KEPT_LINES)
            reader = threading.Thread(target=hand_on, args=(process, said), daemon=True)
            reader.start()
            try:
                code = process.wait(room)
            except subprocess.TimeoutExpired:
                outcome.status = f"timed out after {room:.0f} s; what it had measured counts"
            except KeyboardInterrupt:
                self.stopped, outcome.status = True, "stopped; what it had measured counts"
            else:
                outcome.status = status_of(code, said)
            finally:
                end(process)
            reader.join(5)
            if figures.is_file():
                outcome.figures = read_figures(figures)
        if tool == "bench_generate.py" and outcome.status.startswith("failed (exit code 1)") and outcome.figures:
            outcome.status = "done"  # so it exits when a figure does not hold
        outcome.seconds = round(time.monotonic() - began, 1)
        outcome.said = [] if outcome.status == "done" else list(said)
        return outcome

    def figures(self) -> list[Figure]:
        """What was asked, in the parts' order, and after it all else, each with its part's name before it."""
        asked, others = [], []
        for part in self.parts:
            there = {row.name: row for row in self.outcomes[part.name].figures}
            for name, limit, unit in part.asked:
                row = there.pop(name, None) or Figure(name, limit, None, unit, False)
                asked.append(Figure(f"{part.name}: {name}", limit, row.measured, unit, row.holds))
            others += [Figure(f"{part.name}: {row.name}", *list(asdict(row).values())[1:]) for row in there.values()]
        if self.cpu:  # nothing here is a GPU's, so nothing is held against what is asked of one
            return [Figure.plain(row.name, row.measured or "-", row.unit) for row in asked + others if row.measured]
        return asked + others

    def asked(self) -> list[Figure]:
        """What is asked of a GPU, alone."""
        count = sum(len(part.asked) for part in self.parts)
        return self.figures()[: 0 if self.cpu else count]

    @property
    def done(self) -> bool:
        """Whether every part was."""
        return all(outcome.status == "done" for outcome in self.outcomes.values())

    def write(self) -> None:
        """Writes the file as a whole, or leaves the one that is there."""
        content = {
            "head": "a dry run on a CPU: nothing here is a GPU's" if self.cpu else "on one GPU",
            "minutes": round(self.so_far / 60, 2),
            "packages": self.packages,
            "parts": [
                {key: value for key, value in asdict(outcome).items() if key != "figures"}
                for outcome in self.outcomes.values()
            ],
            "figures": [asdict(row) for row in self.figures()],
        }
        new = self.file.with_name(f"{self.file.name}.new")
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        new.replace(self.file)


def packages(pyproject: Path) -> list[str]:
    """Return a line for every package that the project asks for and that is not here, or is older here."""
    wrong = []
    text = pyproject.read_text(encoding="utf-8")
    for name, least in re.findall(r'"([A-Za-z0-9_-]+)>=([\d.]+)[^"]*"', text):
        if name == "setuptools":
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed; the project asks for {least} or newer")
            continue
        if numbers(found) < numbers(least):
            wrong.append(f"{name} {found} is installed; the project asks for {least} or newer")
    return wrong


def numbers(version: str) -> list[int]:
    """Return [2, 11, 0] for "2.11.0+cu130"."""
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]


def environment(cpu: bool) -> dict[str, str]:
    """Return a part's variables: this checkout first, no hub, one GPU or none, nothing of a launcher around it."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    first = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    visible = "" if cpu else kept.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    kept |= {"PYTHONPATH": first, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": visible, "PYTHONUNBUFFERED": "1"}
    if cpu:
        kept |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    else:
        kept.pop("DS_ACCELERATOR", None)
    return kept


def hand_on(process: subprocess.Popen[str], said: deque[str]) -> None:
    """Shows what a part says as it says it, and keeps the last lines."""
    assert process.stderr is not None
    for line in process.stderr:
        if "USDT:" not in line:  # the profiler's own
            said.append(line.rstrip())
            print(line, end="", file=sys.stderr, flush=True)


def status_of(code: int, said: Sequence[str]) -> str:
    """Return a part's status by its exit code."""
    if code == 0:
        return "done"
    missing = next((line.removeprefix("not there: ") for line in said if line.startswith("not there: ")), None)
    if missing is None:
        missing = next((m[1] for m in map(MODULE.search, said) if m), None)
    if missing is not None:
        return f"not run: needs the package {missing}"
    if code < 0:
        return f"failed (signal {signal.Signals(-code).name}): {said[-1] if said else ''}".rstrip(": ")
    return f"failed (exit code {code}): {said[-1] if said else ''}".rstrip(": ")


MODULE = re.compile(r"^ModuleNotFoundError: No module named '([\w.]+)'")


def end(process: subprocess.Popen[str]) -> None:
    """Ends a part's process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def tell(words: str) -> None:
    print(f"gpu_check.py: {words}", file=sys.stderr, flush=True)


def main() -> None:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts; what is left is not run")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--cpu", action="store_true", help="a dry run on tiny shapes, on the CPU")
    arguments = parser.parse_args()
    if not arguments.json.resolve().parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no folder {arguments.json.resolve().parent}")
    chosen = [part for part in PARTS if part.name in arguments.only]
    check = Check(chosen, arguments.json, arguments.minutes, arguments.cpu)
    for line in check.packages:
        tell(f"missing: {line}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # one that ends the whole leaves what there is
    check.run()
    table = [Figure.plain(f"part {o.name}", o.status, f"{o.seconds:.0f} s") for o in check.outcomes.values()]
    title = "a dry run on a CPU: nothing here is a GPU's" if arguments.cpu else "asked of one GPU"
    show(f"{title}; all figures are in {arguments.json}", check.asked() + table, None)
    sys.exit(0 if check.done and all(row.holds for row in check.asked()) else 1)


if __name__ == "__main__":
    main()
