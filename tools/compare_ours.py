"""Ours: the product's own trainer, as its users start it, and what its journal says."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_measure import ATTENTION
from compare_cells import Cell
from compare_data import Course, config_of, write_config
from compare_tiers import ROOT, Tier
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revpatch.config import Config
from revpatch.ledger.journal import Journal
from revpatch.patch.patched_model import recording, switchboard
from revpatch.patch.sidecar import SidecarOutput
from revpatch.patches import load_patched
from revpatch.step.frozen_base import last_hidden_states
from revpatch.step.objective import PatchObjective
from revpatch.step.teacher import Teacher, TeacherCache


def run_ours(tier: Tier, cell: Cell) -> dict[str, Any]:
    """Trains ours with `python -m revpatch train` and reads what came of it.

    Raises FloatingPointError when a phase was given up, RuntimeError when the trainer failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "revpatch", "train", str(write_config(tier, cell, run, Path(folder)))]
        for override in cell.overrides:
            command += ["--set", override]
        threads = str(torch.get_num_threads())
        environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "COLUMNS": "200"}
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{cell.name}: the trainer failed: {(done.stderr or done.stdout).strip()[-2000:]}")
        config = config_of(tier, cell, run)
        events = Journal(run / "ledger/journal.jsonl", readonly=True).records()
        if any(event["event"] == "rollback" for event in events):
            raise FloatingPointError(f"{cell.name}: the loss was no number, and the product gave the phase up")
        commits = [event for event in events if event["event"] == "commit"]
        sets = Course(config, Path(folder) / "none").held_out(nn.Module())
        gates = []
        for commit in commits:
            model, _ = load_patched(run / "ledger" / commit["file"])
            gates.append({name: block_gates(model, blocks) for name, blocks in sets.items()})
        patch = switchboard(model).attached
        sizes = [entry["bytes"] for entry in events if entry["event"] == "entry" and entry["kind"] == "commit"]
        return {
            "checks": checks_of(config, events),
            "block_gates": gates,
            "seconds_a_step": seconds_a_step(run),
            "trainable": sum(parameter.numel() for parameter in patch.parameters()),
            "bytes": sizes[-1],
            "flops_a_new_token": round(flops_of(model, config) / (config.batch.new_blocks * tier.block)),
        }


def checks_of(config: Config, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every measurement in the journal: before the first step, at each probe, and block by block at each commit."""
    phases = [phase.name for phase in config.phases]
    start = next(event for event in events if event["event"] == "entry" and event["kind"] == "start")
    checks = [_check(0, 0, start["sets"], ends=True)]
    commits = {event["phase"]: event for event in events if event["event"] == "commit"}
    for event in events:
        if event["event"] == "probe":
            name, step = event["phase"], event["step"]
            ends = step == commits[name]["step"]
            checks.append(_check(phases.index(name), step, commits[name]["sets"] if ends else event["sets"], ends))
    return checks


def _check(phase: int, step: int, sets: dict[str, dict[str, Any]], ends: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"phase": phase, "step": step}
    found["losses"] = {name: round(values["loss"], 6) for name, values in sets.items()}
    found["gates"] = {name: round(values["gate"], 5) for name, values in sets.items()}
    if ends:
        found["blocks"] = {name: values["block_losses"] for name, values in sets.items()}
    return found


class _BlockGates:
    """Keeps the mean gate of each row, sidecar by sidecar."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def measure(self, output: SidecarOutput) -> tuple[Tensor, ...]:
        return (output.gate.flatten(1).mean(1),)

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        self.rows.append(measured[0])

    def record_plain(self, layer: int, hidden: Tensor) -> None:
        """A block without a sidecar has no gate."""


@torch.no_grad()
def block_gates(model: nn.Module, blocks: NDArray[Any]) -> list[float]:
    """The mean gate, over tokens and sidecars, of each block."""
    found: list[float] = []
    for start in range(0, len(blocks), 16):
        recorder = _BlockGates()
        with recording(model, recorder):
            last_hidden_states(model, torch.from_numpy(blocks[start : start + 16].astype(np.int64)))
        found += [round(float(value), 5) for value in torch.stack(recorder.rows).mean(0)]
    return found


def flops_of(model: nn.Module, config: Config) -> int:
    """Counted operations of a step whose replayed blocks the teacher has been asked about before."""
    with tempfile.TemporaryDirectory() as folder:
        new, replay, keys = next(iter(Course(config, Path(folder)).steps(0)))
    patch = switchboard(model).attached.requires_grad_(True)
    teacher = Teacher(model, TeacherCache(10**9))  # before the first commit: the base answers for everything
    teacher.expect({key[0]: 10**4 for key in keys})
    objective = PatchObjective(model, patch, teacher, config.objective)
    with torch.no_grad():
        objective(new, replay, keys or None)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        objective(new, replay, keys or None).loss.backward()
    return int(counter.get_total_flops())


def seconds_a_step(run: Path) -> float:
    """The median over the log lines of what TensorBoard was told."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    seconds: list[float] = [event.value for event in board.Scalars("time/step")]
    return round(statistics.median(seconds), 4)
