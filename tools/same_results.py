"""Does a change of the code change what training computes? Records small runs, and compares two records.

    python tools/same_results.py record before.json [--code DIR] [--only REGEX]
    python tools/same_results.py compare before.json after.json

`record` runs every scenario by the code of a checkout (this one, or DIR): ranks 1, 2 and 4, accelerate and ZeRO 0, 1
and 2, the base's own text, a rollback, a quarantine, a SIGTERM and a SIGKILL that are resumed. Of each it keeps, in
order, the journal's events with their steps and numbers, and a digest of every entry's tensors, whatever the container.
Of runs that were stopped at a moment that nobody chose it keeps the commits, which must be those of the run that was
not. Times, paths, hashes of files, hosts and versions are left out. `compare` prints the first difference of each
scenario; the exit code is 1 if there is one. It takes about five minutes on 2 quiet cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from progress import Progress
from safetensors.torch import load_file

from revpatch.corpus.build import build_shards

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {
    *("seq", "time", "previous", "sha256", "bytes", "file", "to_file", "facts", "base", "bare_base", "base_at"),
    *("digest", "location", "reason", "tokens_per_second", "restored_from", "snapshot", "changed", "orphans", "files"),
    *("parent", "tokenizer", "leftovers", "superseded", "undoes_from", "origin"),
}
"""Keys of events that say nothing of what was computed, or something of where and when."""
SET_OF_A_PROBE = {"loss", "reference", "rise", "drift", "before", "base", "tolerance", "guarded", "low", "high"}
Record = dict[str, list[Any]]


@dataclass(frozen=True)
class Scenario:
    """One run: how many ranks, what its config has besides, and what is done to it."""

    ranks: int = 1
    overrides: dict[str, Any] = field(default_factory=dict)
    zero: int | None = None
    """DeepSpeed at this stage; None is accelerate."""
    damaged: bool = False
    """A bit of a shard of the first phase is flipped."""
    tolerance: float | None = None
    """Of every probe set, so small that the guard rolls back."""
    stopped_by: signal.Signals | None = None
    """After its first snapshot, and then resumed."""


LONG = {"phases": 60, "snapshot": {"every": 4}}
SCENARIOS = {
    "1 rank": Scenario(),
    "2 ranks": Scenario(2),
    "4 ranks": Scenario(4),
    "ZeRO 0": Scenario(2, zero=0),
    "ZeRO 1": Scenario(2, zero=1),
    "ZeRO 2": Scenario(2, zero=2),
    "own text": Scenario(2, {"replay": {"base": "self", "own_blocks": 32, "blocks_per_phase": 8}}),
    "rollback": Scenario(2, {"optimizer": {"lr": 0.05, "gate_lr": 0.1}}, tolerance=0.002),
    "quarantine": Scenario(2, {"stream": {"on_error": "quarantine", "shuffle_blocks": 8}}, damaged=True),
    "60 steps": Scenario(1, LONG),
    "60 steps, SIGTERM": Scenario(1, LONG, stopped_by=signal.SIGTERM),
    "60 steps, SIGKILL": Scenario(1, LONG, stopped_by=signal.SIGKILL),
}


def run(scenario: Scenario, toy: Any, folder: Path, code: Path) -> Record:
    """Runs a scenario in `folder` by the code of a checkout.

    Raises RuntimeError, with the end of its output, for a run that failed.
    """
    overrides = dict(scenario.overrides)
    if steps := overrides.pop("phases", None):
        phases = toy.settings(folder)["phases"]
        overrides["phases"] = [{**phase, "steps": steps} for phase in phases]
    if scenario.zero is not None:
        (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": scenario.zero}}))
        overrides["engine"] = {"kind": "deepspeed", "deepspeed": str(folder / "ds.json")}
    if scenario.damaged:
        source = toy.folder / "first.jsonl"
        build_shards([source], toy.tokenizer, 16, folder / "first", blocks_per_shard=20, max_tokens=1600)
        shard = sorted((folder / "first").glob("*.tar"))[1]
        data = bytearray(shard.read_bytes())
        data[3 * 1024 + 512 + 5] ^= 1
        shard.write_bytes(data)
        phases = toy.settings(folder)["phases"]
        overrides["phases"] = [{**phases[0], "shards": str(folder / "first")}, phases[1]]
    if scenario.tolerance is not None:
        sets = toy.settings(folder)["probes"]["sets"]
        overrides["probes"] = {"every": 3, "sets": [{**each, "tolerance": scenario.tolerance} for each in sets]}
    overrides["build"] = {"folder": str(folder / "built")}
    config = toy.config_file(folder, **overrides)
    command = [sys.executable, "-m", "revpatch", "train", str(config)]
    if scenario.ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc-per-node={scenario.ranks}", "-m", *command[2:]]
    if scenario.stopped_by is not None:
        _stop(command, folder, code, scenario.stopped_by)
    done = subprocess.run(command, cwd=code, env=_environment(code), capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line][:5]
        raise RuntimeError("\n".join([f"{' '.join(command)} ended with {done.returncode}:", *said]))
    return record_of(folder / "run", commits_alone=steps is not None)


def _environment(code: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def _stop(command: list[str], folder: Path, code: Path, by: signal.Signals) -> None:
    """Starts the run and stops it after its first snapshot."""
    process = subprocess.Popen(
        command, cwd=code, env=_environment(code), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list((folder / "run/snapshot").glob("step*")):
        time.sleep(0.02)
    process.send_signal(by)
    if (ended := process.wait()) not in (75, -signal.SIGKILL):
        raise RuntimeError(f"{by.name} came too late or was not heard: the run ended with {ended}")


def record_of(directory: Path, commits_alone: bool = False) -> Record:
    """What a run's ledger says that it computed, in the order of its journal."""
    ledger = directory / "ledger"
    events = [json.loads(line) for line in (ledger / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    found: Record = {"entries": [], "events": []}
    for event in events:
        if event["event"] == "entry" and (not commits_alone or event["kind"] == "commit"):
            file = ledger / event["file"]
            digest = digest_of(file) if file.exists() else "pruned"
            found["entries"].append([event["kind"], event["phase"], event["step"], digest])
        if not commits_alone and event["event"] not in ("pruned", "samples"):
            found["events"].append(kept(event))
    return found


def kept(value: Any, key: str = "") -> Any:
    """An event without what is left out; what a probe set holds is kept whole."""
    if isinstance(value, dict):
        inside_a_set = SET_OF_A_PROBE & value.keys() >= {"loss", "reference"}
        return {k: kept(v, k) for k, v in sorted(value.items()) if inside_a_set or k not in LEFT_OUT}
    return [kept(each) for each in value] if isinstance(value, list) else value


def digest_of(file: Path) -> str:
    """sha256 of names, dtypes, shapes and bytes of an entry's tensors, from either container."""
    if file.suffix == ".pt":
        tensors = torch.load(file, weights_only=True)["tensors"]
    else:
        tensors = load_file(file)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def first_difference(before: Any, after: Any, where: str = "") -> str | None:
    """Where two records differ first, and both sides; None if they don't."""
    if type(before) is type(after) and isinstance(before, dict):
        for key in dict.fromkeys((*before, *after)):
            if key not in before or key not in after:
                return f"{where}.{key}: only {'after' if key in after else 'before'}"
            if (found := first_difference(before[key], after[key], f"{where}.{key}")) is not None:
                return found
        return None
    if type(before) is type(after) and isinstance(before, list):
        for number, (one, other) in enumerate(zip(before, after, strict=False)):
            if (found := first_difference(one, other, f"{where}[{number}]")) is not None:
                return found
        return None if len(before) == len(after) else f"{where}: {len(before)} before, {len(after)} after"
    return None if before == after else f"{where}: {str(before)[:60]} before, {str(after)[:60]} after"


def compare(before: dict[str, Record], after: dict[str, Record]) -> dict[str, str | None]:
    """The first difference of each scenario that either has; and of runs that were stopped and resumed, from the one
    that was not."""
    found: dict[str, str | None] = {}
    for name in dict.fromkeys((*before, *after)):
        if name not in before or name not in after:
            found[name] = f"only {'after' if name in after else 'before'}"
        else:
            found[name] = first_difference(before[name], after[name])
    for whose, records in (("before", before), ("after", after)):
        for name in records:
            through = name.partition(", SIG")[0]
            if through != name and through in records:
                different = first_difference(records[through], records[name])
                found[f"{name}, against the run that was not stopped, {whose}"] = different
    return found


def record(out: Path, code: Path, only: str) -> None:
    """Runs the scenarios and writes what they gave."""
    sys.path.append(str(ROOT / "tests"))
    from toy import build_toy  # type: ignore[import-not-found]

    names = [name for name in SCENARIOS if re.search(only, name)]
    progress, found = Progress("same_results.py", names), {}
    with tempfile.TemporaryDirectory() as place:
        toy = build_toy(Path(place) / "toy")
        for number, name in enumerate(names):
            folder = Path(place) / str(number)
            folder.mkdir()
            with progress.step(name):
                found[name] = run(SCENARIOS[name], toy, folder, code)
    out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--code", type=Path, default=ROOT, help="the checkout whose code is run")
    recording.add_argument("--only", default="", metavar="REGEX", help="of the scenarios' names")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args(words)
    if arguments.command == "record":
        record(arguments.out, arguments.code.resolve(), arguments.only)
        return 0
    sides = [json.loads(path.read_text(encoding="utf-8")) for path in (arguments.before, arguments.after)]
    differences = compare(*sides)
    for name, found in differences.items():
        print(f"{name}: {'the same' if found is None else found}")
    return int(any(found is not None for found in differences.values()))


if __name__ == "__main__":
    sys.exit(main())
