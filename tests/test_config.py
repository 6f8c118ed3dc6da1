"""The config: what it takes, its defaults, what --set changes, and how a batch is cut into micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from config_files import MINIMAL, merged, refusal, refusal_of, write
from hypothesis import given
from hypothesis import strategies as st

from revpatch import config as config_module
from revpatch.config import BatchConfig, Config, ConfigError, ProbeSetConfig, Section
from revpatch.config.file import dump_config, load_config

ROOT = Path(__file__).resolve().parent.parent


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
        "normalize": "channels",
        "gate": "prefix",
        "placement": "residual",
        "layers": "all",
        "check_invertibility": True,
    }
    assert config.objective.model_dump() == {
        "replay_loss_weight": 1.0,
        "distill_kl_weight": 8.0,
        "distill_temperature": 1.0,
        "gate_l1_weight": 0.0,
        "patch_l2_weight": 0.0,
        "scale_l2_weight": 1e-3,
        "stats_drift_weight": 0.0,
    }
    assert (config.optimizer.lr, config.optimizer.gate_lr, config.optimizer.betas) == (6e-3, 1.5e-2, [0.9, 0.95])
    assert (config.optimizer.weight_decay, config.optimizer.warmup_steps, config.optimizer.schedule) == (
        0.0,
        100,
        "cosine",
    )
    assert (config.batch.new_blocks, config.batch.replay_blocks, config.batch.micro_blocks) == (32, 8, 5)
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


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("010", None),
        ("1:30", None),
        ("08", None),
        ("1e2", None),
        ("0x10", 16),
        ("1_000", 1000),
        ("+7", 7),
        ("-0", None),
    ],
)
def test_a_number_of_yaml_1_1_is_read_as_meant_or_refused(tmp_path: Path, written: str, read: int | None) -> None:
    """There 010 is 8, and 1:30 is 90."""
    if read is None:
        assert "snapshot.every" in refusal(tmp_path, MINIMAL, [f"snapshot.every={written}"])
    else:
        assert load_config(write(tmp_path, MINIMAL), [f"snapshot.every={written}"]).snapshot.every == read


@pytest.mark.parametrize("name", ["1e3", "010", "true", "null", "0x1", "1_0"])
def test_a_name_that_looks_like_something_else_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    config = load_config(write(tmp_path, MINIMAL), [f"phases.0.name='{name}'"])
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml").phases[0].name == name


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


def test_a_path_that_begins_with_the_home_folder_is_spelled_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    data = merged(monitoring={"samples": {"prompts": ["~/ is home"]}})
    config = load_config(write(tmp_path, data), ["output_dir=~/runs/x", "base.model=~/models/b"])
    assert (config.output_dir, config.base.model) == ("/home/somebody/runs/x", "/home/somebody/models/b")
    assert config.monitoring.samples.prompts == ["~/ is home"]


def test_set_reaches_into_a_section_that_is_there_but_empty(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimizer:\n", encoding="utf-8")
    assert load_config(path, ["optimizer.lr=1e-3"]).optimizer.lr == 1e-3
    assert "optimizer" in refusal_of(path, []), "without that, an empty section is a slip of the pen"


def test_set_of_an_item_of_an_empty_list_says_so(tmp_path: Path) -> None:
    assert "the list is empty" in refusal(tmp_path, merged(probes={"sets": []}), ["probes.sets.0.name=a"])


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
