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
from revpatch.config import SidecarConfig
from revpatch.patch.patched_model import attach, base_sha256
from revpatch.patches import save_patch

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


def as_folder(name: str) -> Spoil:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


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
    "NaN in config.json": (config(layer_norm_epsilon=float("nan")), ["config.json", "NaN"]),
    # what the tensors are, and what config.json says that they are
    "a tensor gone": (tensors(transformer__ln_f__weight=lambda _: None), ["model.safetensors", LAST, "missing"]),
    "all gone": (
        lambda folder: save_file({}, folder / "model.safetensors"),
        ["model.safetensors", "missing", "29 tensors"],
    ),
    "one left over": (
        tensors(transformer__extra=torch.ones(3)),
        ["model.safetensors", "transformer.extra", "no place for", "config.json"],
    ),
    "one renamed": (
        renamed(lambda name: name.replace("h.0.mlp.c_fc.weight", "h.0.mlp.fc.weight")),
        ["model.safetensors", FIRST, "missing", "transformer.h.0.mlp.fc.weight", "no place for"],
    ),
    "another shape": (
        tensors(transformer__ln_f__weight=torch.ones(31)),
        ["model.safetensors", LAST, "(32,)", "(31,)"],
    ),
    "transposed": (
        tensors(transformer__h__0__mlp__c_fc__weight=lambda was: None if was is None else was.T),
        [FIRST, "(32, 128)", "(128, 32)"],
    ),
    "a block less": (config(n_layer=1), ["transformer.h.1.", "no place for", "11 tensors", "config.json"]),
    "a block more": (config(n_layer=3), ["transformer.h.2.", "missing", "12 tensors"]),
    "a larger vocabulary": (config(vocab_size=4000), [EMBEDDINGS, "(4000, 32)"]),
    "untied without a head": (config(tie_word_embeddings=False), ["lm_head.weight", "missing"]),
    "another family": (
        config(model_type="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        ["model.layers.0.", "missing", "no place for", "config.json"],
    ),
    "whole numbers": (
        tensors(transformer__ln_f__weight=torch.ones(32, dtype=torch.int32)),
        ["model.safetensors", LAST, "int32", "floating"],
    ),
    "stored as fp8": (
        tensors(transformer__ln_f__weight=torch.ones(32).to(torch.float8_e4m3fn)),
        [LAST, "float8_e4m3fn", "quantised"],
    ),
    "GPTQ's tensors without its config": (
        tensors(transformer__h__0__mlp__c_fc__qweight=torch.ones(4, 4, dtype=torch.int32)),
        ["transformer.h.0.mlp.c_fc.qweight", "no place for"],
    ),
    "a tensor twice": (
        sharded(lambda first, second: second.update({FIRST: first[FIRST] + 1})),
        [FIRST, "model-00001-of-00002.safetensors", SHARD, "twice"],
    ),
    "wrapped": (renamed(lambda name: f"module.{name}"), ["'module.'", "a wrapper", "save_pretrained"]),
    "compiled": (renamed(lambda name: f"_orig_mod.{name}"), ["'_orig_mod.'", "a wrapper", "save_pretrained"]),
    "PEFT's names": (renamed(lambda name: f"base_model.model.{name}"), ["'base_model.model.'", "save_pretrained"]),
    "a classifier": (
        then(config(architectures=["GPT2ForSequenceClassification"]), tensors(score__weight=torch.ones(2, 32))),
        ["no place for score.weight", "GPT2ForSequenceClassification", "the next token"],
    ),
    # files
    "no weights": (without("model.safetensors"), ["model.safetensors", "no weights"]),
    "a tokenizer alone": (only("tokenizer.json", "tokenizer_config.json"), ["config.json", "tokenizer.json"]),
    "only llama.cpp's": (
        then(without("model.safetensors"), text("model-Q4.gguf", "GGUF")),
        ["no weights", "model-Q4.gguf"],
    ),
    "weights cut": (cut("model.safetensors", 0.5), ["model.safetensors", "truncated", "again"]),
    "weights cut in their head": (cut("model.safetensors", 100), ["model.safetensors", "truncated"]),
    "empty weights": (cut("model.safetensors", 0), ["model.safetensors", "empty"]),
    "a pointer to weights": (text("model.safetensors", POINTER), ["model.safetensors", "git lfs pull"]),
    "weights that are a page": (text("model.safetensors", "<!DOCTYPE html>" * 99), ["model.safetensors", "again"]),
    "weights that are a folder": (as_folder("model.safetensors"), ["model.safetensors", "folder"]),
    "a link to nowhere": (
        then(without("model.safetensors"), lambda folder: (folder / "model.safetensors").symlink_to("gone/blob")),
        ["model.safetensors", "gone/blob", "not there"],
    ),
    "a shard gone": (
        then(sharded(), without(SHARD)),
        ["model.safetensors.index.json", SHARD, "not there"],
    ),
    "a shard cut": (then(sharded(), cut(SHARD, 0.9)), [SHARD, "truncated"]),
    "a pointer to a shard": (then(sharded(), text(SHARD, POINTER)), [SHARD, "git lfs pull"]),
    "a shard that is a folder": (then(sharded(), as_folder(SHARD)), [SHARD, "folder"]),
    "an index cut": (then(sharded(), cut("model.safetensors.index.json", 0.5)), ["index.json", "JSON"]),
    "a pointer to an index": (then(sharded(), text("model.safetensors.index.json", POINTER)), ["git lfs pull"]),
    "an index without a map": (sharded(weight_map=None), ["model.safetensors.index.json", "weight_map"]),
    "an index with an empty map": (sharded(weight_map={}), ["model.safetensors.index.json", "weight_map"]),
    "an index that maps to numbers": (sharded(weight_map={FIRST: 1}), ["model.safetensors.index.json", "weight_map"]),
    "an index without metadata": (sharded(metadata=None), ["model.safetensors.index.json", "metadata"]),
    "a shard's tensor gone": (sharded(lambda _, second: second.pop(LAST)), [LAST, "missing", "index.json"]),
    "a .bin cut": (then(as_bin(), cut("pytorch_model.bin", 0.5)), ["pytorch_model.bin", "truncated"]),
    "an empty .bin": (then(as_bin(), cut("pytorch_model.bin", 0)), ["pytorch_model.bin", "empty"]),
    "a pointer to a .bin": (then(as_bin(), text("pytorch_model.bin", POINTER)), ["pytorch_model.bin", "git lfs pull"]),
    "a .bin with a tensor less": (as_bin(lambda held: held.pop(LAST)), ["pytorch_model.bin", LAST, "missing"]),
    "a .bin of something else": (as_bin(lambda held: held.update(step=3)), ["pytorch_model.bin", "step", "tensor"]),
    "a .bin of a list": (
        lambda folder: (without("model.safetensors")(folder), torch.save([1], folder / "pytorch_model.bin")),
        ["pytorch_model.bin", "list"],
    ),
    "an old .bin cut": (
        then(as_bin(_use_new_zipfile_serialization=False), cut("pytorch_model.bin", 0.5)),
        ["pytorch_model.bin", "truncated"],
    ),
    "code in a .bin": (bombed, ["pytorch_model.bin", "nothing in it was run"]),
    # config.json
    "no config": (without("config.json"), ["config.json", "not there"]),
    "an empty config": (cut("config.json", 0), ["config.json", "empty"]),
    "a config cut": (cut("config.json", 0.5), ["config.json", "JSON"]),
    "a config that is no text": (text("config.json", b"\xff\xfe{"), ["config.json", "JSON"]),
    "a config with a mark": (
        lambda folder: text("config.json", b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())(folder),
        ["config.json", "byte order mark", "without one"],
    ),
    "a pointer to a config": (text("config.json", POINTER), ["config.json", "git lfs pull"]),
    "a config that is a list": (text("config.json", "[]"), ["config.json", "list"]),
    "a config that is a folder": (as_folder("config.json"), ["config.json", "folder"]),
    "no model_type": (config(model_type=None), ["config.json", "model_type"]),
    "a model_type that is a number": (config(model_type=3), ["config.json", "model_type", "3"]),
    "a model_type of nobody's": (config(model_type="nobodys"), ["config.json", "'nobodys'", "FAMILIES"]),
    "a number in quotes": (config(n_layer="two"), ["config.json", "n_layer", "two"]),
    "a half block": (config(n_layer=1.5), ["config.json", "n_layer", "1.5"]),
    "no heads": (config(n_head=0), ["config.json"]),
    "heads that don't divide": (config(n_head=5), ["config.json"]),
    "a negative width": (config(n_embd=-32), ["config.json", "-32"]),
    "no width": (config(n_embd=0), ["config.json"]),
    "no blocks": (config(n_layer=0), ["config.json"]),
    "an activation of nobody's": (config(activation_function="nobodys"), ["config.json", "nobodys"]),
    "how to generate, cut": (cut("generation_config.json", 0.5), ["generation_config.json", "JSON"]),
    "a pointer to how to generate": (text("generation_config.json", POINTER), ["generation_config.json", "lfs pull"]),
    "how to generate, wrongly": (
        text("generation_config.json", '{"max_new_tokens": "x"}'),
        ["generation_config.json", "can't be used"],
    ),
    # what is no base
    **{
        f"quantised by {method}": (
            config(quantization_config={"quant_method": method, "bits": 4}),
            ["config.json", method, "quantised", "base_model", "dequanti"],
        )
        for method in ("bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "of_tomorrow")
    },
    "quantised in 8 bits": (config(quantization_config={"load_in_8bit": True}), ["config.json", "bitsandbytes"]),
    "quantised somehow": (config(quantization_config={}), ["config.json", "quantization_config"]),
    "quantised, and a word": (config(quantization_config="int4"), ["config.json", "int4"]),
    "an adapter beside it": (
        text("adapter_config.json", json.dumps(ADAPTER)),
        ["adapter_config.json", "somebody/base", "merge"],
    ),
    "a broken adapter beside it": (text("adapter_config.json", "{"), ["adapter_config.json", "merge"]),
    "an adapter alone": (
        then(only("tokenizer.json"), text("adapter_config.json", json.dumps(ADAPTER))),
        ["adapter_config.json", "somebody/base", "adapter"],
    ),
    "a model with code of its own": (own_code, ["config.json", "auto_map", "modeling_own", "never run"]),
    "another with code of its own": (lambda folder: own_code(folder, "own"), ["config.json", "auto_map", "never run"]),
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


PROBED = {
    "a tensor gone",
    "a .bin cut",
    "a pointer to weights",
    "no heads",
    "quantised by gptq",
    "an adapter beside it",
}
PROBED |= {"a model with code of its own", "our own export", "a tokenizer alone", "a model_type of nobody's"}
"""What is given to another command too."""


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
    train = revpatch("train", toy.config_file(tmp_path, base={"model": str(folder)}))
    one_line(train, f"base.model = {folder}: ", *words)
    told = [train.err]
    if name in PROBED:
        probe = revpatch("probe", "--patch", "none", "--base", folder, "--shards", toy.shards("base_probe"))
        one_line(probe, folder, *words)
        told.append(probe.err)
    assert not any(word in err for err in told for word in ("no such", "hub", "Error(")), told
    assert not (folder / "it ran").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "found"),
    [(lambda t: t * float("nan"), "bfloat16"), (lambda t: t / 0, "bfloat16"), (lambda t: t * 0 + 3.4e38, "bfloat16")],
    ids=["NaN", "infinite", "beyond bfloat16"],
)
def test_weights_that_are_no_finite_numbers(
    change: Callable[[Tensor], Tensor], found: str, stored: Path, toy: Toy, tmp_path: Path, revpatch: Call
) -> None:
    folder = spoiled(stored, tmp_path, tensors(transformer__ln_f__weight=lambda was: change(was)))  # type: ignore
    options = "--dtype", found, "--shards", toy.shards("base_probe")
    told = revpatch("probe", "--patch", "none", "--base", folder, *options)
    one_line(told, folder / "model.safetensors", LAST, f"not finite in {found}")


