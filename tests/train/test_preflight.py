"""What a run is refused for before any process group is formed: key, value, and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch.distributed as dist
from toy import BLOCK_SIZE, POSITIONS, Toy, make_base, make_text, make_tokenizer, save_base

from revpatch.config import ConfigError
from revpatch.corpus.build import build_shards
from revpatch.train.preflight import check

Refused = Callable[..., str]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def refused(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """refused(world=1, error=ConfigError, **overrides): the message; nothing was written and no group was formed."""

    def formed(*_: Any, **__: Any) -> None:
        raise AssertionError("a process group was formed before the config was checked")

    monkeypatch.setattr(dist, "init_process_group", formed)

    def refuse(world: int = 1, error: type[Exception] = ConfigError, **overrides: Any) -> str:
        config = toy.config(tmp_path, **overrides)
        with pytest.raises(error) as caught:
            check(config, world)
        assert not dist.is_initialized()
        assert not Path(config.output_dir).exists()
        return str(caught.value)

    return refuse


def holds(message: str, *words: object) -> None:
    missing = [str(word) for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


def one_phase(shards: Path, steps: int = 12, **more: Any) -> list[dict[str, Any]]:
    return [{"name": "only", "shards": str(shards), "steps": steps, **more}]


NO_PROBES = {"sets": []}


def test_a_sound_config_is_planned(toy: Toy, tmp_path: Path) -> None:
    for world in (1, 2, 4):
        plan = check(toy.config(tmp_path), world)
        locations = [[shards.location for shards in corpus.sets] for corpus in plan.phases.values()]
        assert locations == [[str(toy.shards("first"))], [str(toy.shards("second"))]]
        assert [Path(shards.location).name for shards in plan.probes] == ["base_probe", "first_probe", "second_probe"]
        assert plan.replay_base is not None
        assert plan.replay_base.location == str(toy.shards("base"))
        assert [mixture.lanes for mixture in plan.mixtures.values()] == [4, 4]
        seeds = [mixture.parts[0].seed for mixture in plan.mixtures.values()]
        assert seeds[0] != seeds[1], "two phases on one corpus would else see it in one order"
        assert plan.tokenizer == plan.phases[0].sets[0].manifest.tokenizer.fingerprint


def test_a_mixture_is_planned(toy: Toy, tmp_path: Path) -> None:
    parts = [{"shards": str(toy.shards("first")), "weight": 3}, {"shards": str(toy.shards("second"))}]
    phases = [{"name": "both", "shards": parts, "steps": 12}]
    plan = check(toy.config(tmp_path, phases=phases, probes=NO_PROBES), 2)
    first = plan.phases[0].sets[0].manifest.blocks
    ids = np.concatenate([plan.mixtures[0].block_ids(step) for step in range(40)])
    assert (ids < first).sum() == 3 * (ids >= first).sum()
    assert list(plan.digests(toy.config(tmp_path, phases=phases, probes=NO_PROBES), 0)["phases both"]) == [
        shards.manifest.digest for shards in plan.phases[0].sets
    ]


def test_parts_of_a_mixture_that_do_not_go_together(toy: Toy, refused: Refused, tmp_path: Path) -> None:
    parts = [{"shards": str(toy.shards("first"))}, {"shards": str(tmp_path / "nowhere")}]
    message = refused(phases=[{"name": "both", "shards": parts, "steps": 12}], probes=NO_PROBES)
    holds(message, "phases.0.shards.1.shards", tmp_path / "nowhere")
    parts[1] = {"shards": str(toy.shards("second")), "weight": 1e-9}
    holds(
        refused(phases=[{"name": "both", "shards": parts, "steps": 12}], probes=NO_PROBES), "weight 1e-09", "raise it"
    )


def test_no_replay_and_no_probes_are_planned(toy: Toy, tmp_path: Path) -> None:
    plan = check(toy.config(tmp_path, batch={"replay_blocks": 0}, replay={"base": "self"}, probes=NO_PROBES), 1)
    assert plan.replay_base is None
    assert plan.probes == []


@pytest.mark.parametrize("key", ["phases.1.shards", "replay.base", "probes.sets.0.shards"])
def test_missing_shards(toy: Toy, refused: Refused, tmp_path: Path, key: str) -> None:
    nowhere = tmp_path / "nowhere"
    overrides: dict[str, Any] = {
        "phases.1.shards": {
            "phases": [
                {"name": "first", "shards": str(toy.shards("first")), "steps": 12},
                {"name": "b", "shards": str(nowhere), "steps": 12},
            ],
            "probes": NO_PROBES,
        },
        "replay.base": {"replay": {"base": str(nowhere)}},
        "probes.sets.0.shards": {"probes": {"sets": [{"name": "a", "shards": str(nowhere)}]}},
    }[key]
    holds(refused(**overrides), key, nowhere, "revpatch shards build")


def test_a_shard_that_was_cut(toy: Toy, refused: Refused, tmp_path: Path) -> None:
    cut = shutil.copytree(toy.shards("first"), tmp_path / "cut")
    tar = next(cut.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    message = refused(phases=one_phase(cut), probes=NO_PROBES)
    holds(message, "phases.0.shards", tar, "bytes", "build the shards again")


def test_shards_of_another_block_size(toy: Toy, refused: Refused) -> None:
    message = refused(base={"block_size": BLOCK_SIZE * 2})
    holds(message, "phases.0.shards", toy.shards("first"), BLOCK_SIZE, "base.block_size", BLOCK_SIZE * 2, "anew")


def test_a_block_size_beyond_the_positions(toy: Toy, refused: Refused) -> None:
    message = refused(base={"block_size": POSITIONS + 1})
    holds(message, f"base.block_size = {POSITIONS + 1}", toy.base, f"at most {POSITIONS}", "lower it")


def test_shards_of_another_tokenizer(refused: Refused, tmp_path: Path) -> None:
    other = make_tokenizer(vocab_size=280)
    source = tmp_path / "text.txt"
    source.write_text("\n".join(make_text(i) for i in range(100)), encoding="utf-8")
    build_shards([source], other, BLOCK_SIZE, tmp_path / "other")
    message = refused(phases=one_phase(tmp_path / "other"), probes=NO_PROBES)
    holds(message, "phases.0.shards", tmp_path / "other", "tokenizer", "fingerprint", "--tokenizer")


def test_a_base_of_odd_width(toy: Toy, refused: Refused, tmp_path: Path) -> None:
    base = save_base(tmp_path / "odd", toy.tokenizer, width=31)
    holds(refused(base={"model": str(base)}), "base.model", base, "31", "odd", "even width")


def test_a_base_that_is_not_there(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds(refused(base={"model": str(tmp_path / "none")}), "base.model", tmp_path / "none", "local folder")
    monkeypatch.setattr("revpatch.base.cached_file", Mock(side_effect=TimeoutError()))
    holds(refused(base={"model": "some/base"}), "base.model", "not to be had from the hub: TimeoutError")


def test_a_base_of_an_unknown_family(toy: Toy, refused: Refused, tmp_path: Path) -> None:
    base = Path(shutil.copytree(toy.base, tmp_path / "bert"))
    (base / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    holds(refused(base={"model": str(base)}), "base.model", base, "'bert'", "FAMILIES", "gpt2")


def test_a_base_without_a_tokenizer(refused: Refused, tmp_path: Path) -> None:
    make_base(300).save_pretrained(tmp_path / "mute")
    holds(refused(base={"model": str(tmp_path / "mute")}), "base.model", tmp_path / "mute", "tokenizer")


def test_a_sidecar_after_a_block_that_is_not_there(refused: Refused) -> None:
    holds(refused(sidecar={"layers": [0, 2]}), "sidecar.layers", "[0, 2]", "2", "0 to 1")


def test_more_steps_than_one_epoch_without_repeat(toy: Toy, refused: Refused, tmp_path: Path) -> None:
    shards = toy.shards("first")
    blocks = json.loads((shards / "manifest.json").read_text(encoding="utf-8"))["blocks"]
    epoch = blocks // 4
    message = refused(phases=one_phase(shards, steps=epoch + 1, repeat=False), probes=NO_PROBES)
    holds(message, f"phases.0.steps = {epoch + 1}", shards, f"{epoch} steps", "repeat: true", f"at most {epoch}")
    check(toy.config(tmp_path, phases=one_phase(shards, steps=epoch, repeat=False), probes=NO_PROBES), 1)
    check(toy.config(tmp_path, phases=one_phase(shards, steps=epoch + 1, repeat=True), probes=NO_PROBES), 1)


def test_fewer_blocks_than_lanes(toy: Toy, refused: Refused) -> None:
    message = refused(batch={"new_blocks": 4096, "micro_blocks": 4096, "replay_blocks": 4096})
    holds(message, "phases.0.shards", toy.shards("first"), "4096 lanes", "batch.new_blocks", "larger corpus")


@pytest.mark.parametrize(("name", "key"), [("first", "phases.0.shards"), ("base", "replay.base")])
def test_a_probe_set_that_is_trained_on(toy: Toy, refused: Refused, name: str, key: str, tmp_path: Path) -> None:
    copied = shutil.copytree(toy.shards(name), tmp_path / "copied")
    for folder in (toy.shards(name), copied):
        message = refused(probes={"sets": [{"name": "p", "shards": str(folder)}]})
        holds(message, f"probes.sets.0.shards = {folder}", key, "held out", "--holdout", "_probe")


def test_a_probe_set_of_the_same_text_under_another_note(toy: Toy, refused: Refused, tmp_path: Path) -> None:
    for note, out in (("one", "train"), ("two", "copy")):
        build_shards([toy.folder / "first.jsonl"], toy.tokenizer, BLOCK_SIZE, tmp_path / out, note=note)
    sets = [{"name": "p", "shards": str(tmp_path / "copy")}]
    message = refused(phases=one_phase(tmp_path / "train"), probes={"sets": sets})
    holds(message, "probes.sets.0.shards", "phases.0.shards", "held out")


def test_a_probe_of_one_block(toy: Toy, refused: Refused) -> None:
    sets = [{"name": "p", "shards": str(toy.shards("first_probe")), "max_blocks": 1}]
    holds(refused(probes={"sets": sets}), "probes.sets.0", "1 block", "at least 2", "max_blocks")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage = 3", "replicated", "0, 1 or 2"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage = 4", "0, 1 or 2"]),
        ({"zero_optimization": {"stage": "1"}}, ["zero_optimization.stage = '1'", "0, 1 or 2"]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage = True", "0, 1 or 2"]),
        ({"zero_optimization": 1}, ["zero_optimization", "1"]),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, ["offload", "leave it out"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "take it out"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "optimizer", "take it out"]),
        ({"train_batch_size": 8}, ["train_batch_size", "batch", "take it out"]),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps", "batch", "take it out"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "optimizer.max_grad_norm", "take it out"]),
        ({"fp16": {"enabled": True}}, ["fp16", "float32", "take it out"]),
        ({"bf16": {"enabled": True}}, ["bf16", "float32", "take it out"]),
        ({"fp16": True}, ["fp16", "True"]),
        ([1], ["keys and values", "list"]),
    ],
)
def test_a_deepspeed_file_that_asks_for_what_is_decided_elsewhere(
    refused: Refused, tmp_path: Path, settings: Any, words: list[str]
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    holds(refused(engine={"kind": "deepspeed", "deepspeed": str(file)}), file, *words)


@pytest.mark.parametrize(("text", "error"), [(None, FileNotFoundError), ("{", ConfigError), ("\xff", ConfigError)])
def test_a_deepspeed_file_that_cant_be_read(
    refused: Refused, tmp_path: Path, text: str | None, error: type[Exception]
) -> None:
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    holds(refused(error=error, engine={"kind": "deepspeed", "deepspeed": str(file)}), "engine.deepspeed", file)


@pytest.mark.parametrize("file", sorted((ROOT / "configs/deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_the_bundled_deepspeed_files_are_taken(toy: Toy, tmp_path: Path, file: Path) -> None:
    check(toy.config(tmp_path, engine={"kind": "deepspeed", "deepspeed": str(file)}), 2)


def test_precision_sections_that_are_switched_off_are_harmless(toy: Toy, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"fp16": {"enabled": False}, "zero_optimization": {"stage": 1}}), encoding="utf-8")
    check(toy.config(tmp_path, engine={"kind": "deepspeed", "deepspeed": str(file)}), 1)


def test_a_batch_that_the_ranks_cant_share(refused: Refused) -> None:
    holds(refused(world=3), "batch.new_blocks = 4", "3 ranks", "multiple of 3")
    holds(refused(world=2, batch={"replay_blocks": 3}), "batch.replay_blocks = 3", "2 ranks", "multiple of 2")
    holds(refused(world=1, batch={"micro_blocks": 1}), "batch.micro_blocks = 1", "raise micro_blocks")


def test_the_command_line_refuses_before_a_process_group_and_before_the_folder_is_made(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from revpatch.train import run

    def formed(*_: Any, **__: Any) -> None:
        raise AssertionError("a process group was formed before the config was checked")

    monkeypatch.setattr(run, "process_group", formed)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    config = toy.config(tmp_path, base={"block_size": 32})
    with pytest.raises(ConfigError, match="block_size"):
        run.train_run(config)
    assert not Path(config.output_dir).exists()
