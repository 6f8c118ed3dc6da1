"""The bundled demo shards are what their manifests and recipes say, and nothing held out is trained on."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from revpatch.config.file import load_config
from revpatch.corpus.tokenizer import tokenizer_fingerprint
from revpatch.shards.shard_set import ShardSet

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "shards/demo"
SETS = sorted(path.name for path in DEMO.iterdir())
CORPORA = [name for name in SETS if not name.endswith("_probe")]
SHINGLE = 30
"""Words in a row that no two texts share by chance, or for a phrase that both quote."""


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "shards/demo_base")


@cache
def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def documents_in(name: str) -> list[str]:
    """The texts of a set, as they come out of its blocks; a tokenizer's round trip is exact."""
    shards = ShardSet(DEMO / name)
    row = shards.read(np.arange(len(shards))).reshape(-1)
    ends = np.flatnonzero(row == tokenizer().eos_token_id)
    return [tokenizer().decode(ids[ids != tokenizer().eos_token_id]) for ids in np.split(row, ends + 1)]


def shingles(texts: list[str]) -> set[tuple[str, ...]]:
    return {
        tuple(words[i : i + SHINGLE])
        for words in (text.split() for text in texts)
        for i in range(max(1, len(words) - SHINGLE + 1))
        if words
    }


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_what_its_manifest_says(name: str) -> None:
    with ShardSet(DEMO / name) as shards:
        shards.verify()
        manifest = shards.manifest
    assert manifest.block_size == load_config(ROOT / "configs/demo.yaml").base.block_size
    assert manifest.tokenizer.fingerprint == tokenizer_fingerprint(tokenizer())
    assert manifest.tokens == manifest.blocks * manifest.block_size + manifest.dropped_tokens
    assert manifest.note
    assert manifest.licence
    shards_files = {shard.name for shard in manifest.shards}
    assert {path.name for path in (DEMO / name).iterdir()} == {"manifest.json", *shards_files}
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', (DEMO / name / "manifest.json").read_text(encoding="utf-8"))
    assert [s for s in strings if s.startswith(("/", "~", "file:"))] == [], "it names a folder of a machine"


def test_the_tool_builds_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_demo_shards.py", "--out", str(tmp_path / "demo")])
    tool("make_demo_shards").main()
    found, expected = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (tmp_path / "demo", DEMO)
    )
    assert found.keys() == expected.keys()
    assert [key for key in found if found[key] != expected[key]] == []


def test_no_passage_of_a_probe_is_trained_on() -> None:
    """Neither by the phase itself, nor by what is replayed, nor by any other phase."""
    trained = {name: documents_in(name) for name in CORPORA}
    read = {name: shingles(texts) for name, texts in trained.items()}
    for name in CORPORA:
        probe = documents_in(f"{name}_probe")
        held_out, long = shingles(probe), {text.strip() for text in probe if len(text) > 40}
        assert len(held_out) > 50
        for other in CORPORA:
            assert not held_out & read[other], f"{name}_probe and {other} share {SHINGLE} words in a row"
            assert not long & {text.strip() for text in trained[other]}


@pytest.mark.slow
def test_the_base_comes_out_the_same_from_its_seed(tmp_path: Path) -> None:
    """A few steps of its pretraining, twice; and the vocabulary, which is trained whole, is the bundled one."""
    make = tool("make_demo_base")
    text, _ = make.texts()
    made = make.train_tokenizer(text, make.VOCABULARY)
    made.save_pretrained(tmp_path)
    bundled = (ROOT / "shards/demo_base/tokenizer.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == bundled
    blocks = make.encode(made, text, make.BLOCK)
    one, two = (make.new_model(made, seed=0) for _ in range(2))
    begun = {name: value.clone() for name, value in one.state_dict().items()}
    for model in (one, two):
        make.pretrain(model, blocks, steps=3, batch=32, lr=2e-3, seed=0)
    moved = [name for name, value in one.state_dict().items() if not value.equal(begun[name])]
    assert "transformer.wte.weight" in moved
    assert all(value.equal(two.state_dict()[name]) for name, value in one.state_dict().items())
