"""Bases as people have them: what is refused, by every command that names one, and what is taken.

A spoiled base costs one line that names the file, key or tensor and says what to do; training says it before any
process group is formed. Nothing in a base's folder is run.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Call, one_line
from gated_families import GATED
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import Toy, save_base

from revpatch.base import Base, BaseError, load_base
from revpatch.patch.patched_model import base_sha256

Spoil = Callable[[Path], Any]
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "somebody/base", "r": 4, "task_type": "CAUSAL_LM"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5235944\n"
FIRST, LAST = "transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.weight"
SHARD = "model-00002-of-00002.safetensors"
EMBEDDINGS = "transformer.wte.weight"


def config(**changes: Any) -> Spoil:
    """config.json with other values; None takes a key out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        found = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}), encoding="utf-8")

    return change


def tensors(**changes: Callable[[Tensor], Tensor | None] | Tensor) -> Spoil:
    """model.safetensors with other tensors, by names in which __ stands for a dot; None takes one out."""

    def change(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        for key, new in changes.items():
            name = key.replace("__", ".")
            made = new if isinstance(new, Tensor) else new(held.get(name))
            held.pop(name, None)
            if made is not None:
                held[name] = made.contiguous()
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return change


def renamed(change: Callable[[str], str]) -> Spoil:
    """model.safetensors with other names."""

    def rename(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        save_file({change(name): tensor for name, tensor in held.items()}, folder / "model.safetensors")

    return rename


def text(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, size: int | float) -> Spoil:
    """The first bytes of a file; a float is a part of it."""

    def cutting(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(size * len(data)) if isinstance(size, float) else size])

    return cutting


def without(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def sharded(
    put: Callable[[dict[str, Tensor], dict[str, Tensor]], Any] = lambda first, second: None, **index: Any
) -> Spoil:
    """The same weights as two shards and an index, which `put` and `index` may change."""

    def change(folder: Path) -> None:
        held = sorted(load_file(folder / "model.safetensors").items())
        parts = dict(held[: len(held) // 2]), dict(held[len(held) // 2 :])
        put(*parts)
        names = "model-00001-of-00002.safetensors", SHARD
        for name, part in zip(names, parts, strict=True):
            save_file(part, folder / name, {"format": "pt"})
        where = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        made = {"metadata": {"total_size": 1}, "weight_map": where, **index}
        kept = {key: value for key, value in made.items() if value is not None}
        (folder / "model.safetensors.index.json").write_text(json.dumps(kept), encoding="utf-8")
        (folder / "model.safetensors").unlink()

    return change


def as_bin(
    put: Callable[[dict[str, Any]], Any] = lambda held: None, name: str = "pytorch_model.bin", **options: Any
) -> Spoil:
    """The same weights as torch.save writes them."""

    def change(folder: Path) -> None:
        held: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
        put(held)
        (folder / "model.safetensors").unlink()
        torch.save(held, folder / name, **options)

    return change


def then(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def bombed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({FIRST: Bomb(folder / "it ran")}))


def own_code(folder: Path, kind: str = "gpt2") -> None:
    """A model whose class is in its folder, as hubs have them."""
    (folder / "modeling_own.py").write_text(f"open({str(folder / 'it ran')!r}, 'w')\n", encoding="utf-8")
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config(model_type=kind, auto_map=classes)(folder)


def exported(folder: Path) -> None:
    """What `ledger export --to hf` makes of a config."""
    own_code(folder, "revpatch_gpt2")
    config(revpatch={"entry": {"base": {"model": "the/base"}}})(folder)


def only(*names: str) -> Spoil:
    return lambda folder: [path.unlink() for path in folder.iterdir() if path.name not in names]


REFUSED: dict[str, tuple[Spoil, list[str]]] = {
    # what the tensors are, and what config.json says that they are
    "a tensor gone": (tensors(transformer__ln_f__weight=lambda _: None), ["model.safetensors", LAST, "missing"]),
    "one left over": (tensors(transformer__extra=torch.ones(3)), ["transformer.extra", "no place for", "config.json"]),
    "another shape": (tensors(transformer__ln_f__weight=torch.ones(31)), [LAST, "(32,)", "(31,)"]),
    "a layer less": (config(n_layer=1), ["transformer.h.1.", "no place for", "11 tensors", "config.json"]),
    "untied without a head": (config(tie_word_embeddings=False), ["lm_head.weight", "missing"]),
    "another family": (
        config(model_type="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        ["model.layers.0.", "missing", "no place for", "config.json"],
    ),
    "whole numbers": (
        tensors(transformer__ln_f__weight=torch.ones(32, dtype=torch.int32)),
        ["model.safetensors", LAST, "int32", "floating"],
    ),
    "a tensor twice": (
        sharded(lambda first, second: second.update({FIRST: first[FIRST] + 1})),
        [FIRST, "model-00001-of-00002.safetensors", SHARD, "twice"],
    ),
    "a wrapper's names": (renamed(lambda name: f"_orig_mod.{name}"), ["'_orig_mod.'", "a wrapper", "save_pretrained"]),
    "a classifier": (
        then(config(architectures=["GPT2ForSequenceClassification"]), tensors(score__weight=torch.ones(2, 32))),
        ["no place for score.weight", "GPT2ForSequenceClassification", "the next token"],
    ),
    "no finite numbers": (
        tensors(transformer__ln_f__weight=torch.full((32,), float("nan"))),
        ["model.safetensors", LAST, "not finite in float32"],
    ),
    "nothing but zeros": (
        tensors(transformer__wte__weight=torch.zeros_like),
        ["model.safetensors", EMBEDDINGS, "nothing but zeros"],
    ),
    # files
    "no weights": (without("model.safetensors"), ["model.safetensors", "no weights"]),
    "a tokenizer alone": (only("tokenizer.json", "tokenizer_config.json"), ["config.json", "tokenizer.json"]),
    "weights cut": (cut("model.safetensors", 0.5), ["model.safetensors", "truncated", "again"]),
    "empty weights": (cut("model.safetensors", 0), ["model.safetensors", "empty"]),
    "a pointer to weights": (text("model.safetensors", POINTER), ["model.safetensors", "git lfs pull"]),
    "a link to nowhere": (
        then(without("model.safetensors"), lambda folder: (folder / "model.safetensors").symlink_to("gone/blob")),
        ["model.safetensors", "gone/blob", "not there"],
    ),
    "a shard gone": (then(sharded(), without(SHARD)), ["model.safetensors.index.json", SHARD, "not there"]),
    "an index without a map": (sharded(weight_map=None), ["model.safetensors.index.json", "weight_map"]),
    "a .bin cut": (then(as_bin(), cut("pytorch_model.bin", 0.5)), ["pytorch_model.bin", "truncated"]),
    "a .bin with a tensor less": (as_bin(lambda held: held.pop(LAST)), ["pytorch_model.bin", LAST, "missing"]),
    "code in a .bin": (bombed, ["pytorch_model.bin", "nothing in it was run"]),
    # config.json
    "a config cut": (cut("config.json", 0.5), ["config.json", "JSON"]),
    "no model_type": (config(model_type=None), ["config.json", "model_type"]),
    "a model_type of nobody's": (config(model_type="nobodys"), ["config.json", "'nobodys'", "FAMILIES"]),
    "a half layer": (config(n_layer=1.5), ["config.json", "n_layer", "1.5"]),
    "heads that don't divide": (config(n_head=5), ["config.json"]),
    "how to generate, cut": (cut("generation_config.json", 0.5), ["generation_config.json", "JSON"]),
    # what is no base
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["config.json", "gptq", "quantised", "base_model", "dequanti"],
    ),
    "quantised in 8 bits": (config(quantization_config={"load_in_8bit": True}), ["config.json", "bitsandbytes"]),
    "an adapter beside it": (
        text("adapter_config.json", json.dumps(ADAPTER)),
        ["adapter_config.json", "somebody/base", "merge"],
    ),
    "a model with code of its own": (own_code, ["config.json", "auto_map", "modeling_own", "never run"]),
    "a hub's kernels": (config(attn_implementation="some/kernel"), ["attn_implementation", "some/kernel", "never run"]),
    "our own export": (exported, ["config.json", "an exported patched model", "its base is the/base"]),
    "a patch's folder": (
        then(only("tokenizer.json"), text("patch_config.json", "{}")),
        ["patch_config.json", "a patch", "base"],
    ),
    "a run's folder": (
        then(only("tokenizer.json"), lambda folder: (folder / "ledger").mkdir()),
        ["config.json", "not there", "a run"],
    ),
}
PROBED = {"a tensor gone", "a .bin cut", "quantised", "an adapter beside it", "a model with code of its own"}
"""What is given to another command too."""
LOADED = {"no finite numbers", "nothing but zeros"}
"""What is seen when the base is loaded, and not before."""


@pytest.fixture(scope="module")
def stored(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base to be copied and spoiled."""
    return save_base(tmp_path_factory.mktemp("stored") / "base_model", toy.tokenizer)


def spoiled(stored: Path, tmp_path: Path, spoil: Spoil) -> Path:
    folder = Path(shutil.copytree(stored, tmp_path / "base_model"))
    spoil(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_a_spoiled_base_is_refused_in_one_line(
    name: str, stored: Path, toy: Toy, tmp_path: Path, revpatch: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from revpatch.train import run

    monkeypatch.setattr(run, "process_group", lambda *_: pytest.fail("a process group was formed"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a person was asked"))
    spoil, words = REFUSED[name]
    folder = spoiled(stored, tmp_path, spoil)
    told = []
    if name not in LOADED:
        train = revpatch("train", toy.config_file(tmp_path, base={"model": str(folder)}))
        one_line(train, f"base.model = {folder}: ", *words)
        told.append(train.err)
    if name in PROBED | LOADED:
        options = "--dtype", "float32", "--shards", toy.shards("base_probe")
        probe = revpatch("probe", "--patch", "none", "--base", folder, *options)
        one_line(probe, folder, *words)
        told.append(probe.err)
    assert not any(word in err for err in told for word in ("no such", "hub", "Error(")), told
    assert not (folder / "it ran").exists() and not (tmp_path / "run").exists()


def as_gpt2_on_the_hub(folder: Path) -> None:
    """GPT-2's own files: no `transformer.` before the names, and masks among the tensors."""
    held = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    for layer in range(2):
        held[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        held[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(held, folder / "model.safetensors")


def bin_shards(folder: Path) -> None:
    sharded()(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    for name in set(index["weight_map"].values()):
        torch.save(load_file(folder / name), folder / name.replace("safetensors", "bin"))
        (folder / name).unlink()
    index["weight_map"] = {key: name.replace("safetensors", "bin") for key, name in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


TAKEN: dict[str, Spoil] = {
    "GPT-2's names on the hub": as_gpt2_on_the_hub,
    "shards": sharded(),
    "an old .bin with a head": as_bin(
        lambda held: held.update({"lm_head.weight": held[EMBEDDINGS]}), _use_new_zipfile_serialization=False
    ),
    "shards of .bin": bin_shards,
    "float64": tensors(transformer__ln_f__weight=lambda was: None if was is None else was.double()),
    "a head alone, tied": renamed(lambda name: name.replace(EMBEDDINGS, "lm_head.weight")),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_base_in_another_form_is_taken_and_is_the_same(name: str, stored: Path, tmp_path: Path) -> None:
    folder = spoiled(stored, tmp_path, TAKEN[name])
    Base.find(str(folder)).check()
    expected = base_sha256(load_base(str(stored), None, torch.float32))
    assert base_sha256(load_base(str(folder), None, torch.float32)) == expected


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True)])
def test_other_families_are_taken(family: str, tied: bool, tmp_path: Path) -> None:
    settings, kind = GATED[family]
    knobs = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": tied}
    model = kind(settings(**knobs, **heads))
    model.save_pretrained(tmp_path)
    tensors(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))(tmp_path)  # as older files have it
    assert base_sha256(load_base(str(tmp_path), None, torch.float32)) == base_sha256(model)
    tensors(model__norm__weight=lambda _: None)(tmp_path)
    with pytest.raises(BaseError, match=r"model\.norm\.weight is missing"):
        Base.find(str(tmp_path)).check()


def test_a_base_of_a_hub_is_held_to_the_same(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: Toy, revpatch: Call
) -> None:
    """From the cache, as on a machine without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repo, commit = tmp_path / "cache/models--some--base", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit, encoding="utf-8")
    folder = Path(shutil.copytree(stored, repo / "snapshots" / commit))
    config_file = toy.config_file(tmp_path, base={"model": "some/base"})
    assert base_sha256(load_base("some/base", None, torch.float32)) == base_sha256(
        load_base(str(stored), None, torch.float32)
    )
    tensors(transformer__ln_f__weight=lambda _: None)(folder)
    one_line(revpatch("train", config_file), "base.model = some/base: ", folder / "model.safetensors", LAST, "missing")
    sharded()(folder)
    (folder / SHARD).unlink()
    Base.find("some/base").check()  # the rest would be fetched
    text("adapter_config.json", json.dumps(ADAPTER))(folder)
    one_line(revpatch("train", config_file), "base.model = some/base: ", "adapter_config.json", "merge")
    nowhere = toy.config_file(tmp_path, base={"model": "some/other"})
    one_line(revpatch("train", nowhere), "base.model = some/other: no such local folder", "the hub")
    for name, words in {"/models/base": "/models/base", "runs/a/b": Path("runs/a/b").absolute()}.items():
        told = revpatch("train", toy.config_file(tmp_path, base={"model": name}))
        one_line(told, f"base.model = {name}: no such local folder", words, "correct the path")
        assert "repo_type" not in told.err
    one_line(revpatch("train", toy.config_file(tmp_path, base={"model": str(config_file)})), "is a file")


def test_code_in_a_folder_is_not_run_by_what_takes_the_base(
    stored: Path, toy: Toy, tmp_path: Path, revpatch: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer's class, and a way of generating; transformers has classes of its own for both."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a person was asked"))
    folder = spoiled(stored, tmp_path, lambda folder: (folder / "custom_generate").mkdir())
    for name in ("tokenization_own.py", "custom_generate/generate.py"):
        (folder / name).write_text(f"open({str(folder / 'it ran')!r}, 'w')\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **own}), encoding="utf-8")
    revpatch("probe", "--patch", "none", "--base", folder, "--shards", toy.shards("base_probe"))
    assert not (folder / "it ran").exists()
