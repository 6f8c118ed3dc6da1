"""Raw text named where shards belong: built once by rank 0, and trained on by all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import Runs, RunServer
from toy import BLOCK_SIZE, CORPORA, Toy, make_text
from waiting import until

from revpatch.config import ConfigError
from revpatch.corpus.build import build_shards
from revpatch.shards.format import Manifest
from revpatch.shards.shard_set import ShardSet
from revpatch.train import first_use


def write(path: Path, words: str, documents: int = 60) -> Path:
    lines = (json.dumps({"body": make_text(i, CORPORA[words])}) + "\n" for i in range(documents))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def raw_runs(toy: Toy, server: RunServer, tmp_path: Path, **changes: Any) -> Runs:
    source = write(tmp_path / "new #1.jsonl", "first")
    settings: dict[str, Any] = {
        "phases": [{"name": "first", "shards": str(source), "steps": 3}],
        "probes": {"every": 3, "sets": [{"name": "new", "shards": str(source), "tolerance": 0.5}]},
        "build": {"folder": str(tmp_path / "built"), "text_column": "body", "holdout": 0.3},
    }
    return Runs(server, toy.config_file(tmp_path, **{**settings, **changes}), tmp_path)


def test_a_phase_and_its_probe_get_the_two_sides_of_one_source(toy: Toy, server: RunServer, tmp_path: Path) -> None:
    runs = raw_runs(toy, server, tmp_path)
    assert runs.run("one") == [0, 0], runs.log("one").read_text()
    words = runs.log("one").read_text()
    assert words.count("building the shards of") == 1 and "1 other ranks wait, at most 30 minutes" in words
    train, probe = sorted((tmp_path / "built").iterdir())
    assert probe.name == f"{train.name}_probe"
    build_shards(
        [tmp_path / "new #1.jsonl"], toy.tokenizer, BLOCK_SIZE, tmp_path / "by_hand", text_column="body", holdout=0.3
    )
    assert Manifest.read(train).shards == Manifest.read(tmp_path / "by_hand").shards
    assert Manifest.read(probe).shards == Manifest.read(tmp_path / "by_hand_probe").shards

    assert runs.run("two") == [0, 0]
    assert "building" not in runs.log("two").read_text(), "they are there"
    assert runs.commits("two") == runs.commits("one")
    write(tmp_path / "new #1.jsonl", "second")
    assert runs.run("three", world=1) == [0]
    assert "building the shards of" in runs.log("three").read_text(), "another text under the name"
    assert len(list((tmp_path / "built").iterdir())) == 4


def test_a_local_data_set_and_a_mixture(toy: Toy, server: RunServer, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set/train.jsonl", "second")
    parts = [{"shards": f"hf:{tmp_path}/set:train#body", "weight": 2}, {"shards": str(toy.shards("first"))}]
    phases = [{"name": "both", "shards": parts, "steps": 3}]
    probes = {"every": 6, "sets": [{"name": "base", "shards": str(toy.shards("base_probe")), "max_blocks": 8}]}
    runs = raw_runs(toy, server, tmp_path, phases=phases, probes=probes)
    assert runs.run("one", world=1) == [0], runs.log("one").read_text()
    sample = ShardSet(runs.path("one") / "replay/000_both")
    text = toy.tokenizer.decode(sample.read(np.arange(len(sample))).ravel().tolist())
    assert "rusty" in text or "backwards" in text


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("sidecar.layers=[9]", ["sidecar.layers"]),
        ("build.text_column=text", ["new #1.jsonl:1", "expected the field 'text'"]),
        ("build.holdout=0", ["named by phases.0.shards, probes.sets.0.shards", "build.holdout"]),
    ],
)
def test_what_goes_wrong_is_said_and_stops_all_ranks(
    toy: Toy, server: RunServer, tmp_path: Path, option: str, words: list[str]
) -> None:
    runs = raw_runs(toy, server, tmp_path)
    assert runs.run("run", "--set", option) == [2, 2]
    assert all(word in runs.log("run").read_text() for word in words)
    assert not runs.path("run").exists()
    if option.startswith("sidecar"):
        assert not (tmp_path / "built").exists(), "a config that can't work is refused before anything is built"


def test_a_committed_phase_needs_its_raw_source_no_more(toy: Toy, server: RunServer, tmp_path: Path) -> None:
    source = tmp_path / "new #1.jsonl"
    probes = {"every": 6, "sets": [{"name": "base", "shards": str(toy.shards("base_probe")), "max_blocks": 8}]}
    phases = [{"name": name, "shards": str(source), "steps": 3} for name in ("first", "second")]
    phases[1]["shards"] = str(write(tmp_path / "second.jsonl", "second"))
    runs = raw_runs(toy, server, tmp_path, phases=phases, probes=probes, snapshot={"every": 2})
    killed = {"rank": 0, "target": "revpatch.train.trainer:write_replay", "when": "before"}
    assert -9 in runs.run("run", world=1, kill={**killed, "call": 2}), runs.log("run").read_text()
    (tmp_path / "second.jsonl").rename(tmp_path / "aside.jsonl")
    assert runs.run("run", world=1) == [2]
    words = runs.log("run").read_text()
    assert f"phases.1.shards = {tmp_path}/second.jsonl: " in words and "no such file" in words
    (tmp_path / "aside.jsonl").rename(tmp_path / "second.jsonl")
    source.unlink()
    assert runs.run("run", world=1) == [0], runs.log("run").read_text()
    assert runs.run("new", world=1) == [2]
    assert f"phases.0.shards = {source}: " in runs.log("new").read_text()


@pytest.mark.slow
def test_ranks_that_wait_longer_than_the_time_out_say_for_what(toy: Toy, server: RunServer, tmp_path: Path) -> None:
    runs = raw_runs(toy, server, tmp_path)
    slow = {"target": "revpatch.train.first_use:_build_all", "call": 1}
    runs.start("run", "--set", "engine.timeout_minutes=0.05", wait_at=slow)
    words = "rank 1 waited for rank 0 to build the shards of"
    until(lambda: words in runs.log("run").read_text(), runs.log("run").read_text)
    runs.log("run").with_name("run.log.waiting").unlink()
    assert 0 not in server.wait()
    assert "engine.timeout_minutes = 0.05" in runs.log("run").read_text()


def test_a_run_waits_for_another_that_builds_the_same(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calls = write(tmp_path / "new.jsonl", "first"), []

    def build(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) < 3:
            raise BlockingIOError("another build into this folder is at work")
        return build_shards(*args, **options)

    monkeypatch.setattr(first_use, "build_shards", build)
    monkeypatch.setattr(first_use, "_POLL_SECONDS", 0.01)
    probes = {"sets": [{"name": "base", "shards": str(toy.shards("base_probe"))}]}
    phases = [{"name": "first", "shards": str(source), "steps": 6}]
    settings = {"folder": str(tmp_path / "built"), "text_column": "body"}
    config = toy.config(tmp_path, phases=phases, probes=probes, build=settings)
    folders = first_use._build_all(config, world=1)
    assert Manifest.read(folders["phases.0.shards"]).blocks and len(calls) == 3
    source.write_text("no json\n")
    with pytest.raises(
        ConfigError, match=r"phases\.0\.shards = .*new\.jsonl: .*new\.jsonl:1: expected one JSON object"
    ):
        first_use._build_all(config, world=1)
    calls.clear()
    late = config.model_copy(update={"engine": config.engine.model_copy(update={"timeout_minutes": 1e-9})})
    write(source, "second")
    with pytest.raises(ConfigError, match=r"phases\.0\.shards = .*another build into this folder is at work"):
        first_use._build_all(late, world=1)
