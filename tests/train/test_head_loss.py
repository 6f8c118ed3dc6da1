"""The loss over the frozen head against cross-entropy and KL written out in float64, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revpatch.step import head_loss as head_chunk
from revpatch.step.head_loss import MIN_ROWS, Buffers, compiled, frozen_head_loss, in_place, token_nll

COUNT, WIDTH, VOCAB = 50, 24, 97
CHUNKS = {"a row": 1, "7 rows": 7 * 4 * VOCAB, "all rows": 2**20}
"""chunk_bytes, by what it makes of 50 rows; 7 does not divide them."""

Inputs = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 rows at a time, which 7 and 50 are no multiples of, and 10 entries of the vocabulary where a head is large."""
    monkeypatch.setattr(head_chunk, "SLICE_BYTES", 3 * 4 * VOCAB)
    monkeypatch.setattr(head_chunk, "TILE", 10)


@pytest.fixture
def inputs() -> Inputs:
    """inputs(dtype): hidden, targets, head and the teacher's hidden states."""

    def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        hidden, teacher = (torch.randn(COUNT, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
        head = 0.5 * torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
        targets = torch.randint(VOCAB, (COUNT,), generator=generator)
        return hidden.to(dtype).requires_grad_(), targets, head.to(dtype), teacher.to(dtype)

    return make


def oracle(
    hidden: Tensor, targets: Tensor, head: Tensor, teacher: Tensor, weights: tuple[float, float], temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, CE, T²·KL and the gradient of the hidden states, in float64, from what these numbers are."""
    hidden, head, teacher = (x.detach().double() for x in (hidden, head, teacher))
    hidden.requires_grad_()
    ce = F.cross_entropy(hidden @ head.T, targets)
    p = torch.softmax(hidden @ head.T / temperature, -1)
    t = torch.softmax(teacher @ head.T / temperature, -1)
    kl = temperature**2 * (t * (t / p).log()).sum(-1).mean()
    loss = weights[0] * ce + weights[1] * kl
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), ce.detach(), kl.detach(), gradient


def take_for_large(large_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunk, "LARGE_HEAD_BYTES", 0 if large_head else 10**9)
    assert Buffers(torch.zeros(VOCAB, WIDTH)).is_large is large_head
    assert not Buffers(torch.zeros(VOCAB, WIDTH, dtype=torch.bfloat16)).is_large


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("large_head", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.7, 1.9)])
def test_values_and_gradient_are_those_of_the_definition(
    inputs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    large_head: bool,
    chunk: str,
    temperature: float,
    weights: tuple[float, float],
) -> None:
    take_for_large(large_head, monkeypatch)
    hidden, targets, head, teacher = inputs()
    expected = oracle(hidden, targets, head, teacher, weights, temperature)
    loss, ce, kl = frozen_head_loss(hidden, targets, head, teacher, *weights, temperature, CHUNKS[chunk])
    loss.backward()
    assert hidden.grad is not None
    assert error(hidden.grad, expected[3]) < 1e-12
    for found, known in zip((loss, ce, kl), expected[:3], strict=True):
        assert found.item() == pytest.approx(known.item(), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_ignored_tokens_have_no_loss_and_no_gradient(inputs: Inputs, chunk: str, temperature: float) -> None:
    hidden, targets, head, teacher = inputs()
    ignored = torch.arange(COUNT) % 3 == 1
    counted = ~ignored
    with torch.no_grad():
        hidden[4] = torch.nan  # what is ignored may be anything
    known = oracle(hidden[counted], targets[counted], head, teacher[counted], (0.7, 1.9), temperature)
    for index in (-100, 5):
        marked = targets.where(targets != index, 6).masked_fill(ignored, index)
        known_too = (
            known
            if index < 0
            else oracle(hidden[counted], marked[counted], head, teacher[counted], (0.7, 1.9), temperature)
        )
        found = frozen_head_loss(
            hidden, marked, head, teacher, 0.7, 1.9, temperature, CHUNKS[chunk], ignore_index=index
        )
        (gradient,) = torch.autograd.grad(found[0], hidden)
        assert [x.item() for x in found] == pytest.approx([x.item() for x in known_too[:3]], rel=1e-12)
        assert error(gradient[counted], known_too[3]) < 1e-12
        assert not gradient[ignored].any()
    sound = hidden.detach().nan_to_num().requires_grad_()
    marked = targets.masked_fill(ignored, -100)
    loss, *_ = frozen_head_loss(sound, marked, head)
    expected = F.cross_entropy(sound @ head.T, marked, ignore_index=-100)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, sound)[0] for x in (loss, expected)), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("temperature", "backend"), [(2.0, "eager"), *(pytest.param(t, None, marks=pytest.mark.slow) for t in (1.0, 2.0))]
)
def test_the_formula_that_is_compiled_gives_the_same(inputs: Inputs, temperature: float, backend: str | None) -> None:
    """With and without a teacher, in chunks of which the last is short, some tokens ignored, float32."""
    chunk = compiled() if backend is None else compiled(backend)
    hidden, targets, head, teacher = inputs(torch.float32)
    targets[::4] = -100
    for taught, weights in ((teacher, (0.7, 1.9)), (None, (1.0, 0.0))):
        found = []
        for way in (in_place, chunk):
            loss, ce, kl = frozen_head_loss(
                hidden, targets, head, taught, *weights, temperature, CHUNKS["7 rows"], chunk=way
            )
            found.append((loss.detach(), ce, kl, torch.autograd.grad(loss, hidden)[0]))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_in_lower_precision_the_gradient_is_near_the_exact_one(
    inputs: Inputs, dtype: torch.dtype, limit: float
) -> None:
    hidden, targets, head, teacher = inputs(dtype)
    expected = oracle(hidden, targets, head, teacher, (1.0, 1.0), 2.0)
    loss, ce, kl = frozen_head_loss(hidden, targets, head, teacher, 1.0, 1.0, 2.0, CHUNKS["7 rows"])
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    assert loss.dtype == ce.dtype == kl.dtype == torch.float32, "losses are never rounded to bfloat16"
    assert error(hidden.grad, expected[3]) < limit
    assert error(loss.detach(), expected[0]) < limit


def test_in_bfloat16_only_the_products_are_rounded(inputs: Inputs) -> None:
    """Softmaxes, logarithms and sums over the vocabulary are float32: their roundings would not cancel."""
    temperature = 2.0
    hidden, targets, head, teacher = inputs(torch.bfloat16)
    logits, taught = ((x.detach() @ head.T).float() for x in (hidden, teacher))
    log_q, log_t = ((x / temperature).log_softmax(-1) for x in (logits, taught))
    _, ce, kl = frozen_head_loss(hidden, targets, head, teacher, 1.0, 1.0, temperature)
    assert ce.item() == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    expected = temperature**2 * F.kl_div(log_q, log_t, log_target=True, reduction="batchmean")
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_nll = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(token_nll(hidden.detach(), targets, head), expected_nll, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_scaled_by_what_comes_after_and_survives_a_second_backward(inputs: Inputs) -> None:
    hidden, targets, head, teacher = inputs()
    loss, _, _ = frozen_head_loss(hidden, targets, head, teacher, 1.0, 1.0)
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(3 * loss, hidden)
    assert torch.equal(again, 3 * once)


def test_only_the_hidden_states_get_a_gradient(inputs: Inputs) -> None:
    hidden, targets, head, teacher = inputs()
    head.requires_grad_()
    teacher.requires_grad_()
    loss, ce, kl = frozen_head_loss(hidden, targets, head, teacher, 1.0, 1.0)
    assert not ce.requires_grad
    assert not kl.requires_grad
    loss.backward()
    assert hidden.grad is not None
    assert head.grad is None
    assert teacher.grad is None


def test_logits_of_any_size_stay_finite(inputs: Inputs) -> None:
    hidden, targets, head, teacher = inputs(torch.float32)
    expected = oracle(1000 * hidden, targets, head, 1000 * teacher, (1.0, 0.0), 1.0)
    big = (1000 * hidden).detach().requires_grad_()
    loss, ce, kl = frozen_head_loss(big, targets, head, 1000 * teacher, 1.0, 1.0)
    loss.backward()
    assert big.grad is not None
    assert big.grad.isfinite().all()
    assert kl.isfinite()
    assert float(ce) == pytest.approx(float(expected[1]), rel=1e-5)


def test_autocast_does_not_reach_the_products(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, targets, head, teacher = inputs(torch.float32)
    for large_head in (False, True):
        take_for_large(large_head, monkeypatch)
        found = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss, *_ = frozen_head_loss(hidden, targets, head, teacher, 1.0, 1.0)
            found.append((loss.detach(), torch.autograd.grad(loss, hidden)[0]))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("large_head", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_nll_is_the_cross_entropy_of_each_token(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, chunk: str, large_head: bool
) -> None:
    take_for_large(large_head, monkeypatch)
    hidden, targets, head, _ = inputs()
    nll = token_nll(hidden.detach(), targets, head, CHUNKS[chunk])
    assert nll.shape == (COUNT,)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(
        nll, F.cross_entropy(hidden.detach() @ head.T, targets, reduction="none").float(), rtol=1e-6, atol=0
    )


class LogitsSpy(TorchDispatchMode):
    """Remembers the rows of tensors that are as wide as the vocabulary, or, turned, as long: `made` those of each new
    tensor, `rows` the most of one."""

    def __init__(self, vocabulary: int = VOCAB) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_new = all(returned.alias_info is None for returned in func._schema.returns)
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor) or WIDTH in leaf.shape:
                continue
            if leaf.shape[-1:] == (self.vocabulary,) or (is_new and leaf.shape[:1] == (self.vocabulary,)):
                self.rows = max(self.rows, leaf.numel() // self.vocabulary)
                if is_new:
                    self.made.append(leaf.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("large_head", [False, True])
@pytest.mark.parametrize("rows", [1, 16])
def test_two_chunks_of_logits_are_held_and_slices(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, rows: int, large_head: bool
) -> None:
    take_for_large(large_head, monkeypatch)
    hidden, targets, head, teacher = inputs(torch.float32)
    with LogitsSpy() as spy:
        frozen_head_loss(hidden, targets, head, teacher, 1.0, 1.0, 2.0, rows * 4 * VOCAB)[0].backward()
    assert spy.rows == rows
    assert sorted(spy.made) == sorted([rows, rows, min(rows, 3), min(rows, 3)])
    with LogitsSpy() as spy:
        token_nll(hidden.detach(), targets, head, rows * 4 * VOCAB)
    assert spy.rows == rows


def test_by_default_a_chunk_of_a_large_vocabulary_is_a_small_part_of_the_batch() -> None:
    vocabulary, count = 2**15, 3 * MIN_ROWS + 1
    head, hidden = torch.randn(vocabulary, WIDTH), torch.randn(count, WIDTH, requires_grad=True)
    targets = torch.arange(count)
    with LogitsSpy(vocabulary) as spy:
        frozen_head_loss(hidden, targets, head, hidden.detach() + 1, 1.0, 1.0)[0].backward()
        token_nll(hidden.detach(), targets, head)
    assert spy.rows == MIN_ROWS


def test_what_is_kept_for_the_backward_pass_is_of_the_size_of_the_hidden_states(inputs: Inputs) -> None:
    hidden, targets, head, teacher = inputs(torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        frozen_head_loss(hidden, targets, head, teacher, 1.0, 1.0, 2.0)
    assert [tuple(tensor.shape) for tensor in kept] == [(COUNT, WIDTH)]
