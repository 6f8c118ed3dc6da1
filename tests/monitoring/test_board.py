"""The board: what TensorBoard reads back is what was written, and nothing else shows."""

import math
import os
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from revpatch.monitoring.board import Board


def read_back(directory):
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def points(accumulator, tag):
    return [(point.step, point.value) for point in accumulator.Scalars(tag)]


def test_scalars_are_read_back_at_their_steps(tmp_path):
    with Board(tmp_path / "run" / "tensorboard") as board:
        for step in (0, 20, 40):
            board.scalars(step, {"objective/total": 4.0 - step / 100, "optimizer/lr": step * 1e-4})
    read = read_back(tmp_path / "run" / "tensorboard")
    assert points(read, "objective/total") == [
        (0, pytest.approx(4.0)),
        (20, pytest.approx(3.8)),
        (40, pytest.approx(3.6)),
    ]
    assert [value for _, value in points(read, "optimizer/lr")] == pytest.approx([0.0, 2e-3, 4e-3])


def test_a_probe_is_shown_against_its_reference_and_its_limit(tmp_path):
    with Board(tmp_path) as board:
        board.probe(500, "base", loss=3.42, reference=3.40, tolerance=0.03)
    read = read_back(tmp_path)
    values = {key: points(read, f"probe/base/{key}") for key in ("loss", "reference", "limit", "rise")}
    assert values == {
        "loss": [(500, pytest.approx(3.42))],
        "reference": [(500, pytest.approx(3.40))],
        "limit": [(500, pytest.approx(3.43))],
        "rise": [(500, pytest.approx(0.02))],
    }


def test_every_layer_has_its_own_chart(tmp_path):
    with Board(tmp_path) as board:
        board.layers(7, {"gate": {layer: 0.1 * layer for layer in range(11)}, "patch_norm": {7: 2.5}})
    read = read_back(tmp_path)
    tags = [f"gate/layer_{layer:02d}" for layer in range(11)]
    assert sorted(read.Tags()["scalars"]) == [*tags, "patch_norm/layer_07"]
    assert [points(read, tag) for tag in tags] == [[(7, pytest.approx(0.1 * layer))] for layer in range(11)]


def test_text_and_numbers_that_are_not_finite(tmp_path):
    with Board(tmp_path) as board:
        board.text(1000, "event/rollback", "**base** rose by 0.1 nats")
        board.scalars(1000, {"objective/total": math.nan, "objective/replay": math.inf})
    read = read_back(tmp_path)
    (event,) = read.Tensors("event/rollback/text_summary")
    assert (event.step, event.tensor_proto.string_val[0]) == (1000, b"**base** rose by 0.1 nats")
    assert math.isnan(points(read, "objective/total")[0][1])
    assert points(read, "objective/replay") == [(1000, math.inf)]


def test_after_a_resume_the_lost_steps_are_hidden(tmp_path):
    with Board(tmp_path) as board:
        for step in (10, 20, 30):
            board.scalars(step, {"loss": 1.0})
    with Board(tmp_path, purge_step=20) as board:
        board.scalars(20, {"loss": 2.0})
    assert points(read_back(tmp_path), "loss") == [(10, 1.0), (20, 2.0)]


def test_a_disabled_board_does_nothing(tmp_path):
    with Board(tmp_path / "tensorboard", enabled=False) as board:
        board.scalars(0, {"loss": 1.0})
        board.probe(0, "base", 1.0, 1.0, 0.1)
        board.layers(0, {"gate": {0: 1.0}})
        board.text(0, "event/commit", "done")
        board.close()
    assert not (tmp_path / "tensorboard").exists()


def test_importing_is_lazy_and_nothing_is_heard_of_tensorflow(tmp_path):
    noisy = tmp_path / "site" / "tensorflow"
    noisy.mkdir(parents=True)
    (noisy / "__init__.py").write_text("import sys; print('oneDNN custom operations are on', file=sys.stderr)")
    code = (
        "import sys; from pathlib import Path; from revpatch.monitoring.board import Board\n"
        "assert not any(name.split('.')[0] == 'tensorboard' for name in sys.modules)\n"
        "board = Board(Path(sys.argv[1])); board.scalars(0, {'loss': 1.0}); board.text(0, 'a', 'b'); board.close()\n"
        "assert 'tensorflow' not in sys.modules"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "board")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert points(read_back(tmp_path / "board"), "loss") == [(0, 1.0)]
