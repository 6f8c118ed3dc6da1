"""Exported patches are the patched model to the bit where there is no revpatch, and can be imported again."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from command import Result, one_line
from made_up import MadeUp, equal, patch_tensors
from past_events import add, reading
from safetensors.torch import load_file
from toy import POSITIONS, Toy
from transformers import AutoConfig, AutoModelForCausalLM

from revpatch.config import SidecarConfig
from revpatch.durable import new_folder
from revpatch.ledger.journal import Journal
from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.ledger.maintenance import verify
from revpatch.ledger.patch_file import tensors_digest, write_entry
from revpatch.patch import families
from revpatch.patch.patched_model import base_sha256, set_gate, switchboard
from revpatch.patches import load_patched, save_pretrained
from revpatch.surgery.exchange import export, import_patch
from revpatch.surgery.load_back import said
from revpatch.surgery.modeling import modeling_source

Make = Callable[..., MadeUp]
IDS = torch.tensor([[5, 80, 12, 7, 200, 31], [9, 9, 14, 3, 77, 120]])


def base_folder(toy: Toy, folder: Path, family: str) -> Path:
    """A tiny random base of a family with grouped queries; llama's and gpt_neox's head is its own."""
    if family == "gpt2":
        return Path(shutil.copytree(toy.base, folder))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": POSITIONS}
    tied = family not in ("llama", "gpt_neox")
    config = AutoConfig.for_model(
        family, vocab_size=len(toy.tokenizer), bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied, **sizes
    )
    config.initializer_range = 0.2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    toy.tokenizer.save_pretrained(folder)
    return folder


def write_patch(folder: Path, dtype: str, knobs: dict[str, Any]) -> Path:
    """The entry of a patch that looks trained, for the base in that folder."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    sidecar = SidecarConfig.model_validate({"bottleneck": 4, **knobs}).model_dump(mode="json")
    names = {"model": str(folder), "revision": None, "sha256": base_sha256(base, rounded=True), "dtype": dtype}
    file = folder.with_suffix(".safetensors")
    write_entry(file, patch_tensors(strength=1.0, **knobs), {"base": names, "sidecar": sidecar, "phase": "first"})
    return file


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are not loaded back, which takes seconds; for tests of something else."""
    monkeypatch.setattr("revpatch.surgery.exchange.prove", lambda *_: None)


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize(
    ("family", "dtype", "knobs"),
    [
        ("gpt2", "bfloat16", {"gate": "token", "layers": [1]}),
        ("llama", "float32", {"placement": "coupled"}),
        ("qwen2", "float32", {}),
        ("qwen3", "float32", {"normalize": "none"}),
    ],
)
def test_a_loaded_export_is_the_patched_model_to_the_bit(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str, knobs: dict[str, Any]
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    patch, out = write_patch(base_folder(toy, tmp_path / "base", family), dtype, knobs), tmp_path / "out"
    export(str(patch), "hf", out)
    model: Any = load_patched(patch)[0]
    weights = [*model.parameters(), *switchboard(model).attached.parameters()]
    expected = said(model, weights, lambda mode: set_gate(model, cast(Any, mode)), IDS, cached=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    found = said(loaded.eval(), list(loaded.parameters()), loaded.set_gate, IDS, cached=True)
    assert equal(found, expected)
    assert str(found["logits with the gates learned"].dtype).endswith(dtype)
    assert not torch.equal(found["logits with the gates learned"], found["logits with the gates off"])
    with loaded.patch_disabled(), torch.no_grad():
        assert torch.equal(loaded(IDS, use_cache=False).logits, found["logits with the gates off"])
    loaded.save_pretrained(tmp_path / "again")
    stored = load_file(out / "model.safetensors")
    assert equal(load_file(tmp_path / "again/model.safetensors"), stored)
    assert sum("lm_head" in name for name in stored) == (family == "llama"), "a tied head is stored once"


ODD = {"do_sample": False, "temperature": 0.6, "cache_implementation": "static", "eos_token_id": [0, 1]}
"""A generation_config.json of a kind that chat models have, and that transformers will not write."""


@pytest.mark.parametrize(
    ("family", "words"), [("gpt2", ()), ("gpt_neox", ("missing keys ['lm_head.weight']", "differ by up"))]
)
def test_without_revpatch_the_folders_load_and_are_the_patched_model_to_the_bit(
    toy: Toy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    revpatch: Callable[..., Any],
    family: str,
    words: tuple[str, ...],
) -> None:
    """A fresh process shows it, or the export is refused: of some families transformers gives the tensors other names,
    by the model_type, which an export's is not."""
    monkeypatch.setattr(sys, "executable", sys._base_executable)  # whose own packages are few: ours are on sys.path
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not Path(place, "revpatch").is_dir()])
    monkeypatch.setitem(families.FAMILIES, "gpt_neox", families.Family("gpt_neox", "gpt_neox.layers", "embed_out"))
    folder = base_folder(toy, tmp_path / "base", family)
    (folder / "generation_config.json").write_text(json.dumps(ODD), encoding="utf-8")
    patch = write_patch(folder, "float32", {"gate": "seq"})
    result = revpatch("ledger", "export", patch, "--to", "hf", "--out", tmp_path / "out")
    if words:
        one_line(Result(result.code, "", result.err), "--to safetensors writes the patch alone", *words)
        assert "to the bit" not in result.out
        assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]
    else:
        assert result.code == 0 and "fresh process" in result.out and "to the bit" in result.out, result
        how = json.loads((tmp_path / "out/generation_config.json").read_text(encoding="utf-8"))
        del how["transformers_version"]
        assert how == {key: value for key, value in ODD.items() if "cache" not in key} | {"use_cache": False}


