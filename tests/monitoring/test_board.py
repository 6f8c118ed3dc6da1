"""The board: what TensorBoard reads back is what was written, and nothing else shows."""

import io
import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from pages import tensorboard, tensorboard_as_told
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from waiting import until

from revpatch.config.file import load_config
from revpatch.monitoring.tensorboard import (
    MARKS,
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


PROBED = {"loss": 3.42, "reference": 3.40, "before": 3.41, "tolerance": 0.03, "gate": 0.1, "patch_norm": 2.0}


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
        assert all(points(read, tag) == [(500, pytest.approx(value))] for tag, value in values.items())


def test_a_mark_is_a_line_over_what_the_chart_shows_with_one_point_a_step(tmp_path):
    with Board(tmp_path) as board:
        board.mark(10, "commit")
        board.probe(20, "new", {**PROBED, "loss": 5.0, "guarded": False})
        board.probe(40, "new", {**PROBED, "loss": 3.0, "guarded": False})
        board.mark(40, "rollback")
    assert not (tmp_path / "commit").exists()
    read = read_back(tmp_path / "rollback")
    assert [tag for tag in read.Tags()["scalars"] if tag.startswith("mark/")] == ["mark/new/rollback"]
    low, high, end = points(read, "mark/new/rollback")
    assert (low, high) == ((38, 3.0), (39, 5.0))
    assert (end[0], math.isnan(end[1])) == (40, True)


def test_a_mark_is_seen_in_a_chart_that_this_process_has_not_drawn_yet(tmp_path):
    with Board(tmp_path) as board:
        board.has_shown("new", [3.0])
        board.has_shown("old", [math.nan])
        board.mark(40, "quarantine")
    read = read_back(tmp_path / "quarantine")
    assert [tag for tag in read.Tags()["scalars"] if tag.startswith("mark/")] == ["mark/new/quarantine"]
    low, high, _ = points(read, "mark/new/quarantine")
    assert low[1] < 3.0 < high[1]


def test_gates_are_histograms_whose_buckets_hold_the_shares(tmp_path):
    with Board(tmp_path) as board:
        board.gates(30, "new", {3: [0.75, 0.0, 0.0, 0.25]})
    (event,) = read_back(tmp_path).Histograms("gates_on_new/layer_03")
    assert (event.step, event.histogram_value.bucket) == (30, [0.75, 0.0, 0.0, 0.25])
    assert event.histogram_value.bucket_limit == [0.25, 0.5, 0.75, 1.0]


def test_layers_are_drawn_over_steps(tmp_path):
    with Board(tmp_path) as board:
        for step in (10, 20, 30):
            board.layers(step, {"gate": {0: 0.0, 1: step / 30}})
        board.heat_maps(30)
    read = read_back(tmp_path)
    (image,) = read.Images("gate/layer_by_step")
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))[TITLE_HEIGHT:]
    row, column = pixels.shape[0] // 2, pixels.shape[1] // 3
    assert (pixels[:row] == colours(np.array(0.0))).all(), "the first layer, above"
    for number, step in enumerate((10, 20, 30)):
        assert (pixels[row:, number * column : (number + 1) * column] == colours(np.array(step / 30))).all()


def test_a_long_run_has_a_picture_of_bounded_width():
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
    read = read_back(tmp_path / "board")
    (event,) = read.Tensors("custom_scalars__config__")
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


def test_every_layer_has_its_own_chart(tmp_path):
    with Board(tmp_path) as board:
        board.layers(7, {"gate": {layer: 0.1 * layer for layer in range(11)}, "patch_norm": {7: 2.5}})
    read = read_back(tmp_path)
    tags = [f"gate/layer_{layer:02d}" for layer in range(11)]
    assert sorted(read.Tags()["scalars"]) == [*tags, "gate/mean", "patch_norm/layer_07", "patch_norm/mean"]
    assert points(read, "gate/mean") == [(7, pytest.approx(0.5))]
    assert [points(read, tag) for tag in tags] == [[(7, pytest.approx(0.1 * layer))] for layer in range(11)]


def test_text_and_numbers_that_are_not_finite(tmp_path):
    with Board(tmp_path) as board:
        board.text(1000, "event/rollback", "**base** rose by 0.1 nats")
        board.text(1001, "event/quarantine", "one")
        board.text(1001, "event/quarantine", "two")
        board.scalars(1000, {"objective/total": math.nan, "objective/replay": math.inf})
    read = read_back(tmp_path)
    (event,) = read.Tensors("event/rollback/text_summary")
    assert (event.step, event.tensor_proto.string_val[0]) == (1000, b"**base** rose by 0.1 nats")
    event = read.Tensors("event/quarantine/text_summary")[-1]
    assert (event.step, event.tensor_proto.string_val[0]) == (1001, b"one\n\ntwo"), "TensorBoard keeps the last"
    assert math.isnan(points(read, "objective/total")[0][1])
    assert points(read, "objective/replay") == [(1000, math.inf)]


