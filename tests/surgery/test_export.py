"""Exported patches, loaded where there is no revpatch, are the patched model to the bit; and what export refuses."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command import Result, one_line
from made_up import MadeUp, patch_tensors
from past_events import add, reading
from safetensors.torch import load_file, save_file
from torch import nn
from toy import POSITIONS, Toy
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from revpatch.config import SidecarConfig
from revpatch.durable import new_folder
from revpatch.ledger.patch_file import read_entry, tensors_digest, write_entry
from revpatch.patch import families
from revpatch.patch.patched_model import Patch, base_sha256, patch_disabled, patch_state, switchboard
from revpatch.patches import load_patched
from revpatch.surgery.exchange import export
from revpatch.surgery.modeling import modeling_source

Make = Callable[..., MadeUp]
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "float32", {}),
    ("gpt2", "bfloat16", {"gate": "token", "layers": [1]}),
    ("gpt2", "float32", {"gate": "seq"}),
    ("llama", "float32", {"placement": "coupled"}),
    ("qwen2", "float32", {}),
    ("qwen3", "float32", {"normalize": "none"}),
]
IDS = torch.tensor([[5, 80, 12, 7, 200, 31], [9, 9, 14, 3, 77, 120]])


def base_folder(toy: Toy, tmp: Path, family: str) -> Path:
    """A tiny random base of a family with grouped queries; llama's head is its own, the others' are tied."""
    if family == "gpt2":
        return toy.base
    config, kind = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(
        config(
            vocab_size=len(toy.tokenizer),
            max_position_embeddings=POSITIONS,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=family not in ("llama", "gpt_neox"),
            initializer_range=0.2,
            **({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if "moe" in family else {}),
        )
    )
    model.save_pretrained(tmp / family)
    toy.tokenizer.save_pretrained(tmp / family)
    return tmp / family


def write_patch(
    toy: Toy, tmp: Path, number: int, family: str, dtype: str, knobs: dict[str, Any], folder: Path | None = None
) -> Path:
    """The entry of a patch that looks trained, for a base of that family."""
    from transformers import AutoModelForCausalLM

    folder = folder or base_folder(toy, tmp, family)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    sidecar = SidecarConfig.model_validate({"bottleneck": 4, **knobs})
    names = {"model": str(folder), "revision": None, "sha256": base_sha256(base, rounded=True), "dtype": dtype}
    metadata = {"base": names, "sidecar": sidecar.model_dump(mode="json"), "phase": "first", "probes": {"base": 3.5}}
    write_entry(tmp / f"{number}.safetensors", patch_tensors(strength=1.0, **knobs), metadata)
    return tmp / f"{number}.safetensors"


def aligned(model: nn.Module) -> nn.Module:
    """With copies of its weights. transformers maps files into memory, where a tensor may begin at any multiple of 4
    bytes; kernels add in an order that depends on it, so that equal weights give logits that differ in the last bit."""
    for parameter in [*model.parameters(), *switchboard(model).attached.parameters()]:
        parameter.data = parameter.data.clone()
    return model


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment that has every package but revpatch."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    for place in map(Path, sys.path):
        if place.name in ("site-packages", "dist-packages"):
            for path in place.iterdir():
                link = packages / path.name
                if "revpatch" not in path.name and not link.exists():
                    link.symlink_to(path)
    return venv / "bin/python"


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are not loaded back, which takes seconds; for tests of something else."""
    monkeypatch.setattr("revpatch.surgery.exchange.prove", lambda *_: None)


