"""The config: its defaults, what --set changes, what is refused and in which words; the bundled configs and the
schema."""

from __future__ import annotations

import codecs
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from config_files import MINIMAL, merged, refusal, refusal_of, write
from hypothesis import given
from hypothesis import strategies as st
from ranks import Runs, RunServer

from revpatch import config as config_module
from revpatch.config import BatchConfig, Config, ConfigError, ProbeSetConfig, Section
from revpatch.config.file import dump_config, load_config, read_deepspeed_config
from revpatch.corpus.sources import parse_hub_spec
from revpatch.train.preflight import locations

ROOT = Path(__file__).resolve().parent.parent


def test_a_minimal_config_gets_the_defaults_of_the_docs(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    found = config.model_dump()
    for section, defaults in {
        "base": {"dtype": "bfloat16", "block_size": 1024, "activation_checkpointing": False},
        "sidecar": {
            "bottleneck": 64,
            "activation": "gelu",
            "init_scale": 1.0,
            "normalize": "channels",
            "gate": "prefix",
            "placement": "residual",
            "layers": "all",
            "check_invertibility": True,
        },
        "objective": {
            "replay_loss_weight": 1.0,
            "distill_kl_weight": 8.0,
            "distill_temperature": 1.0,
            "gate_l1_weight": 0.0,
            "patch_l2_weight": 0.0,
            "scale_l2_weight": 1e-3,
            "stats_drift_weight": 0.0,
        },
        "optimizer": {
            "lr": 6e-3,
            "gate_lr": 1.5e-2,
            "betas": [0.9, 0.95],
            "weight_decay": 0.0,
            "warmup_steps": 100,
            "schedule": "cosine",
        },
        "batch": {"new_blocks": 32, "replay_blocks": 8, "micro_blocks": 5},
        "rollback": {"max_rollbacks": 5, "confidence": 0.95, "lr_factor": 0.5},
        "engine": {"kind": "deepspeed", "deepspeed": None},
    }.items():
        assert {key: found[section][key] for key in defaults} == defaults, section
    assert config.phases[0].repeat
    assert ProbeSetConfig(name="a", shards="b").tolerance == 0.03
    assert load_config(write(tmp_path, MINIMAL, "run.json")) == config
    with pytest.raises(ValueError, match="frozen"):
        config.base.model = "other"


@pytest.mark.parametrize(
    ("key", "written", "read"),
    [
        *(("optimizer.lr", written, 1e-3) for written in ("1e-3", "0.001", "1E-3", ".1e-2")),
        *(("snapshot.every", written, None) for written in ("010", "1:30", "1e2", "-0")),  # 010 is 8 in YAML 1.1
        *(("snapshot.every", written, read) for written, read in (("0x10", 16), ("1_000", 1000))),
    ],
)
def test_a_number_is_read_as_people_mean_it_or_refused(tmp_path: Path, key: str, written: str, read: Any) -> None:
    if read is None:
        assert key in refusal(tmp_path, MINIMAL, [f"{key}={written}"])
        return
    config = load_config(write(tmp_path, MINIMAL), [f"{key}={written}"])
    assert read in (config.optimizer.lr, config.snapshot.every)


def test_the_resolved_config_is_read_back_as_it_was(tmp_path: Path) -> None:
    data = merged(
        sidecar={"layers": [0, 3], "init_scale": 0.1, "placement": "coupled"},
        optimizer={"lr": 3e-5, "betas": [0.8, 0.99], "warmup_steps": 1},
        probes={"sets": [{"name": "b", "shards": "dätä/b", "guard_after": "wiki", "max_blocks": 7}]},
    )
    config = load_config(write(tmp_path, data), ["phases.1.name='1e3'"])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert yaml.safe_load(dump_config(config)).keys() == Config.model_fields.keys()


def test_set_changes_nested_keys_list_items_and_keys_of_absent_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    overrides = [
        *("optimizer.lr=1e-3", "phases.1.steps=123", "sidecar.layers=[0, 2]", "base.revision=null"),
        *("monitoring.tensorboard=false", "output_dir=~/runs/a=b", "optimizer.lr=2e-3"),
    ]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert config.optimizer.lr == 2e-3, "the last one wins"
    assert [phase.steps for phase in config.phases] == [500, 123]
    assert config.sidecar.layers == [0, 2]
    assert not config.monitoring.tensorboard
    assert config.output_dir == "/home/somebody/runs/a=b", "only the first = parts key and value"


@given(new=st.integers(1, 48), replay=st.integers(0, 48), micro=st.integers(1, 48), world=st.sampled_from([1, 2, 4]))
def test_accumulation_is_the_fewest_equal_micro_batches_that_fit(new: int, replay: int, micro: int, world: int) -> None:
    batch = BatchConfig(new_blocks=new, replay_blocks=replay, micro_blocks=micro)

    def fits(steps: int) -> bool:
        return (
            new % (world * steps) == 0 and replay % (world * steps) == 0 and (new + replay) // (world * steps) <= micro
        )

    possible = [steps for steps in range(1, new + 1) if fits(steps)]
    if possible:
        assert batch.accumulation(world) == min(possible)
    else:
        with pytest.raises(ConfigError):
            batch.accumulation(world)


@pytest.mark.parametrize(
    ("batch", "world", "words"),
    [
        ((6, 4, 5), 4, ["batch.new_blocks = 6", "4 ranks", "6 % 4 = 2", "multiple"]),
        ((8, 6, 5), 4, ["batch.replay_blocks = 6", "4 ranks", "6 % 4 = 2"]),
        ((9, 4, 4), 1, ["batch.micro_blocks = 4", "9 new", "4 replayed", "raise micro_blocks"]),
    ],
)
def test_a_batch_that_cant_be_split_is_refused_with_the_numbers(
    batch: tuple[int, int, int], world: int, words: list[str]
) -> None:
    new, replay, micro = batch
    with pytest.raises(ConfigError) as caught:
        BatchConfig(new_blocks=new, replay_blocks=replay, micro_blocks=micro).accumulation(world)
    assert all(word in str(caught.value) for word in words), caught.value


def test_every_section_is_part_of_a_config_and_every_field_says_what_it_is() -> None:
    """So that no key is looked for where none is."""
    values = vars(config_module).values()
    sections = {each for each in values if isinstance(each, type) and issubclass(each, Section) and each is not Section}
    reached: set[Any] = set()

    def walk(kind: Any) -> None:
        for inner in getattr(kind, "__args__", ()):
            walk(inner)
        if isinstance(kind, type) and issubclass(kind, Section):
            reached.add(kind)
            for info in kind.model_fields.values():
                walk(info.annotation)

    walk(Config)
    assert reached == sections
    silent = [
        (section.__name__, name)
        for section in sections
        for name, info in section.model_fields.items()
        if not info.description and info.annotation not in sections
    ]
    assert not silent and all(section.__doc__ for section in sections)


# What is refused

PHASE = MINIMAL["phases"][0]
PROBE = {"name": "p", "shards": "s"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr", ["--set 'optimizer.lr'", "section.key=value"]),
        ("phases.5.steps=3", ["--set", "'5'", "list of 2", "0 to 1"]),
        ("base.model.name=3", ["--set", "'name'", "single value"]),
        ("optimizer.lr=[1", ["--set", "not YAML"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "str"]),
        ("optimizer.rate=1e-3", ["optimizer.rate", "no such key"]),
    ],
)
def test_a_wrong_set_is_refused_in_words(tmp_path: Path, override: str, words: list[str]) -> None:
    message = refusal(tmp_path, MINIMAL, [override])
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # one value
        ({"sidecar": {"botleneck": 8}}, ["sidecar.botleneck", "no such key", "spelling"]),
        ({"base": {"model": None}}, ["base.model", "None"]),
        ({"base": {"block_size": "128"}}, ["base.block_size", "'128'", "str"]),
        ({"base": {"compile": 1}}, ["base.compile", "1", "int"]),
        ({"base": {"dtype": "float16"}}, ["base.dtype", "'float16'", "bfloat16"]),
        ({"base": {"model": " "}}, ["base.model", "is empty"]),
        ({"base": {"revision": 1234567}}, ["base.revision", "1234567", "int", "in quotes"]),
        ({"seed": 2**64}, ["seed", str(2**64)]),
        ({"optimizer": {"lr": float("nan")}}, ["optimizer.lr", "nan"]),
        ({"optimizer": {"betas": [0.9, 1.0]}}, ["optimizer.betas.1", "1.0"]),
        ({"objective": {"gate_l1_weight": -0.1}}, ["objective.gate_l1_weight", "-0.1"]),
        ({"batch": {"new_blocks": 0}}, ["batch.new_blocks", "0"]),
        ({"sidecar": {"layers": []}}, ["sidecar.layers", "[]", "at least one"]),
        ({"sidecar": {"layers": [1, 1]}}, ["sidecar.layers", "[1, 1]", "twice"]),
        ({"phases": []}, ["phases", "at least 1"]),
        ({"phases": [{**PHASE, "name": "../x"}]}, ["phases.0.name", "'../x'"]),
        ({"rollback": {"confidence": 1.0}}, ["rollback.confidence", "1.0"]),
        ({"engine": {"kind": "fsdp"}}, ["engine.kind", "'fsdp'", "deepspeed", "accelerate"]),
        ({"replay": {"base": "a\0b"}}, ["replay.base", "holds a NUL"]),
        # several that can't work together
        ({"phases": [PHASE, PHASE]}, ["phases", "'wiki'", "twice", "give each its own"]),
        ({"probes": {"sets": [PROBE, PROBE]}}, ["probes.sets", "'p'", "twice"]),
        (
            {"probes": {"sets": [{**PROBE, "guard_after": "wikki"}]}},
            ["probes.sets", "'p'", "guard_after", "'wikki'", "wiki", "news"],
        ),
        (
            {"replay": {"base": "self"}, "probes": {"sets": [{**PROBE, "name": "own_text"}]}},
            ["probes.sets", "'own_text'", "replay.base = self", "another name"],
        ),
        (
            {"objective": {"replay_loss_weight": 0.0, "distill_kl_weight": 0.0}},
            ["batch.replay_blocks", "8", "replay_loss_weight", "distill_kl_weight", "stats_drift_weight"],
        ),
        ({"batch": {"replay_blocks": 0}}, ["replay.base", "batch.replay_blocks = 0", "leave out"]),
        ({"optimizer": {"warmup_steps": 300}}, ["optimizer.warmup_steps = 300", "'news'", "300 steps", "fewer"]),
    ],
)
def test_a_wrong_value_is_named_with_file_key_and_what_was_found(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    message = refusal(tmp_path, merged(**changes))
    assert str(tmp_path / "run.yaml") in message
    assert all(word in message for word in words), message


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, merged(seed="x", base={"dtype": "fp8"}, snapshot={"colour": 1}))
    assert "3 mistake" in message
    assert all(key in message for key in ("seed", "base.dtype", "snapshot.colour"))


