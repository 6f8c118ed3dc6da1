"""The board: what TensorBoard reads back is what was written, and nothing else shows."""

import io
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from revpatch.config.file import load_config
from revpatch.monitoring.tensorboard import (
    MAX_COLUMNS,
    TITLE_HEIGHT,
    Board,
    HeatMap,
    colours,
    hyperparameters,
    layout_of,
)


def read_back(directory):
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def points(accumulator, tag):
    return [(point.step, pytest.approx(point.value, nan_ok=True)) for point in accumulator.Scalars(tag)]


PROBED = {"loss": 3.42, "reference": 3.40, "before": 3.41, "tolerance": 0.03, "gate": 0.1, "patch_norm": 2.0}


def test_numbers_and_texts_are_read_back_at_their_steps(tmp_path):
    with Board(tmp_path / "run/tensorboard") as board:
        for step in (0, 20, 40):
            board.scalars(step, {"loss/lm": 4.0 - step / 100, "optimizer/lr": step * 1e-4})
        board.scalars(40, {"loss/loss": math.nan, "loss/replay": math.inf})
        board.text(40, "event/quarantine", "one")
        board.text(40, "event/quarantine", "two")
        board.gates(30, "new", {3: [0.75, 0.0, 0.0, 0.25]})
    read = read_back(tmp_path / "run/tensorboard")
    assert points(read, "loss/lm") == [(0, 4.0), (20, 3.8), (40, 3.6)]
    assert points(read, "optimizer/lr") == [(0, 0.0), (20, 2e-3), (40, 4e-3)]
    assert points(read, "loss/loss") == [(40, math.nan)] and points(read, "loss/replay") == [(40, math.inf)]
    event = read.Tensors("event/quarantine/text_summary")[-1]
    assert (event.step, event.tensor_proto.string_val[0]) == (40, b"one\n\ntwo"), "TensorBoard keeps the last"
    (event,) = read.Histograms("gates_on_new/layer_03")
    assert (event.step, event.histogram_value.bucket) == (30, [0.75, 0.0, 0.0, 0.25])
    assert event.histogram_value.bucket_limit == [0.25, 0.5, 0.75, 1.0]


def test_a_probe_is_shown_against_its_reference_its_phase_and_its_limits(tmp_path):
    with Board(tmp_path) as board:
        board.probe(500, "base", {**PROBED, "guarded": True, "sparsity": 0.9})
        board.probe(500, "new", {**PROBED, "guarded": False, "sparsity": None})
    expected = {"loss": 3.42, "gate": 0.1, "patch_norm": 2.0}
    more = {"reference": 3.40, "rise": 0.02, "sparsity": 0.9}
    tags = {f"probe/base/{key}": value for key, value in {**expected, **more}.items()}
    tags |= {f"probe/new/{key}": value for key, value in expected.items()}
    # Those are runs of their own, as TensorBoard colours by run.
    beside = {
        "phase_start": {"probe/base/phase_start": 3.41, "probe/new/phase_start": 3.41},
        "limit": {"probe/base/limit": 3.43},
        "commit_limit": {"probe/base/commit_limit": 3.44},
    }
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == beside.keys()
    for folder, values in {".": tags, **beside}.items():
        read = read_back(tmp_path / folder)
        assert sorted(read.Tags()["scalars"]) == sorted(values)
        assert all(points(read, tag) == [(500, value)] for tag, value in values.items())


def test_a_mark_is_a_line_over_what_the_chart_shows_with_one_point_a_step(tmp_path):
    with Board(tmp_path) as board:
        board.mark(10, "commit")
        board.probe(20, "new", {**PROBED, "loss": 5.0, "guarded": False})
        board.probe(40, "new", {**PROBED, "loss": 3.0, "guarded": False})
        board.has_shown("old", [4.0])  # by an earlier process
        board.has_shown("broken", [math.nan])
        board.mark(40, "rollback")
    assert not (tmp_path / "commit").exists(), "there was no chart yet"
    read = read_back(tmp_path / "rollback")
    marks = [tag for tag in read.Tags()["scalars"] if tag.startswith("mark/")]
    assert marks == ["mark/new/rollback", "mark/old/rollback"]
    assert points(read, "mark/new/rollback") == [(38, 3.0), (39, 5.0), (40, math.nan)]
    assert points(read, "mark/old/rollback") == [(38, 3.95), (39, 4.05), (40, math.nan)]


def test_layers_have_charts_and_a_picture_over_steps(tmp_path):
    with Board(tmp_path) as board:
        for step in (10, 20, 30):
            board.layers(step, {"gate": {0: 0.0, 11: step / 30}})
        board.heat_maps(30)
    read = read_back(tmp_path)
    assert sorted(read.Tags()["scalars"]) == ["gate/layer_00", "gate/layer_11", "gate/mean"]
    assert points(read, "gate/mean") == [(10, 1 / 6), (20, 1 / 3), (30, 1 / 2)]
    (image,) = read.Images("gate/layer_by_step")
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))[TITLE_HEIGHT:]
    row, column = pixels.shape[0] // 2, pixels.shape[1] // 3
    assert (pixels[:row] == colours(np.array(0.0))).all(), "the first layer, above"
    for number, step in enumerate((10, 20, 30)):
        assert (pixels[row:, number * column : (number + 1) * column] == colours(np.array(step / 30))).all()
    heat = HeatMap()
    for step in range(10 * MAX_COLUMNS):
        heat.add(step, [0.0, step])
    assert MAX_COLUMNS / 2 <= heat.grid().shape[1] <= MAX_COLUMNS
    assert np.isclose(heat.grid()[1].mean(), 5 * MAX_COLUMNS, rtol=0.02)


