"""The interface for Python: its examples run, and patches come back from files and folders as they were, or not at
all."""

from __future__ import annotations

import doctest
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Toy, make_it_look_trained, save_base
from transformers import AutoModelForCausalLM

import revpatch
from revpatch.ledger.patch_file import FOLDER_WEIGHTS

KNOBS = revpatch.SidecarConfig(bottleneck=4, gate="token", placement="coupled", layers=[1])
IDS = torch.arange(3, 12)[None]


@pytest.mark.parametrize("module", sorted({home for home in revpatch._HOME.values() if home != "revpatch.config"}))
def test_the_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.failed == 0
    assert found.attempted > 5


def test_the_documented_functions_have_examples() -> None:
    for name in set(revpatch.__all__) - {"SidecarConfig", "Patch"}:
        assert f"revpatch.{name}(" in (getattr(revpatch, name).__doc__ or ""), name


def base(toy: Toy, folder: Path | None = None) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder or toy.base).eval()


@pytest.fixture
def patched(toy: Toy) -> Any:
    """The toy's base with a patch that looks trained."""
    model = base(toy)
    make_it_look_trained(revpatch.attach(model, KNOBS))
    return model


SAVE: dict[str, Callable[[Any, Path], None]] = {
    "folder": revpatch.save_pretrained,
    "mine.safetensors": revpatch.save_patch,
}


@torch.no_grad()
@pytest.mark.parametrize("name", SAVE)
def test_a_patch_comes_back_as_it_was(toy: Toy, patched: Any, tmp_path: Path, name: str) -> None:
    place, expected = tmp_path / "x" / name, patched(IDS).logits
    place.parent.mkdir()
    SAVE[name](patched, place)
    SAVE[name](patched, place)  # the same again changes nothing
    model = base(toy)
    patch = revpatch.load_patch(model, place)
    assert patch.config == KNOBS
    assert torch.equal(model(IDS).logits, expected)
    found, tokenizer = revpatch.load_patched(place)
    assert torch.equal(found(IDS).logits, expected), "the base is found by its name"
    assert tokenizer.get_vocab() == toy.tokenizer.get_vocab()
    moved = base(toy, shutil.copytree(toy.base, tmp_path / "moved"))
    revpatch.load_patch(moved, place, name="b")
    assert revpatch.patch_names(moved) == ["b"]
    with pytest.raises(ValueError, match="exists with other content"):
        SAVE[name](revpatch.Patch(32, 2, KNOBS), place)


def test_a_second_patch_is_put_beside_the_first_and_switched_on(toy: Toy, patched: Any, tmp_path: Path) -> None:
    revpatch.save_pretrained(patched, tmp_path / "one")
    expected = patched(IDS).logits
    model = base(toy)
    revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2), name="new")
    plain = model(IDS).logits
    revpatch.from_pretrained(model, tmp_path / "one", name="loaded")
    assert torch.equal(model(IDS).logits, expected)
    revpatch.set_patch(model, "new")
    assert torch.equal(model(IDS).logits, plain)


def test_a_patch_by_itself_knows_no_base_but_the_shape(toy: Toy, tmp_path: Path) -> None:
    patch = make_it_look_trained(revpatch.Patch(32, 2, KNOBS))
    revpatch.save_pretrained(patch, tmp_path / "bare")
    revpatch.from_pretrained(base(toy), tmp_path / "bare")
    revpatch.load_patched(tmp_path / "bare", base=str(toy.base))
    with pytest.raises(ValueError, match=r"bare doesn't say what its base is called.*--base"):
        revpatch.load_patched(tmp_path / "bare")
    wide = base(toy, save_base(tmp_path / "wide", toy.tokenizer, width=16))
    with pytest.raises(ValueError, match=r"bare: 01\.channels: expected shape .* found"):
        revpatch.from_pretrained(wide, tmp_path / "bare")
    assert not revpatch.is_patched(wide)


def test_another_base_and_one_in_another_type_are_refused(toy: Toy, patched: Any, tmp_path: Path) -> None:
    """The latter is the right base: to name another would be of no help."""
    revpatch.save_pretrained(patched, tmp_path / "one")
    other = base(toy, save_base(tmp_path / "other", toy.tokenizer, seed=1))
    with pytest.raises(ValueError, match=r"one is a patch of a base with sha256 \w{16}…, but the model has \w{16}…"):
        revpatch.load_patch(other, tmp_path / "one")
    assert not revpatch.is_patched(other)
    words = r"a base in float32 with sha256 .* held in float16 .* so hold it in float32"
    with pytest.raises(ValueError, match=words):
        revpatch.load_patch(base(toy).half(), tmp_path / "one")


@pytest.mark.parametrize("data", [None, b"x"])
def test_a_folder_that_was_changed_is_refused(toy: Toy, patched: Any, tmp_path: Path, data: bytes | None) -> None:
    folder, model = tmp_path / "one", base(toy)
    revpatch.save_pretrained(patched, folder)
    file = folder / FOLDER_WEIGHTS
    file.write_bytes(data or file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        revpatch.from_pretrained(model, folder)
    assert not revpatch.is_patched(model)
