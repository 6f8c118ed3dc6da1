"""The bundled configs: each is read and fits its ranks, those that need no hub train for some steps; their schema."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ranks import Runs, RunServer

from revpatch.config.file import load_config, read_deepspeed_config
from revpatch.corpus.sources import parse_hub_spec
from revpatch.train.preflight import locations

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FILES_ONLY = ("demo", "gpt2_smoke_files", "gpt2_1k_files")
"""The configs that need neither the hub nor data of the reader's own; tests/test_demo.py trains the first."""
NAMED = {"demo", "gpt2_example", "gpt2_own_text", "gpt2_smoke_files", "gpt2_1k_files", "gpt2_100k_hf"}
NAMED |= {"gpt2_xl_8gpu", "llama_8gpu", "demo_real"}


def test_all_are_there() -> None:
    assert {path.stem for path in CONFIGS} == NAMED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_is_read_and_fits_its_ranks(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir == f"runs/{path.stem}"
    ranks = (8,) if "8gpu" in path.stem else (1, 2, 4) if path.stem == "demo_real" else (1, 2, 4, 8)
    for world in ranks:
        micro = config.batch.accumulation(world)
        assert (config.batch.new_blocks + config.batch.replay_blocks) // world // micro <= config.batch.micro_blocks
    read_deepspeed_config(config.engine.deepspeed and str(ROOT / config.engine.deepspeed))
    assert config.probes.sets, "a config that guards nothing is no example"
    for _, place in locations(config):
        if place.startswith("hf:"):
            assert parse_hub_spec(place).split, place
            continue
        assert path.stem not in FILES_ONLY or (ROOT / place / "manifest.json").is_file(), place


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_json_of_every_stage_is_read(stage: int) -> None:
    found = read_deepspeed_config(str(ROOT / f"configs/deepspeed/zero{stage}.json"))
    assert found.get("zero_optimization", {}).get("stage", 0) == stage


def test_the_long_run_is_twice_50_000_steps_that_repeat() -> None:
    phases = load_config(ROOT / "configs/gpt2_100k_hf.yaml").phases
    assert [(phase.steps, phase.repeat) for phase in phases] == [(50_000, True)] * 2
    phases = load_config(ROOT / "configs/gpt2_1k_files.yaml").phases
    assert sum(phase.steps for phase in phases) == 1000


def shortened(path: Path, folder: Path) -> Path:
    """A bundled config with few steps, small batches and small probes, from any working directory."""
    data: dict[str, Any] = yaml.safe_load(path.read_text().replace("shards/demo", f"{ROOT}/shards/demo"))
    data["base"]["dtype"] = "float32"
    data["phases"] = [{**phase, "steps": 3} for phase in data["phases"]]
    data["batch"] = {"new_blocks": 4, "replay_blocks": 4, "micro_blocks": 4}
    data["optimizer"]["warmup_steps"] = 1
    data["probes"]["every"] = 2
    data["probes"]["sets"] = [{**probe, "max_blocks": 4} for probe in data["probes"]["sets"]]
    if "deepspeed" in data.get("engine", {}):
        data["engine"]["deepspeed"] = str(ROOT / data["engine"]["deepspeed"])
    config = folder / path.name
    config.write_text(yaml.safe_dump(data))
    return config


@pytest.mark.parametrize("name", FILES_ONLY[1:])
def test_those_that_need_no_hub_train(name: str, server: RunServer, tmp_path: Path) -> None:
    runs = Runs(server, shortened(ROOT / f"configs/{name}.yaml", tmp_path), tmp_path)
    assert runs.run("run") == [0, 0], runs.log("run").read_text()
    assert len(runs.commits("run")) == len(load_config(runs.config).phases)


# The schema


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "configs/schema.json").read_text())
    return found


def test_the_schema_is_current(schema: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "schema.json"
    subprocess.run([sys.executable, str(ROOT / "tools/config_schema.py"), "--out", str(out)], check=True)
    assert json.loads(out.read_text()) == schema, "run python tools/config_schema.py"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_editors_find_the_schema_and_it_takes_the_configs(path: Path, schema: dict[str, Any]) -> None:
    text = path.read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    jsonschema.validate(yaml.safe_load(text), schema)


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ("base", {"block_sise": 8}),
        ("optimizer", {"lr": -1.0}),
        ("engine", {"kind": "horovod"}),
        ("batch", {"new_blocks": 0}),
    ],
)
def test_the_schema_refuses_what_the_config_refuses(
    section: str, wrong: dict[str, Any], schema: dict[str, Any]
) -> None:
    data = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    data[section] = {**data.get(section, {}), **wrong}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, schema)