def test_another_transformers_is_refused_with_the_one_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    source = modeling_source("GPT2LMHeadModel", "GPT2Config", "gpt2")
    monkeypatch.setitem(sys.modules, "transformers.utils.output_capturing", None)
    with pytest.raises(ImportError, match=rf"pip install transformers=={re.escape(transformers.__version__)}"):
        exec(compile(source, "modeling_revpatch.py", "exec"), {"__name__": "exported"})


@pytest.mark.usefixtures("unproved")
def test_the_card_is_filled_in_from_the_journal(toy: Toy, make_run: Make, tmp_path: Path) -> None:
    run = make_run()
    run.phase("first", patch_tensors(strength=0), patch_tensors(1))
    add(run.ledger.journal, "rollback", phase="second")
    sets = {"base": reading(3.25, 3.5)}
    run.ledger.record("commit", 1, "second", 6, patch_tensors(2), {**run.metadata, "phase": "second"}, sets=sets)
    export(str(run.directory), "hf", tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    sha256 = read_patch(run.directory).sha256
    for words in (
        "# model\n",
        "**first** (`000_first_commit.safetensors`",
        f"**second** (`001_second_commit.safetensors`, sha256 `{sha256[:16]}…`, 1 rollback)",
        "| base | 3.5000 | 3.2500 | 0.0300 |",
        sha256,
        run.metadata["base"]["sha256"],
        run.metadata["tokenizer"],
        "license: to be filled in",
        f"| torch {torch.__version__}, transformers {transformers.__version__} |",
    ):
        assert words in card, words
    both = card + (tmp_path / "model/config.json").read_text(encoding="utf-8")
    assert str(toy.folder) not in both, "where it lay on this machine says nothing on another"
    export(f"{run.directory}@000_first_commit", "hf", tmp_path / "earlier")
    assert "second" not in (tmp_path / "earlier/README.md").read_text(encoding="utf-8")


@pytest.fixture
def run(make_run: Make) -> MadeUp:
    run = make_run(config=False)
    run.phase("first", patch_tensors(strength=0), patch_tensors(1))
    return run


def test_an_entry_is_exported_alone_and_what_a_killed_export_left_is_replaced(run: MadeUp, tmp_path: Path) -> None:
    out, half = tmp_path / "out", tmp_path / ".out.unfinished/half"
    with (
        new_folder(out, "another export"),
        pytest.raises(FileExistsError, match=r"--out .*another process is writing there"),
    ):
        export(str(run.directory), "pt", out)
    out.rmdir()
    half.mkdir(parents=True)
    (half / "weights").write_bytes(b"half")
    (file,) = export(str(run.directory), "pt", out)
    packed, entry = torch.load(file, weights_only=True), read_patch(run.directory)
    assert file.name == "000_first_commit.pt" and packed["metadata"] == entry.metadata
    assert tensors_digest(packed["tensors"]) == tensors_digest(entry.tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("to", ["file", "safetensors", "hf", "save_pretrained"])
def test_a_patch_comes_back_as_the_newest_commit(
    run: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    source, phase = tmp_path / "out", "first"
    if to == "save_pretrained":
        save_pretrained(load_patched(run.directory)[0], source)
        phase = "imported"
    else:
        files = export(str(run.directory), "hf" if to == "hf" else "safetensors", source)
        source = files[0] if to == "file" else source
    if to == "hf":
        (source / "modeling_revpatch.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    exported = read_patch(run.directory)
    with monkeypatch.context() as killed:
        killed.setattr(Journal, "append", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # what it leaves is not in the way
            import_patch(source, tmp_path / "new")
    for target, number in ((run.directory, "001"), (tmp_path / "new", "000")):
        made = import_patch(source, target)
        assert made.name == f"{number}_{phase}_commit.safetensors"
        found = read_patch(target)
        assert equal(found.tensors, exported.tensors) and found.sha256 == made.sha256
        assert found.metadata["made_by"]["operation"] == "import"
        if to != "save_pretrained":
            assert found.metadata["made_by"]["sha256"] == exported.sha256
            assert found.metadata["tokenizer"] == run.metadata["tokenizer"]
        assert found.base["sha256"] == run.metadata["base"]["sha256"]
        assert found.metadata["sidecar"] == run.metadata["sidecar"]
        assert verify(target).ok
    assert read_patch(run.directory).base == exported.base
    assert not (tmp_path / "ran").exists(), "no code is run"


def test_how_a_patch_was_begun_does_not_keep_it_out(run: MadeUp, tmp_path: Path) -> None:
    sidecar = {**run.metadata["sidecar"], "init_scale": 0.5, "layers": [0, 1], "check_invertibility": False}
    metadata = {**run.metadata, "phase": "first", "sidecar": sidecar}
    write_entry(tmp_path / "other.safetensors", patch_tensors(2), metadata)
    assert import_patch(tmp_path / "other.safetensors", run.directory).name == "001_first_commit.safetensors"


GONE = ("it was a folder when", "base/mine", "the hub was not asked", "--base")


@pytest.mark.parametrize(
    ("noted", "moved", "words"),
    [
        ("folder", "", ()),
        ("folder", "the project", ()),
        ("folder", "the base", GONE),
        ("folder", "the base here", ()),  # there is one of that name where the command is given
        (None, "", ()),  # an older run: its config says where the project is
        ("hub", "the base", ("base/mine", "name its folder with --base")),
    ],
)
def test_a_run_finds_its_base_from_any_folder(
    toy: Toy,
    identity: dict[str, Any],
    tmp_path: Path,
    revpatch: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    noted: str | None,
    moved: str,
    words: tuple[str, ...],
) -> None:
    """The run's base was called base/mine in a project's folder; `noted` is what its journal says of it."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(toy.base, project / "base/mine")
    ledger, base = Ledger(project / "runs/x/ledger"), {**identity["base"], "model": "base/mine"}
    if noted is not None:
        place = str(project / "base/mine") if noted == "folder" else None
        add(ledger.journal, "run", base_at={"model": "base/mine", "folder": place})
    ledger.record("commit", 0, "first", 1, patch_tensors(1), {**identity, "base": base, "phase": "first"})
    (project / "runs/x/config.yaml").write_text("output_dir: runs/x\n", encoding="utf-8")
    if moved == "the project":
        project = project.rename(tmp_path / "other")
    elif moved:
        (project / "base").rename((elsewhere if "here" in moved else tmp_path) / "base")
    monkeypatch.chdir(elsewhere)
    result = revpatch("generate", "--patch", project / "runs/x", "--prompt", "the", "--max-new-tokens", "2", "--json")
    if words:
        one_line(result, *words)
        return
    assert result.code == 0, result
    if noted and not moved:
        for command in (
            ["import", project / "runs/x/ledger/000_first_commit.safetensors", "new"],
            ["restore", project / "runs/x", "--as-new-run", "new"],
        ):
            assert revpatch("ledger", *command).code == 0
            event = Ledger(Path("new/ledger"), readonly=True).journal.records()[-1]
            assert event["base_at"] == {"model": "base/mine", "folder": str(project / "base/mine")}
            shutil.rmtree("new")
