"""What a position must not see: later tokens, padding, and the rows beside its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patching import (
    ROUNDING,
    Build,
    Config,
    Logits,
    Randomize,
    every_dtype,
    every_family,
    every_gate,
    every_placement,
    largest,
    some_ids,
)

from revpatch.patch.patched_model import (
    attach,
)

PADDED = {torch.float64: ROUNDING * 2**-29, torch.float32: ROUNDING, torch.bfloat16: 8 * 2**-8 * 5}
"""The same for other dtypes; in bfloat16 a few roundings of a logit of 5, as sums are kept in float32 there."""


@every_family
@every_gate
@every_placement
@every_dtype
def test_causality(
    build: Build,
    logits: Logits,
    sidecar_config: Config,
    randomize: Randomize,
    family: str,
    gate: str,
    placement: str,
    dtype: torch.dtype,
) -> None:
    """Token t + 1 does not reach the logits up to t; with a SeqGate it does, so its losses are no language model's."""
    model, ids = build(family, dtype=dtype), some_ids(2, 10)
    randomize(attach(model, sidecar_config(gate=gate, placement=placement)))
    before = logits(model, ids)
    for t in (0, 4, 8):
        other = ids.clone()
        other[:, t + 1] = (other[:, t + 1] + 7) % 50 + 3
        after = logits(model, other)
        leak = largest(after[:, : t + 1], before[:, : t + 1])
        assert largest(after[:, t + 1 :], before[:, t + 1 :]) > 1e-2
        if gate == "seq":
            assert leak > 1e-3
        else:
            assert leak <= 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@every_gate
@every_placement
@pytest.mark.parametrize("dtype", PADDED, ids=str)
@given(
    real=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    pads=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    left=st.booleans(),
    junk=st.integers(0, 60),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_padding_and_company_change_nothing(
    build: Build,
    logits: Logits,
    sidecar_config: Config,
    randomize: Randomize,
    family: str,
    gate: str,
    placement: str,
    dtype: torch.dtype,
    real: list[int],
    pads: list[int],
    left: bool,
    junk: int,
) -> None:
    """A row's logits are those it has alone and unpadded, whatever it is padded with and whoever shares the batch."""
    model = build(family, dtype=dtype)
    patch = randomize(attach(model, sidecar_config(gate=gate, placement=placement)))
    if dtype == torch.float64:
        patch.double()
    rows = [some_ids(1, length, seed=index)[0] for index, length in enumerate(real)]
    width = max(length + pad for length, pad in zip(real, pads, strict=False))
    ids = torch.full((len(rows), width), junk)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    batch = logits(model, ids, mask)
    for index, row in enumerate(rows):
        assert largest(batch[index][mask[index].bool()], logits(model, row[None])[0]) <= PADDED[dtype]


def test_padding_matters_without_a_mask(
    build: Build, logits: Logits, sidecar_config: Config, randomize: Randomize
) -> None:
    """The check on the check: the gate does hang on the mask it is given."""
    model = build("gpt2")
    patch = randomize(attach(model, sidecar_config()))
    u = torch.randn(2, 6, 16)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert largest(patch.sidecar(0)(u, mask).gate[0, 2:], patch.sidecar(0)(u).gate[0, 2:]) > 1e-2


IDS = some_ids(2, 6)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
JUMP = torch.tensor([[0, 1, 2, 7, 8, 9]])
ARANGE = torch.arange(6)[None]
PAIRS = torch.ones(6, 6).tril().bool()[None, None].expand(2, 1, 6, 6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"position_ids": PACKED}, "position_ids says"),
        ({"position_ids": PACKED, "use_cache": True}, "position_ids says"),
        ({"position_ids": PACKED, "attention_mask": torch.ones_like(IDS)}, "position_ids says"),
        ({"position_ids": PACKED[0]}, "position_ids says"),
        ({"position_ids": JUMP}, "position_ids says"),  # transformers begins a sequence there
        ({"position_ids": torch.zeros(2, 6, dtype=torch.long)}, "position_ids says"),
        ({"seq_idx": torch.zeros(2, 6, dtype=torch.int32)}, "seq_idx says"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]])}, "attention_mask .*0 and 1.* says"),
        ({"attention_mask": torch.zeros(2, 6).fill_(-1e9)}, "attention_mask .*0 and 1.* says"),
        ({"attention_mask": PAIRS}, "need a padding mask of shape"),
        ({"position_ids": ARANGE}, ""),
        ({"position_ids": ARANGE[0]}, ""),
        ({"position_ids": ARANGE + 3}, ""),
        ({"position_ids": JUMP, "attention_mask": torch.ones_like(IDS)}, ""),
        ({"position_ids": (LEFT.cumsum(1) - 1).clamp(min=0), "attention_mask": LEFT}, ""),
        ({"position_ids": (LEFT.cumsum(1) - 1).masked_fill(LEFT == 0, 1), "attention_mask": LEFT}, ""),
        ({"position_ids": ARANGE, "attention_mask": LEFT.flip(1)}, ""),
        ({"attention_mask": LEFT.bool()}, ""),
        ({"attention_mask": LEFT.float()}, ""),
        ({}, ""),
    ],
)
def test_rows_of_several_sequences_are_refused_and_padded_ones_are_not(
    build: Build, sidecar_config: Config, randomize: Randomize, call: dict[str, object], words: str
) -> None:
    """By prefix and seq gates, which would average over the neighbours; a token gate takes them all."""
    for gate in ("prefix", "seq", "token"):
        flat = isinstance(positions := call.get("position_ids"), torch.Tensor) and positions.dim() == 1
        model = build("gpt2" if flat else "llama")
        randomize(attach(model, sidecar_config(gate=gate)))
        given = {"use_cache": False, **call} if gate != "seq" else {**call, "use_cache": False}
        if words and gate != "token":
            with pytest.raises(ValueError, match=words):
                model(input_ids=IDS, **given)
        else:
            model(input_ids=IDS, **given)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"cache_implementation": "static"}]
)
def test_generating_is_not_taken_for_packed_rows(
    build: Build, sidecar_config: Config, randomize: Randomize, how: dict[str, object]
) -> None:
    model = build("llama")
    randomize(attach(model, sidecar_config()))
    rows = slice(0, 1) if "prompt_lookup_num_tokens" in how else slice(None)
    out = model.generate(IDS[rows], attention_mask=LEFT[rows], max_new_tokens=5, min_new_tokens=5, **how)  # type: ignore[operator]
    assert out.shape[1] == 11
