"""Decoding: with the KV cache and without it a patched model is the same model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import left_padded
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from revpatch.config import SidecarConfig
from revpatch.patch.families import FAMILIES
from revpatch.patch.patched_model import Patch, active_patch, attach, detach, patch_disabled, set_gate

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
every_causal_gate = pytest.mark.parametrize("gate", ["prefix", "token"])
every_placement = pytest.mark.parametrize("placement", ["residual", "coupled"])

TOLERANCE = 1e-5
DEMO_BASE = Path(__file__).resolve().parents[2] / "shards/demo_base"

Build = Callable[..., nn.Module]
Logits = Callable[..., Tensor]
Config = Callable[..., SidecarConfig]
Randomize = Callable[..., Any]


def _in_chunks(model: Any, ids: Tensor, mask: Tensor | None, cuts: list[int], cache: Any = None) -> Tensor:
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts, done = [], 0
    positions = None if mask is None or mask.dim() > 2 else (mask.cumsum(1) - 1).clamp(min=0)
    for cut in cuts:
        here = slice(done, done + cut)
        with torch.no_grad():
            out = model(
                ids[:, here],
                attention_mask=None if mask is None else mask[:, : here.stop],
                position_ids=None if positions is None else positions[:, here],
                past_key_values=cache,
                use_cache=True,
            )
        parts.append(out.logits)
        done += cut
    return torch.cat(parts, 1)


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@every_family
@every_causal_gate
@every_placement
@pytest.mark.parametrize(
    "cuts", [[12], [1] * 12, [5, 1, 3, 1, 2], [3, 9]], ids=["at once", "tokens", "mixed", "chunks"]
)
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("exactly", [False, True], ids=["float32", "float64"])
def test_cache_agrees(
    patched: Callable[..., Any],
    logits: Logits,
    family: str,
    gate: str,
    placement: str,
    cuts: list[int],
    padded: bool,
    exactly: bool,
) -> None:
    """To 1e-5 in float32, where rounding hides much; in float64, and with wilder sidecars, to a few thousand eps."""
    dtype = torch.float64 if exactly else torch.float32
    model = patched(family, dtype, 1.0 if exactly else 0.3, gate=gate, placement=placement)
    ids, mask = left_padded()
    given = mask if padded else None
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    error = _largest(_in_chunks(model, ids, given, cuts)[real], logits(model, ids, given)[real])
    assert error <= (1e-12 if exactly else TOLERANCE)


@every_causal_gate
@every_placement
@pytest.mark.parametrize("layers", [[0, 2], [1], [2]])
@pytest.mark.parametrize("bare", [False, True], ids=["with config", "bare"])
def test_cache_agrees_with_sidecars_on_some_blocks(
    patched: Callable[..., Any], logits: Logits, gate: str, placement: str, layers: list[int], bare: bool
) -> None:
    """A bare DynamicCache() has no layers at first and gets them one by one, in the middle of the first call."""
    for family in ("gpt2", "llama"):
        model = patched(family, gate=gate, placement=placement, layers=layers)
        ids, mask = left_padded()
        cache = DynamicCache() if bare else DynamicCache(config=model.config)
        found = _in_chunks(model, ids, mask, [4, 1, 7], cache)
        assert _largest(found[mask.bool()], logits(model, ids, mask)[mask.bool()]) <= TOLERANCE


@every_causal_gate
@every_placement
def test_padding_of_one_sequence_token_by_token(
    patched: Callable[..., Any], logits: Logits, gate: str, placement: str
) -> None:
    """A single sequence is stepped through, but not its padding, which no gate may count."""
    model = patched("llama", gate=gate, placement=placement)
    ids, mask = (tensor[:1] for tensor in left_padded())
    found = _in_chunks(model, ids, mask, [1] * 12)[:, 4:]
    assert _largest(found, logits(model, ids, mask)[:, 4:]) <= TOLERANCE
    assert _largest(found, logits(model, ids[:, 4:])) <= TOLERANCE


def test_cache_agrees_in_bfloat16(build: Build, sidecar_config: Config, randomize: Randomize, logits: Logits) -> None:
    """Past scores stay in float32, so that a long prefix does not lose its last tokens."""
    model: Any = build("llama", dtype=torch.bfloat16)
    randomize(attach(model, sidecar_config()))
    ids, mask = left_padded()
    cache = DynamicCache(config=model.config)
    found = _in_chunks(model, ids, mask, [1] * 12, cache)
    assert {layer.keys.dtype for layer in cache.layers[3:]} == {torch.float32}
    # Each of some dozen roundings of the stream to 8 bits, half an eps of 2⁻⁷, of logits of a few units.
    assert _largest(found.float()[mask.bool()], logits(model, ids, mask).float()[mask.bool()]) <= 12 * 4 * 2**-8


@every_causal_gate
@pytest.mark.parametrize(("full", "placement"), [(1, "residual"), (0, "coupled")], ids=["some layers", "all layers"])
def test_sliding_windows(
    logits: Logits, sidecar_config: Config, randomize: Randomize, gate: str, full: int, placement: str
) -> None:
    """The cache forgets keys beyond the window; the gates' past goes back to the first token."""
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        pad_token_id=0,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=full,
        eos_token_id=2,
    )
    model: Any = Qwen2ForCausalLM(config).eval()
    assert config.layer_types == full * ["full_attention"] + (3 - full) * ["sliding_attention"]
    randomize(attach(model, sidecar_config(gate=gate, placement=placement)))
    ids, mask = left_padded()
    expected = logits(model, ids, mask)
    for cuts in ([1] * 12, [5, 3, 4]):
        found = _in_chunks(model, ids, mask, cuts)
        assert _largest(found[mask.bool()], expected[mask.bool()]) <= TOLERANCE
    knobs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        runs = [
            model.generate(ids, attention_mask=mask, **knobs, num_beams=beams, **how)
            for how in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"})
        ]
        assert torch.equal(runs[1], runs[0]) and torch.equal(runs[2], runs[0])
    one = ids[1:2]
    expected = model.generate(one, **knobs, use_cache=False)
    assert torch.equal(model.generate(one, **knobs, prompt_lookup_num_tokens=3), expected)