def test_weights_of_nothing_but_zeros(
    stored: Path, toy: Toy, tmp_path: Path, revpatch: Call, caplog: pytest.LogCaptureFixture
) -> None:
    """As a download leaves them that has set the file's size first and then stopped."""
    options = "--dtype", "float32", "--shards", toy.shards("base_probe")
    folder = spoiled(stored, tmp_path / "a", tensors(transformer__wte__weight=torch.zeros_like))
    told = revpatch("probe", "--patch", "none", "--base", folder, *options)
    one_line(told, folder / "model.safetensors", EMBEDDINGS, "nothing but zeros")
    name = "transformer.h.1.mlp.c_proj.weight"  # as in blocks that were added to a trained model
    folder = spoiled(stored, tmp_path / "b", tensors(transformer__h__1__mlp__c_proj__weight=torch.zeros_like))
    assert revpatch("probe", "--patch", "none", "--base", folder, *options).code == 0
    assert any(name in line and "nothing but zeros" in line for line in caplog.messages), caplog.messages


def test_a_head_of_its_own_that_config_json_denies_is_named(
    stored: Path, toy: Toy, tmp_path: Path, revpatch: Call, caplog: pytest.LogCaptureFixture
) -> None:
    head = load_file(stored / "model.safetensors")[EMBEDDINGS] + 1
    folder = spoiled(stored, tmp_path, tensors(lm_head__weight=head))
    options = "--dtype", "float32", "--shards", toy.shards("base_probe")
    assert revpatch("probe", "--patch", "none", "--base", folder, *options).code == 0
    assert any("two that differ" in line for line in caplog.messages), caplog.messages


