"""What a run is refused for before any process group is formed: key, value, and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def phase(shards: object, steps: int = 12, **more: Any) -> dict[str, Any]:
    return {"phases": [{"name": "only", "shards": shards, "steps": steps, **more}], "probes": NO_PROBES}


def probed(shards: object, **more: Any) -> dict[str, Any]:
    return {"probes": {"sets": [{"name": "p", "shards": str(shards), **more}]}}


@pytest.fixture
def places(toy: Toy, tmp_path: Path) -> dict[str, Path]:
    """Folders to be refused, by name, and those of the toy."""
    cut = shutil.copytree(toy.shards("first"), tmp_path / "cut")
    tar = next(cut.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    source = tmp_path / "text.txt"
    source.write_text("\n".join(make_text(i) for i in range(100)), encoding="utf-8")
    build_shards([source], make_tokenizer(vocab_size=280), BLOCK_SIZE, tmp_path / "tokenized")
    build_shards(
        [toy.folder / "first.jsonl"], toy.tokenizer, BLOCK_SIZE, tmp_path / "noted", holdout=0.2, note="another"
    )
    shutil.copytree(toy.shards("first"), tmp_path / "copied")
    bert = Path(shutil.copytree(toy.base, tmp_path / "bert"))
    (bert / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    save_base(tmp_path / "odd", toy.tokenizer, width=31)
    make_base(300).save_pretrained(tmp_path / "mute")
    made = ("cut", "tokenized", "noted", "copied", "bert", "odd", "mute", "nowhere")
    return {"toy_base": toy.base, **{n: toy.shards(n) for n in ("base", "first", "second", "first_probe")}} | {
        name: tmp_path / name for name in made
    }


Places = dict[str, Path]
REFUSALS: list[tuple[Callable[[Places], dict[str, Any]], str]] = [
    (lambda at: phase(str(at["nowhere"])), "phases.0.shards; {nowhere}; revpatch shards build"),
    (lambda at: {"replay": {"base": str(at["nowhere"])}}, "replay.base; {nowhere}; revpatch shards build"),
    (lambda at: probed(at["nowhere"]), "probes.sets.0.shards; {nowhere}"),
    (
        lambda at: phase([{"shards": str(at["first"])}, {"shards": str(at["nowhere"])}]),
        "phases.0.shards.1.shards; {nowhere}",
    ),
    (
        lambda at: phase([{"shards": str(at["first"])}, {"shards": str(at["second"]), "weight": 1e-9}]),
        "weight 1e-09; raise it",
    ),
    (lambda at: phase(str(at["cut"])), "phases.0.shards; {cut}; bytes; build the shards again"),
    (
        lambda at: {"base": {"block_size": BLOCK_SIZE * 2}},
        f"phases.0.shards; {{first}}; {BLOCK_SIZE}; base.block_size is {BLOCK_SIZE * 2}; anew",
    ),
    (
        lambda at: {"base": {"block_size": POSITIONS + 1}},
        f"base.block_size = {POSITIONS + 1}; {{toy_base}}; at most {POSITIONS}; lower it",
    ),
    (lambda at: phase(str(at["tokenized"])), "phases.0.shards; {tokenized}; tokenizer; fingerprint; --tokenizer"),
    (lambda at: {"base": {"model": str(at["odd"])}}, "base.model; {odd}; 31; odd; even width"),
    (lambda at: {"base": {"model": str(at["nowhere"])}}, "base.model; {nowhere}; local folder"),
    (lambda at: {"base": {"model": str(at["bert"])}}, "base.model; {bert}; 'bert'; FAMILIES; gpt2"),
    (lambda at: {"base": {"model": str(at["mute"])}}, "base.model; {mute}; tokenizer"),
    (lambda at: {"sidecar": {"layers": [0, 2]}}, "sidecar.layers; [0, 2]; 0 to 1"),
    (
        lambda at: {"batch": {"new_blocks": 4096, "micro_blocks": 4096, "replay_blocks": 4096}},
        "phases.0.shards; {first}; 4096 lanes; batch.new_blocks; larger corpus",
    ),
    (lambda at: probed(at["copied"]), "probes.sets.0.shards = {copied}; phases.0.shards; held out; --holdout; _probe"),
    (lambda at: probed(at["base"]), "probes.sets.0.shards = {base}; replay.base"),
    (lambda at: phase(str(at["copied"])) | probed(at["noted"]), "probes.sets.0.shards"),
    (lambda at: probed(at["first_probe"], max_blocks=1), "probes.sets.0; 1 block; at least 2; max_blocks"),
    (lambda at: {"world": 3}, "batch.new_blocks = 4; 3 ranks; multiple of 3"),
    (lambda at: {"world": 2, "batch": {"replay_blocks": 3}}, "batch.replay_blocks = 3; 2 ranks; multiple of 2"),
    (lambda at: {"batch": {"micro_blocks": 1}}, "batch.micro_blocks = 1; raise micro_blocks"),
]


@pytest.mark.parametrize(("change", "words"), REFUSALS)
def test_what_can_not_be_trained_is_refused(
    refused: Refused, places: Places, change: Callable[[Places], dict[str, Any]], words: str
) -> None:
    holds(refused(**change(places)), *words.format(**places).split("; "))


def test_more_steps_than_one_epoch_without_repeat(toy: Toy, refused: Refused, tmp_path: Path) -> None:
    shards = toy.shards("first")
    epoch = json.loads((shards / "manifest.json").read_text(encoding="utf-8"))["blocks"] // 4
    message = refused(**phase(str(shards), steps=epoch + 1, repeat=False))
    holds(message, f"phases.0.steps = {epoch + 1}", shards, f"{epoch} steps", "repeat: true", f"at most {epoch}")
    check(toy.config(tmp_path, **phase(str(shards), steps=epoch, repeat=False)), 1)
    check(toy.config(tmp_path, **phase(str(shards), steps=epoch + 1, repeat=True)), 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage = 3", "replicated", "0, 1 or 2"]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage = True", "0, 1 or 2"]),
        ({"zero_optimization": 1}, ["zero_optimization", "1"]),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, ["offload", "leave it out"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "take it out"]),
        ({"train_batch_size": 8}, ["train_batch_size", "batch", "take it out"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "optimizer.max_grad_norm", "take it out"]),
        ({"fp16": {"enabled": True}}, ["fp16", "float32", "take it out"]),
        ([1], ["keys and values", "list"]),
        ("{", ["engine.deepspeed"]),
    ],
)
def test_a_deepspeed_file_that_asks_for_what_is_decided_elsewhere(
    refused: Refused, tmp_path: Path, settings: Any, words: list[str]
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings), encoding="utf-8")
    holds(refused(engine={"kind": "deepspeed", "deepspeed": str(file)}), file, *words)


def test_sound_deepspeed_files_are_taken(toy: Toy, tmp_path: Path) -> None:
    """The bundled ones, and one whose precision sections are switched off."""
    off = tmp_path / "ds.json"
    off.write_text(json.dumps({"fp16": {"enabled": False}, "zero_optimization": {"stage": 1}}), encoding="utf-8")
    files = sorted((ROOT / "configs/deepspeed").glob("*.json"))
    assert files
    for file in (*files, off):
        check(toy.config(tmp_path, engine={"kind": "deepspeed", "deepspeed": str(file)}), 2)


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
