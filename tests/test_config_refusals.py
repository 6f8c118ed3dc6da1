"""What a config refuses, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_files import MINIMAL, merged, refusal, refusal_of, write

from revpatch.config.file import load_config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr", ["--set 'optimizer.lr'", "section.key=value"]),
        ("=3", ["--set '=3'", "section.key=value"]),
        ("phases.5.steps=3", ["--set", "'5'", "list of 2", "0 to 1"]),
        ("phases.-1.steps=3", ["--set", "'-1'", "0 to 1"]),
        ("phases.first.steps=3", ["--set", "'first'", "0 to 1"]),
        ("phases.2={}", ["--set", "'2'", "0 to 1"]),
        ("base.model.name=3", ["--set", "'name'", "single value"]),
        ("base.model.name.more=3", ["--set", "single value"]),
        ("optimizer.lr=[1", ["--set", "not YAML"]),
        ("optimizer.lr=2024-13-45", ["optimizer.lr", "not YAML"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "str"]),
        ("optimizer.rate=1e-3", ["optimizer.rate", "no such key"]),
        ("stream.retries=3", ["stream.retries", "no such key"]),
        ("build.workers=3", ["build.workers", "no such key"]),
        ("optimizer..lr=1e-3", ["optimizer", "no such key"]),
    ],
)
def test_a_wrong_set_is_refused_in_words(tmp_path: Path, override: str, words: list[str]) -> None:
    message = refusal(tmp_path, MINIMAL, [override])
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (merged(sidecar={"botleneck": 8}), ["sidecar.botleneck", "no such key", "spelling"]),
        (merged(optimiser={"lr": 1e-3}), ["optimiser", "no such key"]),
        ({key: value for key, value in MINIMAL.items() if key != "phases"}, ["phases", "missing"]),
        (merged(base={"model": None}), ["base.model", "None"]),
        (merged(base={"block_size": "128"}), ["base.block_size", "'128'", "str"]),
        (merged(base={"block_size": 128.0}), ["base.block_size", "128.0", "float"]),
        (merged(base={"compile": 1}), ["base.compile", "1", "int"]),
        (merged(seed=True), ["seed", "True", "bool"]),
        (merged(seed=-1), ["seed", "-1"]),
        (merged(seed=2**64), ["seed", str(2**64)]),
        (merged(base={"dtype": "float16"}), ["base.dtype", "'float16'", "bfloat16"]),
        (merged(optimizer={"lr": 0.0}), ["optimizer.lr", "0.0"]),
        (merged(optimizer={"lr": float("nan")}), ["optimizer.lr", "nan"]),
        (merged(optimizer={"lr": float("inf")}), ["optimizer.lr", "inf"]),
        (merged(optimizer={"betas": [0.9]}), ["optimizer.betas", "[0.9]", "2"]),
        (merged(optimizer={"betas": [0.9, 1.0]}), ["optimizer.betas.1", "1.0"]),
        (merged(objective={"gate_l1_weight": -0.1}), ["objective.gate_l1_weight", "-0.1"]),
        (merged(objective={"distill_temperature": 0}), ["objective.distill_temperature", "0"]),
        (merged(batch={"new_blocks": 0}), ["batch.new_blocks", "0"]),
        (merged(sidecar={"layers": []}), ["sidecar.layers", "[]", "at least one"]),
        (merged(sidecar={"layers": [1, 1]}), ["sidecar.layers", "[1, 1]", "twice"]),
        (merged(sidecar={"layers": [-1]}), ["sidecar.layers", "-1"]),
        (merged(phases=[]), ["phases", "at least 1"]),
        (merged(phases=[{"name": "../x", "shards": "s", "steps": 500}]), ["phases.0.name", "'../x'"]),
        (merged(phases=[{"name": "", "shards": "s", "steps": 500}]), ["phases.0.name", "''"]),
        (merged(phases=[{"name": "a" * 65, "shards": "s", "steps": 500}]), ["phases.0.name", "64"]),
        (merged(phases=[{"name": 3, "shards": "s", "steps": 500}]), ["phases.0.name", "3", "int"]),
        (merged(rollback={"confidence": 1.0}), ["rollback.confidence", "1.0"]),
        (merged(rollback={"lr_factor": 2.0}), ["rollback.lr_factor", "2.0"]),
        (merged(engine={"kind": "fsdp"}), ["engine.kind", "'fsdp'", "deepspeed", "accelerate"]),
        (merged(probes=[1]), ["probes", "[1]"]),
        (merged(teacher={"cache_gb": float("inf")}), ["teacher.cache_gb", "inf"]),
        (merged(batch={"new_blocks": 10**30}), ["batch.new_blocks", str(10**30)]),
        (merged(snapshot={"every": 2**63}), ["snapshot.every", str(2**63)]),
        (merged(output_dir=""), ["output_dir", "is empty"]),
        (merged(base={"model": " "}), ["base.model", "is empty"]),
        (merged(base={"revision": 1234567}), ["base.revision", "1234567", "int", "in quotes"]),
        (merged(phases=[{"name": True, "shards": "s", "steps": 500}]), ["phases.0.name", "True", "in quotes"]),
        (merged(phases=[{"name": "a", "shards": "", "steps": 500}]), ["phases.0.shards", "is empty"]),
        (merged(replay={"base": "a\0b"}), ["replay.base", "holds a NUL"]),
    ],
)
def test_one_wrong_value_is_named_with_file_key_and_what_was_found(
    tmp_path: Path, data: dict[str, Any], words: list[str]
) -> None:
    message = refusal(tmp_path, data)
    assert str(tmp_path / "run.yaml") in message
    assert all(word in message for word in words), message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, merged(seed="x", base={"dtype": "fp8"}, snapshot={"colour": 1}))
    assert "3 mistake" in message
    assert all(key in message for key in ("seed", "base.dtype", "snapshot.colour"))


PHASE = MINIMAL["phases"][0]
PROBE = {"name": "p", "shards": "s"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (merged(phases=[PHASE, PHASE]), ["phases", "'wiki'", "twice", "give each its own"]),
        (merged(probes={"sets": [PROBE, PROBE]}), ["probes.sets", "'p'", "twice"]),
        (
            merged(probes={"sets": [{**PROBE, "guard_after": "wikki"}]}),
            ["probes.sets", "'p'", "guard_after", "'wikki'", "wiki", "news"],
        ),
        (
            merged(replay={"base": "self"}, probes={"sets": [{"name": "own_text", "shards": "s"}]}),
            ["probes.sets", "'own_text'", "replay.base = self", "another name"],
        ),
        (
            merged(objective={"replay_loss_weight": 0.0, "distill_kl_weight": 0.0}),
            ["batch.replay_blocks", "8", "replay_loss_weight", "distill_kl_weight", "stats_drift_weight"],
        ),
        (merged(batch={"replay_blocks": 0}), ["replay.base", "batch.replay_blocks = 0", "leave out"]),
        (merged(optimizer={"warmup_steps": 300}), ["optimizer.warmup_steps = 300", "'news'", "300 steps", "fewer"]),
    ],
)
def test_combinations_that_cant_work_are_refused(tmp_path: Path, data: dict[str, Any], words: list[str]) -> None:
    message = refusal(tmp_path, data)
    assert str(tmp_path / "run.yaml") in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "data",
    [
        merged(batch={"replay_blocks": 0}, replay={"base": "self"}),
        merged(objective={"replay_loss_weight": 0.0, "distill_kl_weight": 0.0, "stats_drift_weight": 0.1}),
        merged(optimizer={"warmup_steps": 299}),
        merged(optimizer={"warmup_steps": 0}),
    ],
)
def test_their_neighbours_are_fine(tmp_path: Path, data: dict[str, Any]) -> None:
    load_config(write(tmp_path, data))


@pytest.mark.parametrize("line", ["seed: 1\nseed: 2\n", "optimizer: {lr: 1.0e-3, lr: 2.0e-3}\n"])
def test_a_key_given_twice_is_refused_in_yaml(tmp_path: Path, line: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + line, encoding="utf-8")
    message = refusal_of(path, [])
    assert str(path) in message
    assert "given twice" in message
    assert "'seed'" in message or "'lr'" in message


def test_a_key_given_twice_is_refused_in_json(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(MINIMAL)[:-1] + ', "seed": 1, "seed": 2}', encoding="utf-8")
    message = refusal_of(path, [])
    assert str(path) in message
    assert "'seed' is given twice" in message


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.yaml", "a: [1\n", ["can't be read as yaml"]),
        ("run.json", "{'a': 1}", ["can't be read as json"]),
        ("run.yaml", "- 1\n", ["keys and values", "list"]),
        ("run.yaml", "", ["keys and values", "NoneType"]),
        ("run.yaml", "a: !!python/object/apply:os.getcwd []\n", ["can't be read as yaml"]),
        ("run.yaml", "{[1]: 2}\n", ["run.yaml"]),
        ("run.yaml", "seed: 2024-13-45\n", ["can't be read as yaml"]),
        ("run.yaml", "1: 2\n", ["run.yaml", "1"]),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    message = refusal_of(path, [])
    assert all(word in message for word in [str(path), *words]), message


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"seed: \xff\xfe\n")
    assert str(path) in refusal_of(path, [])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
