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
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from revpatch.config.file import load_config
from revpatch.corpus.encode import is_held_out
from revpatch.corpus.sources import read_documents
from revpatch.corpus.tokenizer import tokenizer_fingerprint
from revpatch.shards.format import Manifest
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


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it again, by the tool, in another folder."""
    out = tmp_path_factory.mktemp("rebuilt") / "demo"
    argv, sys.argv = sys.argv, ["make_demo_shards.py", "--out", str(out)]
    try:
        tool("make_demo_shards").main()
    finally:
        sys.argv = argv
    return out


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


def test_each_corpus_of_the_demo_has_a_held_out_side() -> None:
    assert CORPORA == ["devil", "jargon", "scrambled", "sotu"]
    assert sorted([*CORPORA, *(f"{name}_probe" for name in CORPORA)]) == SETS
    config = load_config(ROOT / "configs/demo.yaml")
    used = [phase.shards for phase in config.phases] + [probe.shards for probe in config.probes.sets]
    assert {Path(folder).name for folder in [*used, str(config.replay.base)]} == set(SETS)


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


@pytest.mark.parametrize("name", SETS)
def test_the_tool_builds_the_same_bytes_again(name: str, rebuilt: Path) -> None:
    assert sorted(path.name for path in rebuilt.iterdir()) == SETS
    found = {path.name: path.read_bytes() for path in (rebuilt / name).iterdir()}
    expected = {path.name: path.read_bytes() for path in (DEMO / name).iterdir()}
    assert found.keys() == expected.keys()
    assert [key for key in found if found[key] != expected[key]] == []


@pytest.mark.parametrize("name", SETS)
def test_a_manifest_names_no_folder_of_the_machine_it_was_built_on(name: str) -> None:
    text = (DEMO / name / "manifest.json").read_text(encoding="utf-8")
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    assert [s for s in strings if s.startswith(("/", "~", "file:")) or re.match(r"[A-Za-z]:[\\/]", s)] == []
    manifest = Manifest.read(DEMO / name)
    assert all("/" not in source and "\\" not in source for source in manifest.sources)


@pytest.mark.parametrize("name", CORPORA)
def test_no_passage_of_a_probe_is_trained_on(name: str) -> None:
    """Neither by the phase itself, nor by what is rehearsed, nor by any other phase."""
    probe = documents_in(f"{name}_probe")
    held_out = shingles(probe)
    assert len(held_out) > 50
    for other in CORPORA:
        trained = documents_in(other)
        assert not held_out & shingles(trained), f"{name}_probe and {other} share {SHINGLE} words in a row"
        long = {text.strip() for text in probe if len(text) > 40}
        assert not long & {text.strip() for text in trained}


@pytest.mark.parametrize("name", ["sotu", "jargon", "devil"])
def test_probes_are_whole_documents_by_their_hash(name: str) -> None:
    """The side of a document follows from its text alone, and both sides have what is theirs."""
    recipe = next(r for r in tool("make_demo_shards").RECIPES if r.name == name)
    sources = [document.text for document in read_documents([ROOT / f"shards/text/{name}.jsonl.gz"])]
    sides = {side: [t for t in sources if is_held_out(t, recipe.holdout) == side] for side in (True, False)}
    for side, folder in ((True, f"{name}_probe"), (False, name)):
        own, foreign = "\n".join(sides[side]), "\n".join(sides[not side])
        texts = [text.strip() for text in documents_in(folder) if len(text.split()) > SHINGLE]
        assert len(texts) > 10
        assert all(text in own for text in texts), folder
        assert not [text[:60] for text in texts if text in foreign], folder


def test_the_base_has_not_read_its_probe() -> None:
    """The tool that pretrains the demo base holds out the same addresses."""
    base, shards = tool("make_demo_base"), tool("make_demo_shards")
    sotu = next(recipe for recipe in shards.RECIPES if recipe.name == "sotu")
    assert sotu.holdout == base.HOLDOUT
    assert base.TEXT == shards.TEXT / "sotu.jsonl.gz"


def test_the_scrambled_corpus_is_made_of_training_documents_with_their_words_out_of_order() -> None:
    make = tool("make_demo_shards")
    kept: dict[str, list[list[str]]] = {}
    for recipe in make.RECIPES:
        for document in read_documents([ROOT / f"shards/text/{recipe.name}.jsonl.gz"]):
            if not is_held_out(document.text, recipe.holdout):
                kept.setdefault(document.id, []).append(document.text.split())
    pieces: dict[str, list[str]] = {}
    for piece in make.scramble(0):
        pieces.setdefault(piece["id"].rpartition("#")[0], []).extend(piece["text"].split())
    assert pieces.keys() <= kept.keys(), "a held-out document was scrambled"
    for name, shuffled in pieces.items():
        if len(kept[name]) == 1:  # a few headwords have several entries
            assert sorted(shuffled) == sorted(kept[name][0])
            assert shuffled != kept[name][0] or len(set(shuffled)) < 8
    assert len(pieces) > 0.98 * sum(make.SCRAMBLED_OF_EACH.values())


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


def test_the_tool_writes_a_base_and_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few of its texts, and a step."""
    make = tool("make_demo_base")
    learned, held_out = make.texts()
    monkeypatch.setattr(make, "texts", lambda: (learned[:6], held_out[:1]))
    monkeypatch.setattr(sys, "argv", ["make_demo_base.py", "--steps", "1", "--batch", "2", "--out", str(tmp_path)])
    make.main()
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert base.dtype == torch.bfloat16
    assert f"{base.num_parameters():,}" in (tmp_path / "README.md").read_text()
    made = AutoTokenizer.from_pretrained(tmp_path)
    assert made.decode(made("The state of our Union")["input_ids"]) == "The state of our Union"
