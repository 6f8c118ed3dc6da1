"""What can't be attached or detached is refused, and the model is left as it was."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from patching import (
    Build,
    Config,
    Logits,
    Randomize,
    some_ids,
)
from torch import nn
from transformers import BertConfig, BertLMHeadModel

import revpatch
from revpatch.patch.families import family_of
from revpatch.patch.patched_model import (
    Patch,
    PatchedBlock,
    attach,
    detach,
    is_patched,
    patch_state,
    set_gate,
    switchboard,
)


def test_refuses_an_odd_width(build: Build, sidecar_config: Config) -> None:
    model = build("gpt2", width=15)
    with pytest.raises(ValueError, match="15 is odd"):
        attach(model, sidecar_config())
    _untouched(model)


def test_refuses_an_unknown_family_and_says_how_to_add_a_row(sidecar_config: Config) -> None:
    model = BertLMHeadModel(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            is_decoder=True,
        )
    )
    with pytest.raises(ValueError, match=r"'bert'.*gpt2, llama, qwen2, qwen3.*add one to FAMILIES in .*families\.py"):
        attach(model, sidecar_config())
    with pytest.raises(ValueError, match="'Linear'"):
        family_of(nn.Linear(2, 2))


def test_refuses_a_second_patch_and_detaching_none(
    build: Build, logits: Logits, sidecar_config: Config, randomize: Randomize
) -> None:
    model, ids = build("llama"), some_ids()
    for call in (detach, switchboard, patch_state, lambda m: set_gate(m, "on")):
        with pytest.raises(ValueError, match=r"carries no patch.*attach"):
            call(model)
    _untouched(model)
    patch = randomize(attach(model, sidecar_config()))
    assert is_patched(model)
    expected = logits(model, ids)
    for second in (sidecar_config(), patch):
        with pytest.raises(ValueError, match=r"patch already.*detach"):
            attach(model, second)
    assert torch.equal(logits(model, ids), expected)
    with pytest.raises(ValueError, match=r"'half'.*'learned', 'on' or 'off'"):
        set_gate(model, cast(Any, "half"))
    assert torch.equal(logits(model, ids), expected)
    assert detach(model) is patch
    assert not is_patched(model)
    with pytest.raises(ValueError, match="carries no patch"):
        detach(model)


def test_a_parameter_that_was_added_since_stays_as_it_is(build: Build, sidecar_config: Config) -> None:
    model = cast(Any, build("gpt2"))
    attach(model, sidecar_config())
    model.probe = nn.Linear(2, 2)
    model.probe.bias.requires_grad_(False)
    detach(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["probe.bias"]


def test_refuses_layers_that_are_not_there(build: Build, sidecar_config: Config) -> None:
    model = build("qwen3")
    with pytest.raises(ValueError, match=r"block 3.*blocks 0 to 2"):
        attach(model, sidecar_config(layers=[0, 3]))
    _untouched(model)


@pytest.mark.parametrize(("width", "blocks"), [(8, 3), (32, 3), (16, 2), (16, 4)])
def test_refuses_a_patch_of_another_shape(build: Build, sidecar_config: Config, width: int, blocks: int) -> None:
    model = build("gpt2")
    words = rf"width of {width}.*width is 16" if width != 16 else rf"{blocks} blocks.*has 3"
    with pytest.raises(ValueError, match=words):
        attach(model, Patch(width, blocks, sidecar_config()))
    _untouched(model)


def test_a_patched_model_is_not_saved_as_if_it_were_the_base(
    build: Build, logits: Logits, sidecar_config: Config, randomize: Randomize, tmp_path: Path
) -> None:
    model, ids = cast(Any, build("gpt2")), some_ids()
    base = logits(model, ids)
    patch = randomize(attach(model, sidecar_config()))
    copied = copy.deepcopy(model)
    for patched in (model, copied, pickle.loads(pickle.dumps(model))):  # noqa: S301  (made here)
        with pytest.raises(ValueError, match=r"detach\(model\) first, or revpatch\.save_pretrained"):
            patched.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    with torch.no_grad():
        switchboard(copied).attached.sidecar(0).coupling.log_scale.add_(1)
    assert switchboard(copied).attached is not patch
    assert not torch.equal(logits(copied, ids), logits(model, ids)), "each has a patch of its own"
    for patched in (model, copied):
        detach(patched)
        patched.save_pretrained(tmp_path / "base")
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / "base"), ids), base)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model: model.to("meta"), "on the meta device"),
        (lambda model: model.transformer.h[1].to("meta"), r"transformer\.h\.1\.\S+ is on the meta device"),
        (lambda model: cpu_offload(model, torch.device("cpu")), "where it offloads to the CPU or the disk"),
        (lambda model: disk_offload(model, tempfile.mkdtemp(), torch.device("cpu")), "where it offloads"),
        (lambda model: setattr(next(model.parameters()), "ds_id", 0), "lie on several ranks"),
    ],
    ids=["meta", "a block on meta", "cpu_offload", "disk_offload", "ZeRO 3"],
)
def test_a_model_that_is_not_whole_on_one_device_is_refused(
    build: Build,
    sidecar_config: Config,
    randomize: Randomize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Any], Any],
    words: str,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = build("gpt2")
    randomize(attach(model, sidecar_config()))
    revpatch.save_pretrained(model, tmp_path / "patch")
    detach(model)
    spoil(model)
    for put_on in (
        lambda: attach(model, sidecar_config()),
        lambda: revpatch.load_patch(model, tmp_path / "patch"),
        lambda: revpatch.from_pretrained(model, tmp_path / "patch"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            put_on()
        assert "hold it on one device" in str(caught.value) and "\n" not in str(caught.value)
        assert not is_patched(model)


def _untouched(model: nn.Module) -> None:
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, PatchedBlock) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
