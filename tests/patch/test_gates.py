"""The gates against plain loops: means over real tokens of the prefix, of the sequence, or none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revpatch.patch.decoding import CachedHistory, RunningSums
from revpatch.patch.gates import GATES, Gate, PrefixGate, SeqGate, TokenGate

EPS = torch.finfo(torch.float64).eps


def _gate(kind: str, width: int = 5) -> Gate:
    gate = GATES[kind](width).double()
    with torch.no_grad():
        gate.weight.normal_()
        gate.bias.normal_()
    return gate


def _oracle(gate: Gate, x: Tensor, mask: Tensor | None) -> Tensor:
    """The definition, token by token."""
    out = torch.zeros(*x.shape[:2], 1, dtype=x.dtype)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            seen = {SeqGate: range(x.shape[1]), PrefixGate: range(t + 1), TokenGate: range(t, t + 1)}[type(gate)]
            real = [i for i in seen if mask is None or isinstance(gate, TokenGate) or mask[row, i]]
            scores = [(x[row, i] @ gate.weight).item() for i in real]
            mean = math.fsum(scores) / len(scores) if scores else 0.0
            out[row, t, 0] = 1 / (1 + math.exp(-mean - gate.bias.item()))
    return out


@given(
    kind=st.sampled_from(sorted(GATES)),
    time=st.integers(1, 12),
    pads=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=3),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_plain_loop(kind: str, time: int, pads: list[tuple[int, int]], masked: bool, seed: int) -> None:
    torch.manual_seed(seed)
    gate = _gate(kind)
    x = 3 * torch.randn(len(pads), time, 5, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.ones(len(pads), time, dtype=torch.long)
        for row, (left, right) in enumerate(pads):
            mask[row, : min(left, time)] = 0
            mask[row, max(time - right, 0) :] = 0
    value = gate(x, mask)
    assert value.shape == (len(pads), time, 1)
    # A mean of at most 12 scores of at most 30, each with a few roundings; the sigmoid's slope is at most 1/4.
    assert (value - _oracle(gate, x, mask)).abs().max() <= 12 * 30 * EPS


@given(time=st.integers(1, 40), left=st.integers(0, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_prefix_equals_sequence_at_the_last_position(time: int, left: int, seed: int) -> None:
    torch.manual_seed(seed)
    prefix, seq = _gate("prefix"), SeqGate(5).double()
    seq.load_state_dict(prefix.state_dict())
    x = torch.randn(2, left + time, 5, dtype=torch.float64)
    mask = torch.ones(2, left + time)
    mask[0, :left] = 0
    assert (prefix(x, mask)[:, -1] - seq(x, mask)[:, -1]).abs().max() <= 40 * 10 * EPS
    assert (prefix(x)[:, -1] - seq(x)[:, -1]).abs().max() <= 40 * 10 * EPS


@pytest.mark.parametrize("kind", sorted(GATES))
@pytest.mark.parametrize("junk", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padding_never_enters(kind: str, junk: float, dtype: torch.dtype) -> None:
    """Whatever stands there, and whatever the mask's type: not the gate, not its gradient."""
    gate = _gate(kind)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    real = mask.bool()
    clean = gate(x, mask)[real]
    dirty = x.masked_fill(~real[..., None], junk)
    value = gate(dirty, mask.to(dtype))[real]
    assert torch.equal(value, clean)
    if kind == "token":
        return
    value.sum().backward()
    assert gate.bias.grad is not None
    assert torch.isfinite(gate.bias.grad).all()


@pytest.mark.parametrize("kind", sorted(GATES))
def test_all_ones_is_no_mask(kind: str) -> None:
    gate, x = _gate(kind), torch.randn(3, 9, 5, dtype=torch.float64)
    assert (gate(x) - gate(x, torch.ones(3, 9))).abs().max() <= 8 * EPS


@pytest.mark.parametrize("kind", sorted(GATES))
def test_starts_half_open_and_learns_both(kind: str) -> None:
    gate = GATES[kind](5)
    value = gate(torch.randn(2, 3, 5))
    assert torch.equal(value, torch.full((2, 3, 1), 0.5))
    value.sum().backward()
    assert gate.weight.grad is not None
    assert gate.bias.grad is not None
    assert gate.weight.grad.abs().max() > 0
    assert gate.bias.grad.abs().max() > 0


@pytest.mark.parametrize("kind", sorted(GATES))
def test_causal_says_whether_it_is(kind: str) -> None:
    gate = _gate(kind)
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    later = x.clone()
    later[:, 5:] += 3
    same = torch.equal(gate(x)[:, :5], gate(later)[:, :5])
    assert same is gate.causal is (kind != "seq")


@given(cuts=st.lists(st.integers(1, 4), min_size=1, max_size=6), left=st.integers(0, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_prefix_gate_in_chunks(cuts: list[int], left: int, seed: int) -> None:
    torch.manual_seed(seed)
    gate, time, sums = _gate("prefix"), sum(cuts), RunningSums()
    x = torch.randn(2, time, 5, dtype=torch.float64)
    mask = torch.ones(2, time)
    mask[1, :left] = 0
    parts = []
    for a, m in zip(x.split(cuts, 1), mask.split(cuts, 1), strict=True):
        sums.begin(1, m, a)
        parts.append(gate(a, m, CachedHistory(sums, 0)))
    assert (torch.cat(parts, 1) - gate(x, mask)).abs().max() <= 24 * 10 * EPS


def test_sequence_gate_refuses_a_history() -> None:
    with pytest.raises(ValueError, match=r"whole sequence.*use_cache=False"):
        _gate("seq")(torch.randn(1, 2, 5, dtype=torch.float64), None, CachedHistory(RunningSums(), 0))


def test_counting_tokens_does_not_stop_where_bfloat16_does() -> None:
    """The mean of a score that comes late in 1000 tokens: in bfloat16 sums alone it would not move any more."""
    gate = GATES["prefix"](2).bfloat16()
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([1.0, 0.0]))
    x = torch.ones(1, 1000, 2, dtype=torch.bfloat16)
    x[:, 500:] = -1
    for mask in (None, torch.ones(1, 1000)):
        assert abs(float(gate(x, mask).detach()[0, -1]) - 0.5) <= 2**-8