TEXT = json.dumps(MINIMAL)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (codecs.BOM_UTF8 + TEXT.encode(), None),
        (TEXT.encode("utf-16"), None),
        (TEXT.encode() + b"\n# caf\xe9", "is not UTF-8: save the file as UTF-8"),
        (b"[" * 5_000, "nested too deeply"),
        (b"[1, 2]", "keys and values"),
        (b"{'a': [", "can't be read as"),
        (TEXT[:-1].encode() + b', "seed": 1, "seed": 2}', "'seed' is given twice"),
        (b'{"a": !!python/object/apply:os.getcwd []}', "can't be read as"),
    ],
    ids=["UTF-8 with a mark", "UTF-16", "Latin-1", "nested", "a list", "cut", "a key twice", "code"],
)
def test_a_file_is_read_as_editors_write_it_or_refused(
    tmp_path: Path, suffix: str, content: bytes, words: str | None
) -> None:
    path = tmp_path / f"run.{suffix}"
    path.write_bytes(content)
    if words is None:
        assert load_config(path) == load_config(write(tmp_path, MINIMAL, "plain.yaml"))
    else:
        message = refusal_of(path, [])
        assert str(path) in message and words in message, message


# The bundled configs

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FILES_ONLY = ("demo", "gpt2_smoke_files", "gpt2_1k_files")
"""The configs that need neither the hub nor data of the reader's own; tests/test_demo.py trains the first."""
SCHEMA: dict[str, Any] = json.loads((ROOT / "configs/schema.json").read_text())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_bundled_config_is_read_and_fits_its_ranks(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir == f"runs/{path.stem}"
    for world in (8,) if "8gpu" in path.stem else (1, 2, 4) if path.stem == "demo_real" else (1, 2, 4, 8):
        micro = config.batch.accumulation(world)
        assert (config.batch.new_blocks + config.batch.replay_blocks) // world // micro <= config.batch.micro_blocks
    read_deepspeed_config(config.engine.deepspeed and str(ROOT / config.engine.deepspeed))
    assert config.probes.sets, "a config that guards nothing is no example"
    for _, place in locations(config):
        if place.startswith("hf:"):
            assert parse_hub_spec(place).split, place
        else:
            assert path.stem not in FILES_ONLY or (ROOT / place / "manifest.json").is_file(), place
    text = path.read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json", "by which editors find the schema"
    jsonschema.validate(yaml.safe_load(text), SCHEMA)


def test_the_runs_that_the_readme_names_are_as_long_as_it_says() -> None:
    long, short = (load_config(ROOT / f"configs/{name}.yaml").phases for name in ("gpt2_100k_hf", "gpt2_1k_files"))
    assert [(phase.steps, phase.repeat) for phase in long] == [(50_000, True)] * 2
    assert sum(phase.steps for phase in short) == 1000


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_json_of_every_stage_is_read(stage: int) -> None:
    found = read_deepspeed_config(str(ROOT / f"configs/deepspeed/zero{stage}.json"))
    assert found.get("zero_optimization", {}).get("stage", 0) == stage


@pytest.mark.slow
def test_one_that_needs_no_hub_trains(server: RunServer, tmp_path: Path) -> None:
    """With few steps, small batches and small probes."""
    data = yaml.safe_load((ROOT / "configs/gpt2_smoke_files.yaml").read_text().replace("shards/", f"{ROOT}/shards/"))
    data["base"]["dtype"] = "float32"
    data["phases"] = [{**phase, "steps": 3} for phase in data["phases"]]
    data["batch"] = {"new_blocks": 4, "replay_blocks": 4, "micro_blocks": 4}
    data["optimizer"]["warmup_steps"] = 1
    data["probes"] |= {"every": 2, "sets": [{**probe, "max_blocks": 4} for probe in data["probes"]["sets"]]}
    if "deepspeed" in data.get("engine", {}):
        data["engine"]["deepspeed"] = str(ROOT / data["engine"]["deepspeed"])
    runs = Runs(server, write(tmp_path, data), tmp_path)
    assert runs.run("run") == [0, 0], runs.log("run").read_text()
    assert len(runs.commits("run")) == len(data["phases"])


def test_the_schema_is_current_and_refuses_what_the_config_refuses(tmp_path: Path) -> None:
    out = tmp_path / "schema.json"
    subprocess.run([sys.executable, str(ROOT / "tools/config_schema.py"), "--out", str(out)], check=True)
    assert json.loads(out.read_text()) == SCHEMA, "run python tools/config_schema.py"
    for wrong in ({"base": {"block_sise": 8}}, {"optimizer": {"lr": -1.0}}, {"engine": {"kind": "horovod"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(merged(**wrong), SCHEMA)