@every_causal_gate
def test_cached_generation_on_real_weights(randomize: Randomize, logits: Logits, gate: str) -> None:
    """The demo's base, in float32, with a patch of the size that training gives it."""
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    ids = tokenizer("My fellow citizens, the state of the Union", return_tensors="pt").input_ids
    knobs = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    base = model.generate(ids, **knobs)
    randomize(attach(model, SidecarConfig(bottleneck=16, gate=gate)), 1, 0.3)
    text = model.generate(ids, **knobs)
    assert torch.equal(text, model.generate(ids, **knobs, use_cache=False))
    assert not torch.equal(text, base)
    found, expected = _in_chunks(model, text, None, [5] + [1] * (text.shape[1] - 5)), logits(model, text)
    # Of logits of up to 16; the base's own, with a cache and without, differ by 1.2e-5.
    assert _largest(found, expected) <= TOLERANCE * float(expected.abs().max())
    detach(model)
    assert torch.equal(model.generate(ids, **knobs), base)


@every_causal_gate
@every_placement
def test_cropped_copied_and_chosen_caches(
    patched: Callable[..., Any], logits: Logits, gate: str, placement: str
) -> None:
    model = patched("qwen2", gate=gate, placement=placement)
    ids, _ = left_padded()
    cache = DynamicCache(config=model.config)
    _in_chunks(model, ids[:, :8], None, [6, 2], cache)
    shared = copy.deepcopy(cache)
    cache.crop(-3)
    other = torch.cat([ids[:, :5], ids[:, 5:].flip(1)], 1)
    found = _in_chunks(model, other[:, 5:], None, [3, 4], cache)
    assert _largest(found, logits(model, other)[:, 5:]) <= TOLERANCE

    again = _in_chunks(model, ids[:, 8:], None, [4], copy.deepcopy(shared))
    assert _largest(again, logits(model, ids)[:, 8:]) <= TOLERANCE
    filled, order = copy.deepcopy(shared), torch.tensor([2, 0, 0])
    shared.reorder_cache(order)
    assert _largest(_in_chunks(model, ids[order][:, 8:], None, [4], shared), logits(model, ids[order])[:, 8:]) <= 1e-5

    for choose, rows in (
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), torch.tensor([2, 0])),
    ):
        chosen = copy.deepcopy(filled)
        choose(chosen)
        found = _in_chunks(model, ids[rows][:, 8:], None, [1, 3], chosen)
        assert _largest(found, logits(model, ids[rows])[:, 8:]) <= TOLERANCE

    cache.reset()
    assert _largest(_in_chunks(model, ids, None, [7, 5], cache), logits(model, ids)) <= TOLERANCE


@every_placement
def test_sequence_gate_refuses_a_cache(patched: Callable[..., Any], placement: str) -> None:
    model = patched("gpt2", gate="seq", placement=placement)
    ids, mask = left_padded(6)
    with pytest.raises(ValueError, match=r"SeqGate depends on the whole sequence.*use_cache=False"):
        model(ids, attention_mask=mask, use_cache=True)
    with pytest.raises(ValueError, match=r"SeqGate depends on the whole sequence.*use_cache=False"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=3, use_cache=False, pad_token_id=0, eos_token_id=None)
    assert out.shape == (3, 9)


