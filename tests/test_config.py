"""The config: what it takes, what it refuses and in which words, and how a batch is cut into micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from revpatch import config as config_module
from revpatch.config import BatchConfig, Config, ConfigError, ProbeSetConfig, Section
from revpatch.config_file import dump_config, load_config

ROOT = Path(__file__).resolve().parent.parent

MINIMAL: dict[str, Any] = {
    "output_dir": "runs/x",
    "base": {"model": "gpt2"},
    "replay": {"base": "data/base"},
    "phases": [{"name": "wiki", "shards": "data/wiki", "steps": 500}, {"name": "news", "shards": "n", "steps": 300}],
}


def write(tmp_path: Path, data: Any, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(data) if name.endswith(".json") else yaml.safe_dump(data), encoding="utf-8")
    return path


def merged(**sections: Any) -> dict[str, Any]:
    return {
        **MINIMAL,
        **{key: MINIMAL.get(key, {}) | value if isinstance(value, dict) else value for key, value in sections.items()},
    }


def refusal(tmp_path: Path, data: dict[str, Any], overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, data), overrides)
    return str(caught.value)


def sections() -> list[type[Section]]:
    return [
        value
        for value in vars(config_module).values()
        if isinstance(value, type) and issubclass(value, Section) and value is not Section
    ]


def test_a_minimal_config_gets_the_defaults_of_the_design(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert (config.base.dtype, config.base.block_size, config.base.activation_checkpointing) == (
        "bfloat16",
        1024,
        False,
    )
    assert config.sidecar.model_dump() == {
        "bottleneck": 64,
        "activation": "gelu",
        "init_scale": 1.0,
        "normalize": "rms",
        "gate": "prefix",
        "placement": "residual",
        "layers": "all",
        "check_invertibility": True,
    }
    assert config.objective.model_dump() == {
        "replay_loss_weight": 1.0,
        "distill_kl_weight": 1.0,
        "distill_temperature": 1.0,
        "gate_l1_weight": 0.0,
        "patch_l2_weight": 0.0,
        "scale_l2_weight": 1e-3,
        "stats_drift_weight": 0.0,
    }
    assert (config.optimizer.lr, config.optimizer.gate_lr_factor, config.optimizer.betas) == (6e-3, 5.0, [0.9, 0.95])
    assert (config.optimizer.weight_decay, config.optimizer.warmup_steps, config.optimizer.schedule) == (
        0.0,
        100,
        "cosine",
    )
    assert (config.batch.new_blocks, config.batch.replay_blocks, config.batch.micro_blocks) == (32, 16, 4)
    assert (config.rollback.max_rollbacks, config.rollback.confidence, config.rollback.lr_factor) == (5, 0.95, 0.5)
    assert (config.engine.kind, config.engine.deepspeed) == ("deepspeed", None)
    assert config.phases[0].repeat
    assert ProbeSetConfig(name="a", shards="b").tolerance == 0.03


def test_json_and_yaml_give_the_same_config(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL, "run.json")) == load_config(write(tmp_path, MINIMAL))


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001", "1E-3", ".1e-2", "1.e-3"])
def test_a_number_may_be_written_as_people_write_it(tmp_path: Path, written: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + f"optimizer: {{lr: {written}}}\n", encoding="utf-8")
    assert load_config(path).optimizer.lr == 1e-3
    assert load_config(write(tmp_path, MINIMAL), [f"optimizer.lr={written}"]).optimizer.lr == 1e-3


def test_a_name_that_looks_like_a_number_with_an_e_in_it_can_be_quoted(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL), ["phases.0.name='1e3'"]).phases[0].name == "1e3"


def test_the_resolved_config_is_read_back_as_it_was(tmp_path: Path) -> None:
    data = merged(
        sidecar={"layers": [0, 3], "init_scale": 0.1, "placement": "coupled"},
        optimizer={"lr": 3e-5, "betas": [0.8, 0.99], "warmup_steps": 1},
        probes={"sets": [{"name": "b", "shards": "dätä/b", "guard_after": "wiki", "max_blocks": 7}]},
    )
    config = load_config(write(tmp_path, data))
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert yaml.safe_load(dump_config(config)).keys() == Config.model_fields.keys()


def test_set_changes_nested_keys_list_items_and_keys_of_absent_sections(tmp_path: Path) -> None:
    overrides = [
        "optimizer.lr=1e-3",
        "phases.1.steps=123",
        "sidecar.layers=[0, 2]",
        "base.revision=null",
        "monitoring.tensorboard=false",
        "output_dir=runs/a=b",
        "optimizer.lr=2e-3",
    ]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert config.optimizer.lr == 2e-3, "the last one wins"
    assert [phase.steps for phase in config.phases] == [500, 123]
    assert config.sidecar.layers == [0, 2]
    assert not config.monitoring.tensorboard
    assert config.output_dir == "runs/a=b", "only the first = parts key and value"


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
        ("optimizer..lr=1e-3", ["optimizer", "no such key"]),
    ],
)
def test_a_wrong_set_is_refused_in_words(tmp_path: Path, override: str, words: list[str]) -> None:
    message = refusal(tmp_path, MINIMAL, [override])
    assert all(word in message for word in words), message


def test_set_reaches_into_a_section_that_is_there_but_empty(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimizer:\n", encoding="utf-8")
    assert load_config(path, ["optimizer.lr=1e-3"]).optimizer.lr == 1e-3
    assert "optimizer" in refusal_of(path, []), "without that, an empty section is a slip of the pen"


def test_set_of_an_item_of_an_empty_list_says_so(tmp_path: Path) -> None:
    assert "the list is empty" in refusal(tmp_path, merged(probes={"sets": []}), ["probes.sets.0.name=a"])


def refusal_of(path: Path, overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


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
    ],
)
def test_one_wrong_value_is_named_with_file_key_and_what_was_found(
    tmp_path: Path, data: dict[str, Any], words: list[str]
) -> None:
    message = refusal(tmp_path, data)
    assert str(tmp_path / "run.yaml") in message
    assert all(word in message for word in words), message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, merged(seed="x", base={"dtype": "fp8"}, ledger={"colour": 1}))
    assert "3 mistake" in message
    assert all(key in message for key in ("seed", "base.dtype", "ledger.colour"))


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
        (merged(replay={"base": None}), ["replay.base", "missing", "batch.replay_blocks", "0"]),
        (
            merged(objective={"replay_loss_weight": 0.0, "distill_kl_weight": 0.0}),
            ["batch.replay_blocks", "16", "replay_loss_weight", "distill_kl_weight", "stats_drift_weight"],
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
        merged(batch={"replay_blocks": 0}, replay={"base": None}),
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


def test_a_config_cant_be_changed_afterwards(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        config.base.model = "other"


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
        (BatchConfig(new_blocks=6, replay_blocks=4), 4, ["batch.new_blocks = 6", "4 ranks", "6 % 4 = 2", "multiple"]),
        (BatchConfig(new_blocks=8, replay_blocks=6), 4, ["batch.replay_blocks = 6", "4 ranks", "6 % 4 = 2"]),
        (
            BatchConfig(new_blocks=9, replay_blocks=4, micro_blocks=4),
            1,
            ["batch.micro_blocks = 4", "9 new", "4 replayed", "raise micro_blocks"],
        ),
    ],
)
def test_a_batch_that_cant_be_split_is_refused_with_the_numbers(
    batch: BatchConfig, world: int, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        batch.accumulation(world)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_field_says_what_it_is(section: type[Section]) -> None:
    assert section.__doc__
    nested = {field for field, info in section.model_fields.items() if info.annotation in sections()}
    silent = [name for name, info in section.model_fields.items() if not info.description and name not in nested]
    assert not silent, f"{section.__name__} has fields without a docstring"


def test_every_section_is_part_of_a_config() -> None:
    """So that no knob is looked for where none is."""
    reached: set[Any] = set()

    def walk(kind: Any) -> None:
        for inner in getattr(kind, "__args__", ()):
            walk(inner)
        if isinstance(kind, type) and issubclass(kind, Section):
            reached.add(kind)
            for info in kind.model_fields.values():
                walk(info.annotation)

    walk(Config)
    assert reached == set(sections())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_bundled_configs_load_and_can_run_on_one_two_and_four_ranks(path: Path) -> None:
    config = load_config(path)
    assert [config.batch.accumulation(world) for world in (1, 2, 4)]
    assert not Path(config.output_dir).is_absolute()
