"""A patch looked at and two compared, by numbers that are worked out here once more."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from past_run import BASE, SIDECAR, a_trained_run, metadata, tensors
from rich.console import Console

from revpatch.config import SidecarConfig
from revpatch.ledger.inspect import compare_patches, inspect, print_difference, print_patch
from revpatch.ledger.patch_file import EntryError, write_entry
from revpatch.patch.coupling import AdditiveCoupling
from revpatch.patch.gates import PrefixGate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("past") / "a run [b]"
    a_trained_run(run)
    return run


def test_a_patch_is_told_with_its_layers(run: Path) -> None:
    facts = inspect(f"{run}@good")
    assert (facts.name, facts.parent) == (
        "000_wiki_good_step000000050.safetensors",
        "000_wiki_good_step000000040.safetensors",
    )
    assert facts.metadata["base"] == BASE
    assert facts.recorded is not None and facts.recorded.step == 50
    values = tensors(50)
    for layer, found in enumerate(facts.layers):
        own = {name: value for name, value in values.items() if name.startswith(f"0{layer}.coupling.")}
        scale = own.pop(f"0{layer}.coupling.log_scale")
        assert found.norm == pytest.approx(sum(float((t.double() ** 2).sum()) for t in own.values()) ** 0.5)
        assert found.scale == pytest.approx(float(scale.exp()))
        gate = PrefixGate(8)
        gate.load_state_dict({key: values[f"0{layer}.gates.0.{key}"] for key in ("weight", "bias")})
        assert found.gate == pytest.approx(gate(torch.zeros(1, 1, 8)).item())
        assert found.gate_weight == pytest.approx(float(values[f"0{layer}.gates.0.weight"].norm()))
    assert {name.split(".", 2)[2] for name in values if ".coupling." in name} == set(
        AdditiveCoupling(8, 4, "gelu", 1.0, "rms").state_dict()
    ), "there is nothing else in a layer to be told"


def test_two_patches_are_compared(run: Path) -> None:
    difference = compare_patches(f"{run}@good~4", str(run))
    first, second = tensors(10), tensors(50)
    for row in difference.layers:
        names = [n for n in sorted(first) if n.startswith(f"0{row.layer}.coupling.") and "log_scale" not in n]
        a, b = (torch.cat([found[name].double().flatten() for name in names]) for found in (first, second))
        assert row.distance == pytest.approx(float((a - b).norm()))
        assert row.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))
        assert row.first.norm == pytest.approx(float(a.norm())) and row.second.norm == pytest.approx(float(b.norm()))
    assert difference.probes == {"base": {"loss": [3.01, 3.05], "gate": [0.51, 0.55]}}
    same = compare_patches(str(run), f"{run}@commit")
    assert [(row.distance, row.cosine) for row in same.layers] == [(0, pytest.approx(1))] * 2


def test_a_patch_of_zeros_has_no_direction(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in tensors(1).items()}
    write_entry(tmp_path / "zero.safetensors", zeros, metadata("start", 0))
    (row, _) = compare_patches(str(tmp_path / "zero.safetensors"), str(tmp_path / "zero.safetensors")).layers
    assert row.cosine is None and row.first.norm == 0 and row.first.gate == 0.5 and row.first.scale == 1


def test_coupled_and_single_layers_too(tmp_path: Path) -> None:
    sidecar = SidecarConfig(bottleneck=3, placement="coupled", gate="token", layers=[1])
    told = metadata("commit", 5, sidecar=sidecar.model_dump(mode="json"))
    write_entry(tmp_path / "one.safetensors", tensors(1, sidecar), told)
    (layer,) = inspect(str(tmp_path / "one.safetensors")).layers
    assert layer.layer == 1 and 0 < layer.gate < 1


WRONG = {
    "another family": ({"base": {**BASE, "family": "llama"}}, tensors, "is a patch of a gpt2 model and .* of a llama"),
    "another base": ({"base": {**BASE, "sha256": "c" * 64}}, tensors, "of two bases: a/base .*bbbb.* and a/base .*ccc"),
    "another bottleneck": (
        {"sidecar": {**SIDECAR.model_dump(mode="json"), "bottleneck": 2}},
        lambda seed: tensors(seed, SidecarConfig(bottleneck=2)),
        "of two shapes: sidecar.bottleneck = 4 and 2",
    ),
    "another width": ({}, lambda seed: tensors(seed, width=6), r"of two shapes: 00\.\S+ is \(\d.*\) and \(\d"),
    "more layers": ({}, lambda seed: tensors(seed, blocks=3), r"of two shapes: 02\.\S+ is missing and"),
    "no patch": ({"base": None}, tensors, "not a patch"),
    "other tensors": ({}, lambda seed: {"w": torch.zeros(2)}, "of two shapes"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_compared_is_refused(run: Path, tmp_path: Path, what: str) -> None:
    changes, make, message = WRONG[what]
    write_entry(tmp_path / "other.safetensors", make(1), metadata("commit", 5, **changes))
    with pytest.raises(EntryError, match=message):
        compare_patches(str(run), str(tmp_path / "other.safetensors"))


def test_tensors_of_something_else_are_not_told(tmp_path: Path) -> None:
    write_entry(tmp_path / "other.safetensors", {"w": torch.zeros(2)}, metadata("commit", 5))
    with pytest.raises(EntryError, match="is no sidecar's"):
        inspect(str(tmp_path / "other.safetensors"))


def test_what_is_printed(run: Path, tmp_path: Path) -> None:
    text = io.StringIO()
    print_patch(inspect(str(run)), Console(file=text, width=200))
    for piece in (
        "000_wiki_commit.safetensors in ",
        "a run [b]",
        "commit of phase wiki, step 50",
        "a/base",
        "base 3.05",
        "scale",
    ):
        assert piece in text.getvalue()
    text = io.StringIO()
    print_difference(compare_patches(f"{run}@start", str(run)), Console(file=text, width=200))
    assert "cosine" in text.getvalue() and "+0.0500" in text.getvalue()
    alone = shutil.copy(run / "ledger/000_wiki_commit.safetensors", tmp_path)
    text = io.StringIO()
    print_patch(inspect(str(alone)), Console(file=text, width=200))
    assert "recorded" not in text.getvalue()
    print_difference(compare_patches(str(alone), str(alone)), Console(file=text, width=200))
    assert "no held-out losses were recorded" in text.getvalue()
    json.dumps(compare_patches(str(alone), str(run)).as_fields(), allow_nan=False)