@every_causal_gate
@every_placement
def test_a_cache_filled_without_the_patch_is_refused(
    patched: Callable[..., Any], sidecar_config: Config, randomize: Randomize, gate: str, placement: str
) -> None:
    """By the base, by gates held open, or by another patch: its keys and values are of another model."""
    model = patched("gpt2", gate=gate, placement=placement)
    ids, _ = left_padded()
    other = randomize(Patch(16, 3, sidecar_config(gate=gate, placement=placement)), seed=2)

    def base(cache: DynamicCache) -> None:
        with patch_disabled(model):
            _in_chunks(model, ids[:, :5], None, [5], cache)

    def held_open(cache: DynamicCache) -> None:
        set_gate(model, "on")
        _in_chunks(model, ids[:, :5], None, [5], cache)
        set_gate(model, "learned")

    def another(cache: DynamicCache) -> None:
        with active_patch(model, other):
            _in_chunks(model, ids[:, :5], None, [5], cache)

    for fill in (base, held_open, another):
        cache = DynamicCache(config=model.config)
        fill(cache)
        with pytest.raises(ValueError, match=r"holds 5 past tokens.*without this patch.*empty cache"):
            _in_chunks(model, ids[:, 5:], None, [7], cache)


@every_causal_gate
@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_cache_that_went_on_without_the_patch_is_refused(
    patched: Callable[..., Any], logits: Logits, gate: str, mode: str
) -> None:
    """Tokens that the base, or gates held open, read in between are not what the patch would have made of them."""
    model = patched("gpt2", gate=gate, layers=[1, 2])
    ids, _ = left_padded()
    cache = DynamicCache(config=model.config)
    _in_chunks(model, ids[:, :3], None, [3], cache)
    set_gate(model, mode)
    _in_chunks(model, ids[:, 3:5], None, [2], cache)
    set_gate(model, "learned")
    with pytest.raises(ValueError, match=r"holds 5 past tokens.*without this patch.*empty cache"):
        _in_chunks(model, ids[:, 5:], None, [7], cache)
    cache.reset()
    assert _largest(_in_chunks(model, ids, None, [5, 7], cache), logits(model, ids)) <= TOLERANCE


