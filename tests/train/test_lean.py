"""Lean functions of the base: the same bits forward, the right gradient, little saved; and what a step keeps in all."""

from __future__ import annotations

import pytest
import torch
from gated_families import GATED
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from revpatch.config import SidecarConfig
from revpatch.patch.patched_model import attach, base_sha256, detach, switchboard
from revpatch.step.frozen_base import SLICE, LeanRMSNorm, LeanTanhGelu, _SiluProduct, last_hidden_states, make_lean


def saved_bytes(model: nn.Module, tokens: Tensor) -> int:
    """What autograd keeps of a forward pass, each storage once."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = last_hidden_states(model, tokens)  # held, so that no storage is freed and counted twice
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_forward_pass_has_the_same_bits(dtype: torch.dtype) -> None:
    x = (torch.randn(SLICE // 64 + 3, 129, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    assert x.numel() % SLICE and x.numel() > 2 * SLICE
    for view in (x, x.T, x[:5, :7], x[:0]):
        assert torch.equal(LeanTanhGelu()(view), NewGELUActivation()(view))


def test_the_gradient_is_that_of_the_formula() -> None:
    x = torch.linspace(-6, 6, 301, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LeanTanhGelu(), (x[::10].detach().requires_grad_(),))
    lean, plain = (torch.autograd.grad(act(x).sum(), x)[0] for act in (LeanTanhGelu(), NewGELUActivation()))
    torch.testing.assert_close(lean, plain, rtol=1e-12, atol=1e-12)


def test_a_frozen_block_keeps_little_for_the_backward_pass() -> None:
    width, tokens = 64, 2 * 32
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=width, n_head=2, n_positions=32, vocab_size=100)).eval()
    patch = attach(model, SidecarConfig(bottleneck=4))
    for parameter in patch.parameters():
        nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(100, (2, 32))
    unit = 4 * width * tokens  # bytes of one (batch, time, d) in float32
    before = last_hidden_states(model, ids)
    plain = saved_bytes(model, ids)
    assert make_lean(model) == 3
    assert make_lean(model) == 0
    assert torch.equal(last_hidden_states(model, ids), before)
    lean = saved_bytes(model, ids)
    # The first block has no gradient to pass on. In the two others a GELU kept four (batch, time, 4d) and keeps one.
    assert plain - lean == pytest.approx(2 * 3 * 4 * unit, rel=0.1)
    # A block: input, two norms' outputs or inputs, q, k, v, the attention's output, the GELU's input.
    assert lean < (2 * 12 + 5) * unit
    switchboard(model).recompute_sidecars = False
    assert saved_bytes(model, ids) > lean + 3 * 3 * unit


@pytest.mark.parametrize("kind", GATED)
def test_gated_mlps_and_norms_have_the_same_bits_gradient_and_names_and_keep_less(kind: str) -> None:
    width, tokens = 32, 2 * 24
    torch.manual_seed(0)
    config, model_of = GATED[kind]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
    model = model_of(config(vocab_size=50, hidden_size=width, intermediate_size=96, **heads)).eval()
    names = [name for name, _ in model.named_parameters()]
    patch = attach(model, SidecarConfig(bottleneck=4))
    for parameter in patch.parameters():
        nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(50, (2, 24))

    pull = torch.randn(2, 24, width)

    def run() -> tuple[Tensor, list[Tensor]]:
        hidden = last_hidden_states(model, ids)
        return hidden, list(torch.autograd.grad((hidden * pull).sum(), list(patch.parameters())))

    (before, gradients), plain, digest = run(), saved_bytes(model, ids), base_sha256(model)
    norms = 2 * 3 + 1 + (2 * 3 if kind == "qwen3" else 0)  # Qwen3 has one of queries and one of keys too
    assert make_lean(model) == 3 + norms and make_lean(model) == 0
    (after, gradients_too), lean = run(), saved_bytes(model, ids)
    assert torch.equal(after, before)
    one, other = (torch.cat([part.flatten() for part in parts]) for parts in (gradients, gradients_too))
    assert (one - other).norm() < 1e-6 * one.norm()
    kept_by_mlps = 2 * 4 * 96 * tokens  # one (batch, time, inner) float32 in each block but the first
    assert kept_by_mlps <= plain - lean <= kept_by_mlps + norms * 4 * 6 * tokens, "and 1 / RMS of each norm"
    assert base_sha256(model) == digest
    detach(model)
    assert [name for name, _ in model.named_parameters()] == names


def test_the_gradient_of_a_gated_product_is_that_of_the_formula() -> None:
    gate, up = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_SiluProduct.apply, (gate, up))


def norm_and_input(dtype: torch.dtype) -> tuple[LlamaRMSNorm, Tensor]:
    generator = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(48, eps=1e-3).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(48, generator=generator))
    return norm, (torch.randn(3, 5, 48, generator=generator) * 0.1).to(dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_an_rms_norm_has_the_same_bits_and_gradient(dtype: torch.dtype, tolerance: float) -> None:
    norm, x = norm_and_input(dtype)
    pull = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain, lean = norm(x), LeanRMSNorm(norm)(x)
    assert torch.equal(lean, plain) and lean.dtype == dtype
    wanted, found = (torch.autograd.grad(out, x, pull)[0].double() for out in (plain, lean))
    assert found.norm() > 0 and (found - wanted).norm() < tolerance * wanted.norm()


def test_an_rms_norm_keeps_a_narrow_input_as_it_is() -> None:
    norm, x = norm_and_input(torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        LeanRMSNorm(norm)(x)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), norm.weight.data_ptr()}