@pytest.mark.usefixtures("unproved")
def test_without_revpatch_the_folders_load_and_are_the_patched_model_to_the_bit(
    toy: Toy, tmp_path: Path, elsewhere: Path
) -> None:
    patches = [write_patch(toy, tmp_path, number, *case) for number, case in enumerate(CASES)]
    folders = [tmp_path / f"hf {number}" for number in range(len(CASES))]
    for patch, folder in zip(patches, folders, strict=True):
        export(str(patch), "hf", folder)
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [elsewhere, Path(__file__).with_name("isolated.py"), tmp_path / "ids.safetensors", tmp_path / "out", *folders],
        env={**kept, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, (patch, (family, dtype, knobs)) in enumerate(zip(patches, CASES, strict=True)):
            expected = of_the_patched_model(patch, cached=knobs.get("gate") != "seq")
            for key, tensor in expected.items():
                assert torch.equal(found[f"{number}.{key}"], tensor), (family, dtype, knobs, key)
            assert str(expected["logits"].dtype).endswith(dtype)
            assert not torch.equal(expected["logits"], expected["disabled"])
            assert found[f"{number}.text"].tolist() == toy.tokenizer("the patch learns")["input_ids"]
    finally:
        torch.set_num_threads(threads)


ODD = {"do_sample": False, "temperature": 0.6, "cache_implementation": "static", "eos_token_id": [0, 1]}
"""A generation_config.json of a kind that chat models have, and that transformers will not write."""


@pytest.mark.parametrize(
    ("family", "row", "words"),
    [
        ("gpt2", None, ()),
        ("gpt_neox", ("gpt_neox", "gpt_neox.layers", "embed_out"), ("missing keys ['lm_head.weight']", "differ by up")),
        pytest.param("qwen3_moe", ("model", "model.layers"), ("experts", "differ by up"), marks=pytest.mark.slow),
    ],
)
def test_an_export_is_what_a_fresh_process_loads_or_is_refused(
    toy: Toy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    revpatch: Callable[..., Any],
    family: str,
    row: tuple[str, ...] | None,
    words: tuple[str, ...],
) -> None:
    """Of some families transformers gives the tensors other names, by the model_type, which an export's is not."""
    monkeypatch.setattr(sys, "executable", sys._base_executable)  # whose own packages are few: ours are on sys.path
    if row is not None:
        monkeypatch.setitem(families.FAMILIES, family, families.Family(*row))
    folder = tmp_path / "base"
    shutil.copytree(base_folder(toy, tmp_path, family), folder)
    (folder / "generation_config.json").write_text(json.dumps(ODD), encoding="utf-8")
    patch = write_patch(toy, tmp_path, 0, family, "float32", {"gate": "seq"}, folder)
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


@torch.no_grad()
def of_the_patched_model(patch: Path, cached: bool) -> dict[str, torch.Tensor]:
    model: Any = aligned(load_patched(patch)[0])
    greedy = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=8, pad_token_id=0, use_cache=cached
    )
    logits = model(IDS, use_cache=cached).logits
    with patch_disabled(model):
        off = model(IDS, use_cache=False).logits
    return {"logits": logits, "greedy": greedy, "disabled": off, "off": off}


def test_the_code_is_the_patchs_own_and_needs_no_revpatch() -> None:
    source = modeling_source("GPT2LMHeadModel", "GPT2Config", "gpt2")
    tree = ast.parse(source)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not [name for name in imported if name is None or name.startswith(("revpatch", "pydantic"))]
    coupling = Path(sys.modules[Patch.__module__].__file__ or "").with_name("coupling.py").read_text(encoding="utf-8")
    assert coupling[coupling.index("class BottleneckMLP") :].strip() in source


def test_another_transformers_is_told_which_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    source = modeling_source("GPT2LMHeadModel", "GPT2Config", "gpt2")
    monkeypatch.setitem(sys.modules, "transformers.utils.output_capturing", None)
    with pytest.raises(ImportError, match=rf"pip install transformers=={re.escape(transformers.__version__)}"):
        exec(compile(source, "modeling_revpatch.py", "exec"), {"__name__": "exported"})


@pytest.mark.usefixtures("unproved")
def test_the_head_is_stored_once_where_it_is_tied(toy: Toy, tmp_path: Path) -> None:
    for number, (family, heads) in enumerate((("gpt2", 0), ("llama", 1), ("qwen2", 0))):
        export(str(write_patch(toy, tmp_path, number, family, "float32", {})), "hf", tmp_path / f"out{number}")
        names = list(load_file(tmp_path / f"out{number}/model.safetensors"))
        assert sum("lm_head" in name for name in names) == heads, family