@every_causal_gate
@pytest.mark.parametrize(("static", "taken_back"), [(False, 0), (False, 2), (True, 0)])
def test_tokens_that_were_read_while_the_patch_was_detached_are_noticed(
    patched: Callable[..., Any], logits: Logits, gate: str, static: bool, taken_back: int
) -> None:
    """Even if the cache holds no more of them than the patch had read: their keys and values are the base's."""
    model, ids = patched("gpt2", gate=gate), left_padded()[0]
    cache: Any = StaticCache(model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    _in_chunks(model, ids[:, :5], None, [5], cache)
    attach(model, detach(model))  # no token is read meanwhile, so nothing is lost
    found = _in_chunks(model, ids[:, 5:7], None, [1, 1], copy.deepcopy(cache))
    assert _largest(found, logits(model, ids[:, :7])[:, 5:]) <= TOLERANCE
    patch = detach(model)
    if taken_back:
        cache.crop(-taken_back)
    _in_chunks(model, ids[:, 3:5], None, [2], cache)
    attach(model, patch)
    with pytest.raises(ValueError, match=rf"holds {cache.get_seq_length()} past tokens.*without this patch.*empty"):
        _in_chunks(model, ids[:, 5:], None, [7], cache)
    cache.reset()
    assert _largest(_in_chunks(model, ids, None, [5, 7], cache), logits(model, ids)) <= TOLERANCE


@every_causal_gate
def test_an_emptied_cache_serves_another_patch(
    patched: Callable[..., Any], sidecar_config: Config, randomize: Randomize, logits: Logits, gate: str
) -> None:
    model = patched("llama", gate=gate)
    ids, mask = left_padded()
    cache = DynamicCache(config=model.config)
    _in_chunks(model, ids, mask, [12], cache)
    cache.reset()
    other = randomize(Patch(16, 3, sidecar_config(placement="coupled", layers=[1, 2])), seed=2)
    with active_patch(model, other):
        found = _in_chunks(model, ids, mask, [6, 6], cache)
        assert _largest(found[mask.bool()], logits(model, ids, mask)[mask.bool()]) <= TOLERANCE


@pytest.mark.parametrize(("attached", "active"), [([0], [0, 1, 2]), ([0, 1, 2], [1])])
def test_the_active_patch_decides_what_the_cache_keeps(
    patched: Callable[..., Any],
    sidecar_config: Config,
    randomize: Randomize,
    logits: Logits,
    attached: list[int],
    active: list[int],
) -> None:
    model = patched("gpt2", layers=attached)
    other = randomize(Patch(16, 3, sidecar_config(layers=active)), seed=2)
    ids, mask = left_padded()
    with active_patch(model, other):
        found = _in_chunks(model, ids, mask, [6, 6])
        assert _largest(found[mask.bool()], logits(model, ids, mask)[mask.bool()]) <= TOLERANCE


class _OtherCache(Cache):
    """A kind that nobody has heard of."""


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@every_causal_gate
def test_a_static_cache(patched: Callable[..., Any], logits: Logits, family: str, gate: str) -> None:
    """Used again after reset."""
    model = patched(family, gate=gate)
    ids, mask = left_padded()
    expected = logits(model, ids, mask)
    cache = StaticCache(config=model.config, max_cache_len=20)
    for _ in range(2):
        found = _in_chunks(model, ids, mask, [5, 1, 6], cache)
        assert _largest(found[mask.bool()], expected[mask.bool()]) <= TOLERANCE
        cache.reset()


@every_causal_gate
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_static_cache_token_by_token(
    patched: Callable[..., Any], logits: Logits, gate: str, padded: bool, rows: int
) -> None:
    """The places of a static cache that are still empty are not attended to, mask or none."""
    model = patched("llama", gate=gate)
    ids, mask = (tensor[-rows:] for tensor in left_padded())
    given = mask if padded else None
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    found = _in_chunks(model, ids, given, [5, *[1] * 7], StaticCache(model.config, max_cache_len=20))
    assert _largest(found[real], logits(model, ids, given)[real]) <= TOLERANCE


def test_a_mask_of_pairs_that_is_not_only_padding_is_refused(patched: Callable[..., Any]) -> None:
    model, ids = patched("llama"), left_padded()[0]
    mask = torch.zeros(3, 1, 12, 20, dtype=torch.bool)
    mask[..., :12] = True  # every token sees every other
    with pytest.raises(ValueError, match=r"\(batch, time\).*two-dimensional"):
        _in_chunks(model, ids, mask, [12], StaticCache(config=model.config, max_cache_len=20))


@every_causal_gate
def test_rows_of_several_sequences(patched: Callable[..., Any], logits: Logits, gate: str) -> None:
    """As `generate_batch` packs them: a gate that averages would do so over strangers."""
    model, ids = patched("llama", gate=gate), left_padded()[0]
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    if gate == "token":
        assert torch.equal(logits(model, ids, cu_seq_lens_q=ends), logits(model, ids))
        return
    with pytest.raises(ValueError, match=r"cu_seq_lens_q says.*several sequences.*generate_batch.*gate: token"):
        logits(model, ids, cu_seq_lens_q=ends)
    with patch_disabled(model):
        logits(model, ids, cu_seq_lens_q=ends)


def test_other_kinds_of_cache_are_refused_for_a_prefix_gate_only(patched: Callable[..., Any], logits: Logits) -> None:
    ids, _ = left_padded()
    model = patched("llama")
    with pytest.raises(ValueError, match="prefix gate keeps its past in a DynamicCache or a StaticCache, found _Other"):
        _in_chunks(model, ids, None, [12], _OtherCache(layer_class_to_replicate=DynamicLayer))
    model = patched("llama", gate="token")
    cache = _OtherCache(layer_class_to_replicate=DynamicLayer)
    for _ in range(2):
        assert _largest(_in_chunks(model, ids, None, [5, 7], cache), logits(model, ids)) <= TOLERANCE
        cache.reset()


@pytest.mark.parametrize("change", ["crop", "detach", "disable"])
def test_other_kinds_of_cache_are_refused_once_they_hold_what_a_token_gate_cannot_know_of(
    patched: Callable[..., Any], change: str
) -> None:
    model, ids = patched("llama", gate="token"), left_padded()[0]
    cache = _OtherCache(layer_class_to_replicate=DynamicLayer)
    _in_chunks(model, ids[:, :5], None, [5], cache)
    if change == "crop":
        cache.crop(-2)
    elif change == "detach":
        patch = detach(model)
        _in_chunks(model, ids[:, 5:6], None, [1], cache)
        attach(model, patch)
    else:
        with patch_disabled(model):
            _in_chunks(model, ids[:, 5:6], None, [1], cache)
    words = "without this patch" if change == "disable" else "last call there were 5: .* _OtherCache can't say which"
    with pytest.raises(ValueError, match=words):
        _in_chunks(model, ids[:, 6:], None, [6], cache)


def test_deepcopy_of_a_patched_model_is_apart(patched: Callable[..., Any], logits: Logits) -> None:
    model = patched("llama")
    ids, mask = left_padded()
    expected = logits(model, ids, mask)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids, mask), expected)
    detach(twin)
    assert torch.equal(logits(model, ids, mask), expected)
    assert _largest(logits(twin, ids, mask), expected) > 0.05
