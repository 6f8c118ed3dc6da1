"""One phase on two ranks for the families that the toy world is not made of, and what becomes of its patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gated_families import GATED
from ranks import Runs, RunServer
from toy import BLOCK_SIZE, POSITIONS, Toy
from transformers import GPT2LMHeadModel

import revpatch
from revpatch.config import BaseConfig, ConfigError
from revpatch.corpus.build import build_shards
from revpatch.corpus.tokenizer import load_tokenizer
from revpatch.ledger.maintenance import verify
from revpatch.patch.families import FAMILIES
from revpatch.patch.patched_model import base_sha256
from revpatch.train.startup import load_frozen_base

TIED = ("qwen3",)
"""The families whose head is tied to the embeddings here; all have two heads for each of keys and values."""


def save_base(toy: Toy, family: str, folder: Path) -> None:
    torch.manual_seed(0)
    config, kind = GATED[family]
    tied = family in TIED
    knobs = {"vocab_size": len(toy.tokenizer), "max_position_embeddings": POSITIONS, "hidden_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": tied, "initializer_range": 0.2}
    kind(config(**knobs, **heads, **tokens, intermediate_size=48)).save_pretrained(folder)
    toy.tokenizer.save_pretrained(folder)


def test_every_family_is_trained_here_or_everywhere() -> None:
    assert FAMILIES.keys() == GATED.keys() | {"gpt2"}


def test_a_base_that_scales_its_logits_is_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GPT2LMHeadModel.forward

    def scaled(model: GPT2LMHeadModel, *args: Any, **kwargs: Any) -> Any:
        out = forward(model, *args, **kwargs)
        out.logits = out.logits / 4
        return out

    monkeypatch.setattr(GPT2LMHeadModel, "forward", scaled)
    config = BaseConfig.model_validate({"model": str(toy.base), "dtype": "float32"})
    with pytest.raises(ConfigError, match=r"base\.model = .*base_model: the model's logits are not its head's product"):
        load_frozen_base(config, torch.device("cpu"))


@pytest.mark.parametrize("family", GATED)
def test_a_family_is_trained_used_and_restored(family: str, toy: Toy, tmp_path: Path, server: RunServer) -> None:
    save_base(toy, family, tmp_path / "base")
    _, kind = GATED[family]
    tied = family in TIED
    model = kind.from_pretrained(tmp_path / "base").eval()
    before = base_sha256(model)
    tokenizer = load_tokenizer(str(tmp_path / "base"))  # not of the family's own class, which may split otherwise
    for name in ("base", "first"):
        build_shards([toy.folder / f"{name}.jsonl"], tokenizer, BLOCK_SIZE, tmp_path / f"{name}_shards")
    config = toy.config_file(
        tmp_path,
        base={"model": str(tmp_path / "base")},
        phases=[{"name": "first", "shards": str(tmp_path / "first_shards"), "steps": 24}],
        replay={"base": str(tmp_path / "base_shards")},
        probes={"sets": []},
        optimizer={"lr": 3.0e-2},
    )
    runs = Runs(server, config, tmp_path)
    assert runs.run("trained") == [0, 0], runs.log("trained").read_text()
    assert verify(runs.path("trained")).ok

    ids = tokenizer("kettle boils under seven moons", return_tensors="pt").input_ids[:, :BLOCK_SIZE]
    with torch.no_grad():
        base = model(ids, labels=ids)
        revpatch.load_patch(model, runs.path("trained"))
        learned = model(ids, labels=ids)
        assert learned.loss < base.loss - 0.1
        knobs = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **knobs), model.generate(ids, **knobs, use_cache=False))
        revpatch.detach(model)
        assert torch.equal(model(ids).logits, base.logits)
    assert base_sha256(model) == before
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