@pytest.mark.usefixtures("unproved")
def test_the_card_is_filled_in_from_the_journal(toy: Toy, make_run: Make, tmp_path: Path) -> None:
    run = make_run()
    run.phase("first", patch_tensors(strength=0), patch_tensors(1))
    sets = {"base": reading(3.25, 3.5)}
    add(run.ledger.journal, "rollback", phase="second")
    run.ledger.record("commit", 1, "second", 6, patch_tensors(2), {**run.metadata, "phase": "second"}, sets=sets)
    export(str(run.directory), "hf", tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    newest = run.ledger.newest("commit")
    assert newest is not None
    for words in (
        "# model\n",
        "**first** (`000_first_commit.safetensors`",
        "**second** (`001_second_commit.safetensors`, sha256 `" + newest.sha256[:16] + "…`, 1 rollback)",
        "| base | 3.5000 | 3.2500 | 0.0300 |",
        newest.sha256,
        run.metadata["base"]["sha256"],
        run.metadata["tokenizer"],
        "license: to be filled in",
        f"| torch {torch.__version__}, transformers {transformers.__version__} |",
    ):
        assert words in card, words
    told = card + (tmp_path / "model/config.json").read_text(encoding="utf-8")
    assert str(toy.folder) not in told, "where it lay on this machine says nothing on another"
    export(f"{run.directory}@000_first_commit", "hf", tmp_path / "earlier")
    assert "second" not in (tmp_path / "earlier/README.md").read_text(encoding="utf-8")


def test_an_entry_is_exported_as_safetensors(make_run: Make, tmp_path: Path, revpatch: Callable[..., Any]) -> None:
    run = make_run(config=False)
    run.phase("first", patch_tensors(strength=0), patch_tensors(1))
    result = revpatch("ledger", "export", run.directory, "--to", "safetensors", "--out", tmp_path / "out", "--json")
    (file,) = json.loads(result.out)["files"]
    assert file == str(tmp_path / "out/000_first_commit.safetensors")
    tensors, metadata = read_entry(Path(file))
    expected, said = (patch := run.ledger.read("000_first_commit.safetensors")).tensors, patch.metadata
    assert metadata == said
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    (file,) = export(str(run.directory), "pt", tmp_path / "torch")
    packed = torch.load(file, weights_only=True)
    assert file.name == "000_first_commit.pt" and packed["metadata"] == said
    assert tensors_digest(packed["tensors"]) == tensors_digest(expected)


def test_nothing_is_overwritten_and_nothing_half_done_is_left(
    make_run: Make, tmp_path: Path, revpatch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(config=False)
    run.phase("first", patch_tensors(strength=0), patch_tensors(1))
    (tmp_path / "taken").mkdir()
    for args, words in (
        ((run.directory, "--out", tmp_path / "taken"), "Nothing was overwritten"),
        ((run.directory, "--to", "onnx", "--out", tmp_path / "x"), "--to onnx: expected one of safetensors, hf"),
        ((run.directory, "--to", "hf", "--base", tmp_path / "no", "--out", tmp_path / "x"), "name its folder with"),
        ((f"{run.directory}@/etc/passwd", "--out", tmp_path / "x"), "is looked at"),
    ):
        result = revpatch("ledger", "export", *args)
        assert (result.code, result.out) == (2, ""), result
        assert words in result.err and result.err.count("\n") == 1, result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken"]
    assert list((tmp_path / "taken").iterdir()) == []


def test_what_a_killed_export_left_does_not_stand_in_the_way(make_run: Make, tmp_path: Path) -> None:
    run = make_run(config=False)
    run.phase("first", patch_tensors(strength=0), patch_tensors(1))
    half = tmp_path / ".out.unfinished/half"
    with (
        new_folder(tmp_path / "out", "another export"),
        pytest.raises(FileExistsError, match=r"--out .*another process is writing there"),
    ):
        export(str(run.directory), "safetensors", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [], "the other one's"
    (tmp_path / "out").rmdir()
    half.mkdir(parents=True)
    (half / "weights").write_bytes(b"half")
    (file,) = export(str(run.directory), "safetensors", tmp_path / "out")
    assert file.name == "000_first_commit.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.usefixtures("unproved")
def test_what_was_exported_comes_back(toy: Toy, tmp_path: Path) -> None:
    """Read by transformers' own names, the weights are the base's and the patch's."""
    patch = write_patch(toy, tmp_path, 0, "gpt2", "float32", {})
    export(str(patch), "hf", tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    model, _ = load_patched(patch)
    for name, tensor in patch_state(model).items():
        assert torch.equal(weights.pop(f"revpatch.sidecars.{name}"), tensor)
    base = {name.replace(".block.", "."): tensor for name, tensor in weights.items()}
    assert all(torch.equal(tensor, base[name]) for name, tensor in load_file(toy.base / "model.safetensors").items())
