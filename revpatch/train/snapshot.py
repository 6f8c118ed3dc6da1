"""What a killed run needs to resume as though it had not been killed: one file, written atomically, beside the step.

    RUN/snapshot/step000000000300.safetensors        at step 300 of the run, in the middle of a phase
    RUN/snapshot/step000000000300_end.safetensors    the same, after the phase that ends there was committed
    RUN/snapshot/step000000000300_start.safetensors  the same, in the phase after that, before its first step

A snapshot knows no world size and no ZeRO stage: the patch and Adam's moments are by parameter name, the place in the
data is the step. It is packed as an entry of the ledger is (tensors and plain values, hashed),
and names the journal's head, so that it can't be taken for one of another history.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revpatch.config import ConfigError
from revpatch.durable import write_atomically
from revpatch.evaluation.guard import Comparison
from revpatch.evaluation.probe import Measurement
from revpatch.ledger.events import Readings, readings_of
from revpatch.ledger.patch_file import EntryError, read_entry, serialise
from revpatch.shards.format import ShardFault
from revpatch.step.engine import MOMENTS, EngineState
from revpatch.train.rollback import GoodState

log = logging.getLogger("revpatch")

VERSION = 2
KEEP = 2
"""So many snapshots are kept, the newest."""
ANEW = "or begin another run: elsewhere (--set output_dir=...), or with --fresh --overwrite, which deletes this one"

Measurements = dict[str, Measurement]


@dataclass
class PhaseProgress:
    """How far a phase is that has begun and is not committed; see `Phase`."""

    step: int
    start: GoodState
    good: GoodState
    learned: list[int]
    pending: list[int]
    probed: tuple[int, Readings]
    rollbacks: int
    lr_factor: float


@dataclass
class Snapshot:
    """A run at a step. Rank 0 holds all of it; measurements are hers alone."""

    step: int
    """Optimizer steps of the run, over all phases."""
    phase_index: int
    """The phase that is under way, or that comes next."""
    first_step: int
    """Optimizer steps of the phases before that one."""
    engine: EngineState
    phase: PhaseProgress | None
    """None between phases."""
    events: int
    """Events in the journal."""
    head: str
    """sha256 of its last line."""
    parent: str | None
    """sha256 of the entry from which the next one descends."""
    identity: dict[str, Any]
    """What the entries say of base, tokenizer, sidecar and seed."""
    digests: dict[str, list[str]]
    """Digests of the sets of shards that are in use, by the config's key."""
    replay: list[str]
    """Folders of the committed phases' samples."""
    quarantine: list[ShardFault]
    committed: Measurements
    first: Measurements
    buffers: dict[str, Tensor]
    """What the patch holds beside its parameters: the sizes of the base's channels."""
    random: dict[str, Tensor] = field(default_factory=dict)
    """State of torch's generator, by device."""

    @property
    def name(self) -> str:
        """Its file's name; they sort by age."""
        place = "_end" if self.phase is None else "" if self.phase.step else "_start"
        return f"step{self.step:012d}{place}.safetensors"

    def pack(self) -> bytes:
        """Return the bytes of its file."""
        tensors = _Tensors()
        metadata: dict[str, Any] = {
            "snapshot": VERSION,
            **{key: getattr(self, key) for key in _PLAIN},
            "quarantine": [broken.as_fields() for broken in self.quarantine],
            "engine_step": tensors.put_state("engine", self.engine),
            "committed": tensors.put_measurements("committed", self.committed),
            "first": tensors.put_measurements("first", self.first),
        }
        for name, buffer in self.buffers.items():
            tensors.found[f"buffer/{name}"] = buffer
        for device, state in self.random.items():
            tensors.found[f"random/{device}"] = state
        if self.phase is not None:
            metadata["phase"] = {
                **{key: getattr(self.phase, key) for key in _PHASE_PLAIN},
                "start": tensors.put_good("start", self.phase.start),
                "good": tensors.put_good("good", self.phase.good),
            }
            for key in ("learned", "pending"):
                tensors.found[key] = torch.tensor(getattr(self.phase, key), dtype=torch.int64)
        return serialise(tensors.found, metadata)

    @classmethod
    def read(cls, path: Path, anew: str = ANEW) -> Snapshot:
        """Reads a file that `pack` made; `anew` says what else to do with one of another version.

        Raises EntryError for one that is damaged or something else, and ConfigError for one of another version.
        """
        found, metadata = read_entry(path)
        if "snapshot" not in metadata:
            raise EntryError(f"{path}: expected a snapshot, found something else")
        if metadata["snapshot"] != VERSION:
            raise ConfigError(
                f"{path}: expected a snapshot of version {VERSION}, found {metadata['snapshot']!r}: resume it with the "
                f"revpatch that wrote it, {anew}"
            )
        tensors = _Tensors(found)
        progress = metadata.get("phase")
        return cls(
            **{key: metadata[key] for key in _PLAIN},
            engine=tensors.state("engine", metadata["engine_step"]),
            quarantine=[ShardFault(**fields) for fields in metadata["quarantine"]],
            committed=tensors.measurements("committed", metadata["committed"]),
            first=tensors.measurements("first", metadata["first"]),
            buffers=tensors.under("buffer/"),
            random={key.partition("/")[2]: value for key, value in found.items() if key.startswith("random/")},
            phase=None
            if progress is None
            else PhaseProgress(
                step=progress["step"],
                start=tensors.good("start", progress["start"]),
                good=tensors.good("good", progress["good"]),
                learned=found["learned"].tolist(),
                pending=found["pending"].tolist(),
                probed=(progress["probed"][0], readings_of(progress["probed"][1])),
                rollbacks=progress["rollbacks"],
                lr_factor=progress["lr_factor"],
            ),
        )