def test_the_page_of_charts_and_the_hyperparameters_are_kept(tmp_path, toy):
    config = toy.config(tmp_path)
    with Board(tmp_path / "board") as board:
        board.introduce(layout_of(config, 1.0), hyperparameters(config, {"ranks": 2, "device": "cpu"}), ["loss/lm"])
        board.finished()
    (event,) = read_back(tmp_path / "board").Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in page.category for chart in category.chart}
    assert [category.title[:2] for category in page.category] == ["1.", "2.", "3.", "4."]
    assert "^mark/first/rollback$" in next(tags for title, tags in charts.items() if title.startswith("first:"))
    assert charts["share of peak"] == ["^speed/share_of_peak$"]
    found = {}
    for event in EventFileLoader(next(str(path) for path in (tmp_path / "board").iterdir())).Load():
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "hparams":
                found[value.tag] = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
    given = found["_hparams_/session_start_info"].session_start_info.hparams
    assert (given["optimizer.lr"].number_value, given["ranks"].number_value) == (0.01, 2)
    assert given["phases"].string_value == "first 12, second 12"
    assert found["_hparams_/session_end_info"].session_end_info.status == api_pb2.STATUS_SUCCESS


def test_after_a_resume_the_lost_steps_are_hidden_and_a_text_says_so(tmp_path):
    with Board(tmp_path) as board:
        for step in (10, 20, 30):
            board.scalars(step, {"loss": 1.0, "probe/base/limit": 3.0})
    for file in tmp_path.rglob("events.out.*"):
        file.rename(file.with_name("events.out.tfevents.0000000001"))  # the files are read in the order of their names
    with Board(tmp_path, purge_step=20) as board:
        board.scalars(20, {"loss": 2.0, "probe/base/limit": 4.0})
    read = read_back(tmp_path)
    assert points(read, "loss") == [(10, 1.0), (20, 2.0)]
    assert points(read_back(tmp_path / "limit"), "probe/base/limit") == [(10, 3.0), (20, 4.0)]
    (event,) = read.Tensors("event/resume/text_summary")
    assert event.step == 20 and b"undone" in event.tensor_proto.string_val[0]


def test_a_disabled_board_does_nothing_and_importing_is_lazy(tmp_path):
    """Nor is anything heard of a TensorFlow that is installed."""
    noisy = tmp_path / "site" / "tensorflow"
    noisy.mkdir(parents=True)
    (noisy / "__init__.py").write_text("import sys; print('oneDNN custom operations are on', file=sys.stderr)")
    code = (
        "import sys; from pathlib import Path; from revpatch.monitoring.tensorboard import Board\n"
        "off, on = (Path(place) for place in sys.argv[1:])\n"
        "with Board(off, enabled=False, purge_step=3) as board:\n"
        f"    board.scalars(0, {{'loss': 1.0}}); board.probe(0, 'base', { ({**PROBED, 'guarded': True})!r})\n"
        "    board.gates(0, 'base', {0: [1.0]}); board.layers(0, {'gate': {0: 1.0}}); board.heat_maps(0)\n"
        "    board.mark(0, 'commit'); board.text(0, 'a', 'b'); board.introduce({}, {}, []); board.finished()\n"
        "assert not off.exists()\n"
        "assert not any(name.split('.')[0] == 'tensorboard' for name in sys.modules)\n"
        "with Board(on) as board: board.scalars(0, {'loss': 1.0}); board.text(0, 'a', 'b')\n"
        "assert 'tensorflow' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    folders = [str(tmp_path / name) for name in ("off", "on")]
    process = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, env=env)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert points(read_back(tmp_path / "on"), "loss") == [(0, 1.0)]


def test_every_chart_of_the_page_has_its_numbers(tmp_path, toy, server):
    watched = {"tensorboard": True, "samples": {"max_new_tokens": 1}}
    file = toy.config_file(tmp_path, monitoring=watched)
    log = tmp_path / "log"
    assert server.run("train", file, output=log, world=2, harm=[[0, 6]]) == [0, 0], log.read_text()
    board = tmp_path / "run/tensorboard"
    folders = [board, *(path for path in board.iterdir() if path.is_dir())]
    written = [tag for folder in folders for tag in read_back(folder).Tags()["scalars"]]
    charts = [chart for category in layout_of(load_config(file), None).values() for chart in category.values()]
    patterns = [pattern for _, patterns in charts for pattern in patterns]
    empty = [pattern for pattern in patterns if not any(re.match(pattern, tag) for tag in written)]
    may_be = [pattern for pattern in patterns if "quarantine" in pattern or "cache_hit_rate" in pattern]
    assert [pattern for pattern in empty if pattern not in may_be and "limit" not in pattern] == []
    limits = [pattern for pattern in empty if "limit" in pattern]
    assert all("/second/" in pattern for pattern in limits), "the last corpus is never guarded"
    assert {f"sparsity_on_first/layer_{layer:02d}" for layer in (0, 1)} <= set(written)