def test_after_a_resume_the_lost_steps_are_hidden(tmp_path):
    with Board(tmp_path) as board:
        for step in (10, 20, 30):
            board.scalars(step, {"loss": 1.0, "probe/base/limit": 3.0})
    time.sleep(1.1)  # the files are read in the order of their names, which have the second
    with Board(tmp_path, purge_step=20) as board:
        board.scalars(20, {"loss": 2.0})
    assert points(read_back(tmp_path), "loss") == [(10, 1.0), (20, 2.0)]
    assert points(read_back(tmp_path / "limit"), "probe/base/limit") == [(10, 3.0)]


@contextmanager
def asked(folder, logs):
    """What a TensorBoard that was started answers, once it has read the folder: by plugin, run and tag."""
    with tensorboard(tensorboard_as_told(folder), logs) as address:

        def data(path):
            try:
                with urllib.request.urlopen(f"{address}data/{path}", timeout=10) as answer:
                    return json.load(answer)
            except OSError:
                return None

        until(lambda: data("runs"), (logs / "tensorboard.log").read_text)
        yield lambda plugin, run, tag: data(f"plugin/{plugin}?run={run}&tag={urllib.parse.quote(tag)}")


def test_after_a_resume_tensorboard_shows_no_event_that_was_undone(tmp_path):
    run = tmp_path / "runs/one"
    with Board(tmp_path / "runs/long") as board:
        for step in range(120):
            board.text(step, "event/quarantine", "a shard")
    with Board(run) as board:
        board.probe(20, "base", {**PROBED, "guarded": True})
        for step, kind in ((20, "commit"), (30, "commit"), (23, "rollback"), (20, "quarantine"), (25, "interrupted")):
            board.text(step, f"event/{kind}", f"{kind} at {step}")
            if kind in MARKS:
                board.mark(step, kind)
    with next(run.glob("events*")).open("ab") as file:
        file.write(b"\x30\0\0")  # as of a process that was killed
    time.sleep(1.1)
    with Board(run, purge_step=21) as board:
        board.text(21, "event/interrupted", "again")
    with asked(tmp_path / "runs", tmp_path) as answer:

        def mark(kind):
            found = answer("scalars/scalars", f"one/{kind}", f"mark/base/{kind}")
            return [(step, value if value == "NaN" else round(value, 2)) for _, step, value in found]

        def texts(kind):
            found = answer("text/text", "one", f"event/{kind}/text_summary")
            return [(each["step"], re.sub("<.*?>|\n", " ", each["text"]).split()) for each in found]

        undone = ["went", "on", "from", "here;", "what", "came", "later", "was", "undone"]
        kept = [(18, 3.4), (19, 3.44), (20, "NaN")]
        assert mark("commit") == kept
        assert mark("quarantine") == kept
        assert mark("rollback") == [(20, "NaN")], "it was the first one, and cut off where it began"
        assert texts("commit") == [(20, ["commit", "at", "20"]), (21, undone)]
        assert texts("rollback") == [(21, undone)]
        assert texts("quarantine") == [(20, ["quarantine", "at", "20"])], "nothing of it was undone"
        assert texts("interrupted") == [(21, [*undone, "again"])], "it has happened again"
        assert len(answer("text/text", "long", "event/quarantine/text_summary")) == 120, "none is thinned out"
    again = tmp_path / "again"
    with Board(again) as board:
        board.text(3, "event/rollback", "one")
    with Board(again, purge_step=9):
        pass
    assert len(read_back(again).Tensors("event/rollback/text_summary")) == 1


def test_a_disabled_board_does_nothing(tmp_path):
    with Board(tmp_path / "tensorboard", enabled=False) as board:
        board.scalars(0, {"loss": 1.0})
        board.probe(0, "base", {**PROBED, "guarded": True})
        board.gates(0, "base", {0: [1.0]})
        board.mark(0, "commit")
        board.heat_maps(0)
        board.introduce({}, {}, [])
        board.finished()
        board.layers(0, {"gate": {0: 1.0}})
        board.text(0, "event/commit", "done")
        board.close()
    assert not (tmp_path / "tensorboard").exists()


def test_importing_is_lazy_and_nothing_is_heard_of_tensorflow(tmp_path):
    noisy = tmp_path / "site" / "tensorflow"
    noisy.mkdir(parents=True)
    (noisy / "__init__.py").write_text("import sys; print('oneDNN custom operations are on', file=sys.stderr)")
    code = (
        "import sys; from pathlib import Path; from revpatch.monitoring.tensorboard import Board\n"
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