_PLAIN = ("step", "phase_index", "first_step", "events", "head", "parent", "identity", "digests", "replay")
_PHASE_PLAIN = ("step", "probed", "rollbacks", "lr_factor")


class _Tensors:
    """The tensors of a snapshot by name, and what is built of them."""

    def __init__(self, found: dict[str, Tensor] | None = None) -> None:
        self.found = {} if found is None else found

    def put_state(self, name: str, state: EngineState) -> int:
        parts = {"master": state.master, **(state.moments if state.step else {})}  # before a step all moments are 0
        for kind, tensors in parts.items():
            self.found |= {f"{name}/{kind}/{key}": tensor for key, tensor in tensors.items()}
        return state.step

    def state(self, name: str, step: int) -> EngineState:
        master = self.under(f"{name}/master/")
        zeros = {key: torch.zeros_like(tensor) for key, tensor in master.items()}
        moments = {
            kind: self.under(f"{name}/{kind}/") if step else {key: z.clone() for key, z in zeros.items()}
            for kind in MOMENTS
        }
        return EngineState(master, moments, step)

    def put_measurements(self, name: str, measured: Measurements) -> dict[str, Any]:
        for key, measurement in measured.items():
            self.found[f"{name}/losses/{key}"] = torch.from_numpy(np.asarray(measurement.losses, dtype=np.float64))
        return {
            key: {"gates": measurement.gates, "changes": measurement.changes, "spreads": measurement.spreads}
            for key, measurement in measured.items()
        }

    def measurements(self, name: str, plain: dict[str, Any]) -> Measurements:
        return {
            key: Measurement(
                self.found[f"{name}/losses/{key}"].numpy(),
                _floats(kept["gates"]),
                _floats(kept["changes"]),
                [_floats(shares) for shares in kept.get("spreads", [])],
            )
            for key, kept in plain.items()
        }

    def put_good(self, name: str, good: GoodState) -> dict[str, Any]:
        return {
            "step": good.step,
            "entry": good.entry,
            "sha256": good.sha256,
            "engine_step": self.put_state(name, good.engine),
            "measurements": self.put_measurements(name, good.measurements),
            "comparisons": [asdict(comparison) for comparison in good.comparisons],
        }

    def good(self, name: str, plain: dict[str, Any]) -> GoodState:
        return GoodState(
            step=plain["step"],
            engine=self.state(name, plain["engine_step"]),
            measurements=self.measurements(name, plain["measurements"]),
            comparisons=[Comparison(**fields) for fields in plain["comparisons"]],
            entry=plain["entry"],
            sha256=plain["sha256"],
        )

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.found.items() if key.startswith(prefix)}


def _floats(values: list[Any]) -> list[float]:
    return [float(value) for value in values]  # a NaN is spelt as a text


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's generators, on the CPU."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor]) -> None:
    """Puts back what `random_state` gave, as far as there is such a device here."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def snapshots_in(directory: Path) -> list[Path]:
    """Return the files of the snapshots in a folder, the newest first."""
    return sorted(directory.glob("step*.safetensors"), reverse=True)


def newest_snapshot(directory: Path, anew: str = ANEW) -> Snapshot | None:
    """Return the newest snapshot in the folder that is whole, or None if none was ever written there.

    `anew` says what else to do if there is none to resume from. Those that are damaged are named, and renamed
    `NAME.damaged`. Raises ConfigError when all are, or one is of another version, and OSError.
    """
    for path in snapshots_in(directory):
        try:
            return Snapshot.read(path, anew)
        except EntryError as error:
            log.warning("snapshot %s can't be used, an older one is looked for: %s", path.name, error)
            path.replace(path.with_name(f"{path.name}.damaged"))
    if damaged := sorted(path.name for path in directory.glob("*.damaged")):
        raise ConfigError(
            f"{directory}: expected a snapshot to resume from, found damaged ones alone ({', '.join(damaged)}). "
            f"Nothing else was changed: put back a whole one from a copy, {anew}"
        )
    return None


class SnapshotWriter:
    """Writes snapshots in a thread of its own, one after the other, and keeps the newest `KEEP`.

    What goes wrong in the thread (a full disk) is raised by the next call of `write` or `finish`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Begins to write; what it holds must not change any more. Waits while the one before is being written."""
        self.finish()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="revpatch-snapshot")
        self._thread.start()

    def finish(self) -> None:
        """Waits until all is on the disk. Raises what kept it from being written, such as an OSError."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self.directory.mkdir(exist_ok=True)
            write_atomically(self.directory / snapshot.name, snapshot.pack())
            for path in snapshots_in(self.directory)[KEEP:]:
                path.unlink()
            for path in self.directory.glob(".step*.tmp"):  # what a killed process left
                path.unlink()
        except BaseException as error:  # handed over: it belongs to the caller
            self._error = error
