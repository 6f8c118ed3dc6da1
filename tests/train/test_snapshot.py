"""Snapshots as files: all of it comes back, only whole ones are believed, and errors of the thread are heard."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from past_events import reading

from revpatch.config import ConfigError
from revpatch.evaluation.guard import Comparison
from revpatch.evaluation.probe import Measurement
from revpatch.ledger.patch_file import serialise
from revpatch.shards.format import ShardFault
from revpatch.step.engine import EngineState
from revpatch.train.rollback import GoodState
from revpatch.train.snapshot import PhaseProgress, Snapshot, SnapshotWriter, newest_snapshot, random_state


def engine(step: int, seed: int) -> EngineState:
    generator = torch.Generator().manual_seed(seed)

    def tensors() -> dict[str, torch.Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in (("a.w", (3, 2)), ("b", (1,)))}

    moments = {key: tensors() if step else {"a.w": torch.zeros(3, 2), "b": torch.zeros(1)} for key in MOMENTS}
    return EngineState(tensors(), moments, step)


MOMENTS = ("exp_avg", "exp_avg_sq")
MEASURED = {"set/1": Measurement(np.array([1.5, 2.25]), [0.5, 0.25], [0.125, 3.0])}
COMPARISON = Comparison("set/1", 1.0, 2.0, 0.1, 0.05, 0.15, 0.2, 0.1, 0.3, 0.4, False, "")


def snapshot(step: int, in_phase: bool = True) -> Snapshot:
    start = GoodState(0, engine(0, 1), MEASURED, [COMPARISON], "000_a_start.safetensors", "ab")
    good = GoodState(4, engine(4, 2), MEASURED, [], "000_a_good_step000000004.safetensors", None)
    progress = PhaseProgress(step, start, good, [1, 2, 3, 4], [7, 8], (6, {"x": reading(math.inf)}), 2, 0.25)
    return Snapshot(
        step=step,
        phase_index=1,
        first_step=3,
        engine=engine(5, 3),
        phase=progress if in_phase else None,
        events=17,
        head="c0ffee",
        parent=None,
        identity={"seed": 1},
        digests={"replay.base": ["d"]},
        replay=["000_a"],
        quarantine=[ShardFault("d", 3, "http://x/y", "torn", 12)],
        committed=MEASURED,
        first={},
        buffers={"00.channels": torch.tensor([0.5, 3.0])},
        random=random_state(torch.device("cpu")),
    )


def same(one: EngineState, other: EngineState) -> bool:
    parts = [(one.master, other.master), *((one.moments[key], other.moments[key]) for key in MOMENTS)]
    return one.step == other.step and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in parts
    )


def test_all_of_it_comes_back(tmp_path: Path) -> None:
    written = snapshot(8)
    (tmp_path / written.name).write_bytes(written.pack())
    read = Snapshot.read(tmp_path / written.name)
    assert read.phase is not None and written.phase is not None
    assert same(read.engine, written.engine)
    for one, other in ((read.phase.start, written.phase.start), (read.phase.good, written.phase.good)):
        assert same(one.engine, other.engine)
        assert (one.step, one.entry, one.sha256, one.comparisons) == (
            other.step,
            other.entry,
            other.sha256,
            other.comparisons,
        )
        assert one.measurements["set/1"].losses.tolist() == [1.5, 2.25]
        assert one.measurements["set/1"].gates == [0.5, 0.25]
    plain = ("learned", "pending", "rollbacks", "lr_factor", "step")
    assert [getattr(read.phase, key) for key in plain] == [getattr(written.phase, key) for key in plain]
    assert read.phase.probed == written.phase.probed and read.phase.probed[1]["x"].loss == math.inf
    for key in ("step", "phase_index", "first_step", "events", "head", "parent", "identity", "digests", "replay"):
        assert getattr(read, key) == getattr(written, key)
    assert read.quarantine == written.quarantine
    assert read.first == {} and read.committed["set/1"].changes == [0.125, 3.0]
    assert torch.equal(read.random["cpu"], written.random["cpu"])


def test_only_whole_ones_are_believed_newest_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_snapshot(tmp_path / "none") is None
    for one in (snapshot(8), snapshot(12), snapshot(12, in_phase=False)):
        (tmp_path / one.name).write_bytes(one.pack())
    found = newest_snapshot(tmp_path)
    assert found is not None and found.phase is None and found.name == "step000000000012_end.safetensors"
    (tmp_path / found.name).write_bytes(snapshot(12).pack()[:1000])
    (tmp_path / "step000000000012.safetensors").write_bytes(serialise({}, {"kind": "commit"}))
    found = newest_snapshot(tmp_path)
    assert found is not None and found.step == 8
    assert (
        "step000000000012_end.safetensors can't be used" in caplog.text
        and "step000000000012.safetensors can't be used" in caplog.text
    )
    assert sorted(path.name for path in tmp_path.glob("*.damaged")) == [
        "step000000000012.safetensors.damaged",
        "step000000000012_end.safetensors.damaged",
    ]


def test_where_none_can_be_read_a_run_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (8, 12):
        (tmp_path / f"step{step:012d}.safetensors").write_bytes(snapshot(step).pack()[:1000])
    for _ in range(2):  # nor at the second try
        with pytest.raises(
            ConfigError, match=r"found damaged ones alone .*12\.safetensors\.damaged.*--fresh --overwrite"
        ):
            newest_snapshot(tmp_path)
    (tmp_path / "step000000000004.safetensors").write_bytes(snapshot(4).pack())
    found = newest_snapshot(tmp_path)
    assert found is not None and found.step == 4
    monkeypatch.setattr("revpatch.train.snapshot.VERSION", 3)
    with pytest.raises(
        ConfigError, match="expected a snapshot of version 3, found 2: resume it with the revpatch that wrote"
    ):
        newest_snapshot(tmp_path)
    assert (tmp_path / "step000000000004.safetensors").exists(), "the revpatch that wrote it finds it"


def test_names_sort_by_age_and_older_ones_go(tmp_path: Path) -> None:
    """Also where a signal comes before the first step of the next phase. The newest two are kept."""
    (tmp_path / ".step000000000003.safetensors.ab.tmp").write_bytes(b"half")
    started = snapshot(12)
    assert started.phase is not None
    started.phase.step = 0
    writer = SnapshotWriter(tmp_path)
    for one in (snapshot(12), snapshot(12, in_phase=False), started):
        writer.write(one)
        writer.finish()
        found = newest_snapshot(tmp_path)
        assert found is not None and found.name == one.name
        assert max(path.name for path in tmp_path.iterdir()) == one.name
    assert len(list(tmp_path.iterdir())) == 2


def test_writing_does_not_hold_up_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from revpatch.train import snapshot as module

    go_on, write = threading.Event(), module.write_atomically

    def slowly(path: Path, data: bytes) -> None:
        assert go_on.wait(20)
        write(path, data)

    monkeypatch.setattr(module, "write_atomically", slowly)
    writer = SnapshotWriter(tmp_path)
    writer.write(snapshot(4))
    assert not list(tmp_path.iterdir()), "the caller is back before anything is on the disk"
    go_on.set()
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step000000000004.safetensors"]


def test_what_goes_wrong_is_raised_at_the_next_chance_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without snapshots must not think that it has them; errors of any kind are heard."""
    (tmp_path / "snapshot").write_text("a file where the folder should be")
    writer = SnapshotWriter(tmp_path / "snapshot")
    writer.write(snapshot(4))
    with pytest.raises(OSError, match="snapshot"):
        writer.write(snapshot(8))
    writer.finish()
    monkeypatch.setattr(Snapshot, "pack", lambda self: (_ for _ in ()).throw(MemoryError("no room")))
    writer = SnapshotWriter(tmp_path)
    writer.write(snapshot(4))
    with pytest.raises(MemoryError):
        writer.finish()