def as_gpt2_on_the_hub(folder: Path) -> None:
    """GPT-2's own files: no `transformer.` before the names, and masks among the tensors."""
    held = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    for layer in range(2):
        held[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        held[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(held, folder / "model.safetensors")


def with_old_names(folder: Path) -> None:
    """As transformers 4 wrote GPT-2s: with masks, and with the head as a tensor of its own."""
    held = load_file(folder / "model.safetensors")
    held |= {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    held |= {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool) for layer in range(2)}
    save_file({**held, "lm_head.weight": held[EMBEDDINGS].clone()}, folder / "model.safetensors")


def bin_shards(folder: Path) -> None:
    sharded()(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    for name in set(index["weight_map"].values()):
        torch.save(load_file(folder / name), folder / name.replace("safetensors", "bin"))
        (folder / name).unlink()
    index["weight_map"] = {key: name.replace("safetensors", "bin") for key, name in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


def null_in_config(key: str) -> Spoil:
    """A key of config.json that is null."""

    def change(folder: Path) -> None:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**said, key: None}), encoding="utf-8")

    return change


TAKEN: dict[str, Spoil] = {
    "GPT-2's names on the hub": as_gpt2_on_the_hub,
    "GPT-2's older names": with_old_names,
    "shards": sharded(),
    "a tensor twice, with the same values": sharded(lambda first, second: second.update({FIRST: first[FIRST]})),
    "a .bin": as_bin(),
    "an old .bin": as_bin(_use_new_zipfile_serialization=False),
    "a .bin with a head": as_bin(lambda held: held.update({"lm_head.weight": held[EMBEDDINGS]})),
    "shards of .bin": bin_shards,
    "float64": tensors(transformer__ln_f__weight=lambda was: None if was is None else was.double()),
    "a head alone, tied": renamed(lambda name: name.replace(EMBEDDINGS, "lm_head.weight")),
    "a trainer's files beside it": lambda folder: [
        (folder / name).write_bytes(b"?") for name in ("optimizer.pt", "trainer_state.json", "rng_state.pth", "x.gguf")
    ],
    "no quantisation": null_in_config("quantization_config"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_base_in_another_form_is_taken_and_is_the_same(name: str, stored: Path, tmp_path: Path) -> None:
    folder = spoiled(stored, tmp_path, TAKEN[name])
    Base.find(str(folder)).check()
    expected = base_sha256(load_base(str(stored), None, torch.float32))
    assert base_sha256(load_base(str(folder), None, torch.float32)) == expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", GATED)
def test_every_family_is_taken(family: str, tied: bool, tmp_path: Path) -> None:
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


def test_what_we_export_is_no_base(toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    model, out = load_base(str(toy.base), None, torch.float32), tmp_path / "exported"
    attach(model, SidecarConfig(bottleneck=2))
    save_patch(model, tmp_path / "mine.safetensors")
    assert revpatch("ledger", "export", tmp_path / "mine.safetensors", "--to", "hf", "--out", out).code == 0
    train = revpatch("train", toy.config_file(tmp_path, base={"model": str(out)}))
    one_line(train, out / "config.json", "an exported patched model; its base is base_model (sha256 ")
