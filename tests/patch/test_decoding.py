"""Decoding: with the KV cache and without it a patched model is the same model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from revpatch.config import SidecarConfig
from revpatch.patch.families import FAMILIES
from revpatch.patch.patched_model import Patch, active_patch, attach, detach, patch_disabled, set_gate, switchboard

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
every_causal_gate = pytest.mark.parametrize("gate", ["prefix", "token"])
every_placement = pytest.mark.parametrize("placement", ["residual", "coupled"])

TOLERANCE = 1e-5
DEMO_BASE = Path(__file__).resolve().parents[2] / "shards/demo_base"

Build = Callable[..., nn.Module]
Logits = Callable[..., Tensor]
Config = Callable[..., SidecarConfig]
Randomize = Callable[..., Any]


@pytest.fixture
def patched(build: Build, sidecar_config: Config, randomize: Randomize) -> Callable[..., Any]:
    """patched(family, dtype=float32, strength=1.0, **knobs): a model with a patch that looks trained."""

    def _patched(family: str = "gpt2", dtype: torch.dtype = torch.float32, strength: float = 1.0, **knobs: Any) -> Any:
        model = build(family, dtype=dtype)
        randomize(attach(model, sidecar_config(**knobs)), 1, strength).to(dtype)
        return model

    return _patched


def _batch(time: int = 12) -> tuple[Tensor, Tensor]:
    """Three rows, two of them padded on the left."""
    ids = torch.randint(3, 61, (3, time), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


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
    ids, mask = _batch()
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
        ids, mask = _batch()
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
    ids, mask = (tensor[:1] for tensor in _batch())
    found = _in_chunks(model, ids, mask, [1] * 12)[:, 4:]
    assert _largest(found, logits(model, ids, mask)[:, 4:]) <= TOLERANCE
    assert _largest(found, logits(model, ids[:, 4:])) <= TOLERANCE


def test_cache_agrees_in_bfloat16(build: Build, sidecar_config: Config, randomize: Randomize, logits: Logits) -> None:
    """Past scores stay in float32, so that a long prefix does not lose its last tokens."""
    model: Any = build("llama", dtype=torch.bfloat16)
    randomize(attach(model, sidecar_config()))
    ids, mask = _batch()
    cache = DynamicCache(config=model.config)
    found = _in_chunks(model, ids, mask, [1] * 12, cache)
    assert {layer.keys.dtype for layer in cache.layers[3:]} == {torch.float32}
    # Each of some dozen roundings of the stream to 8 bits, half an eps of 2⁻⁷, of logits of a few units.
    assert _largest(found.float()[mask.bool()], logits(model, ids, mask).float()[mask.bool()]) <= 12 * 4 * 2**-8


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
    "beam search": {"do_sample": False, "num_beams": 4},
    "several samples": {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@every_causal_gate
@every_placement
@pytest.mark.parametrize("how", sorted(GENERATION))
def test_generate_is_the_same_with_and_without_cache(
    patched: Callable[..., Any], family: str, gate: str, placement: str, how: str
) -> None:
    model = patched(family, gate=gate, placement=placement)
    ids, mask = _batch(8)

    def run(**more: Any) -> Tensor:
        torch.manual_seed(3)
        knobs = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
        found: Tensor = model.generate(ids, attention_mask=mask, **knobs, **GENERATION[how], **more)
        return found

    cached = run(use_cache=True)
    assert cached.shape[1] == 16
    assert torch.equal(cached, run(use_cache=False))
    with patch_disabled(model):
        assert not torch.equal(cached, run(use_cache=True))
    if how == "greedy":
        for mode in ("on", "off"):
            set_gate(model, mode)
            assert torch.equal(run(use_cache=True), run(use_cache=False))


@every_placement
def test_generate_off_is_the_bases(build: Build, sidecar_config: Config, randomize: Randomize, placement: str) -> None:
    model: Any = build("gpt2")
    ids, mask = _batch(8)

    def run() -> Tensor:
        found: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return found

    base = run()
    randomize(attach(model, sidecar_config(placement=placement)))
    with patch_disabled(model):
        assert torch.equal(run(), base)
    set_gate(model, "off")
    assert torch.equal(run(), base)
    detach(model)
    assert torch.equal(run(), base)


@every_causal_gate
@every_placement
def test_generate_that_takes_back_tokens(patched: Callable[..., Any], gate: str, placement: str) -> None:
    """Prompt lookup guesses tokens ahead and crops the cache where it guessed wrong."""
    model = patched("llama", gate=gate, placement=placement)
    ids = torch.tensor([[5, 9, 17, 5, 9, 17, 5, 9]])
    knobs = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(ids, **knobs, use_cache=False)
    assert torch.equal(model.generate(ids, **knobs, prompt_lookup_num_tokens=3), greedy)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@every_causal_gate
def test_assisted_decoding(patched: Callable[..., Any], build: Build, family: str, gate: str) -> None:
    """A smaller model guesses; the patched one keeps what it would have written itself."""
    model, assistant = patched(family, gate=gate), build(family, blocks=1)
    ids = _batch()[0][1:2]
    knobs = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **knobs, use_cache=False)
    assert torch.equal(model.generate(ids, **knobs, assistant_model=assistant), expected)
    attach(assistant, switchboard(model).attached.config)
    assert torch.equal(model.generate(ids, **knobs, assistant_model=assistant), expected), "with a patch of its own"


@every_causal_gate
@every_placement
def test_sliding_windows(
    logits: Logits, sidecar_config: Config, randomize: Randomize, gate: str, placement: str
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
        max_window_layers=1,
        eos_token_id=2,
    )
    model: Any = Qwen2ForCausalLM(config).eval()
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    randomize(attach(model, sidecar_config(gate=gate, placement=placement)))
    ids, mask = _batch()
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
    ids, _ = _batch()
    cache = DynamicCache(config=model.config)
    _in_chunks(model, ids[:, :8], None, [6, 2], cache)
    shared = copy.deepcopy(cache)
    cache.crop(-3)
    other = torch.cat([ids[:, :5], ids[:, 5:].flip(1)], 1)
    found = _in_chunks(model, other[:, 5:], None, [3, 4], cache)
    assert _largest(found, logits(model, other)[:, 5:]) <= TOLERANCE

    again = _in_chunks(model, ids[:, 8:], None, [4], copy.deepcopy(shared))
    assert _largest(again, logits(model, ids)[:, 8:]) <= TOLERANCE
    order = torch.tensor([2, 0, 0])
    shared.reorder_cache(order)
    assert _largest(_in_chunks(model, ids[order][:, 8:], None, [4], shared), logits(model, ids[order])[:, 8:]) <= 1e-5

    cache.reset()
    assert _largest(_in_chunks(model, ids, None, [7, 5], cache), logits(model, ids)) <= TOLERANCE


@every_placement
def test_sequence_gate_refuses_a_cache(patched: Callable[..., Any], placement: str) -> None:
    model = patched("gpt2", gate="seq", placement=placement)
    ids, mask = _batch(6)
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
    ids, _ = _batch()
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


def test_a_cache_left_behind_by_the_patch_is_refused(patched: Callable[..., Any]) -> None:
    """Tokens that the base read in between are missing from the gates' past."""
    model = patched("gpt2")
    ids, _ = _batch()
    cache = DynamicCache(config=model.config)
    _in_chunks(model, ids[:, :3], None, [3], cache)
    with patch_disabled(model):
        _in_chunks(model, ids[:, 3:5], None, [2], cache)
    with pytest.raises(ValueError, match=r"holds 5 past tokens and the gates have seen 3"):
        _in_chunks(model, ids[:, 5:], None, [7], cache)


@every_causal_gate
def test_an_emptied_cache_serves_another_patch(
    patched: Callable[..., Any], sidecar_config: Config, randomize: Randomize, logits: Logits, gate: str
) -> None:
    model = patched("llama", gate=gate)
    ids, mask = _batch()
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
    ids, mask = _batch()
    with active_patch(model, other):
        found = _in_chunks(model, ids, mask, [6, 6])
        assert _largest(found[mask.bool()], logits(model, ids, mask)[mask.bool()]) <= TOLERANCE


class _OtherCache(Cache):
    """A kind that nobody has heard of."""


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@every_causal_gate
def test_a_static_cache(patched: Callable[..., Any], logits: Logits, family: str, gate: str) -> None:
    """By calls and by `generate`, which hands the body a mask of pairs at first; used again after reset."""
    model = patched(family, gate=gate)
    ids, mask = _batch()
    expected = logits(model, ids, mask)
    cache = StaticCache(config=model.config, max_cache_len=20)
    for _ in range(2):
        found = _in_chunks(model, ids, mask, [5, 1, 6], cache)
        assert _largest(found[mask.bool()], expected[mask.bool()]) <= TOLERANCE
        cache.reset()
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        for beams in (1, 3):
            knobs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
            plain = model.generate(ids, attention_mask=mask, **knobs, use_cache=False, pad_token_id=0)
            static = model.generate(ids, attention_mask=mask, **knobs, cache_implementation="static", pad_token_id=0)
            assert torch.equal(static, plain)


def test_a_mask_of_pairs_that_is_not_only_padding_is_refused(patched: Callable[..., Any]) -> None:
    model, ids = patched("llama"), _batch()[0]
    mask = torch.zeros(3, 1, 12, 20, dtype=torch.bool)
    mask[..., :12] = True  # every token sees every other
    with pytest.raises(ValueError, match=r"\(batch, time\).*two-dimensional"):
        _in_chunks(model, ids, mask, [12], StaticCache(config=model.config, max_cache_len=20))


def test_other_kinds_of_cache_are_refused_for_a_prefix_gate_only(patched: Callable[..., Any], logits: Logits) -> None:
    ids, _ = _batch()
    model = patched("llama")
    with pytest.raises(ValueError, match="prefix gate keeps its past in a DynamicCache or a StaticCache, found _Other"):
        _in_chunks(model, ids, None, [12], _OtherCache(layer_class_to_replicate=DynamicLayer))
    model = patched("llama", gate="token")
    found = _in_chunks(model, ids, None, [5, 7], _OtherCache(layer_class_to_replicate=DynamicLayer))
    assert _largest(found, logits(model, ids)) <= TOLERANCE


def test_deepcopy_of_a_patched_model_is_apart(patched: Callable[..., Any], logits: Logits) -> None:
    model = patched("llama")
    ids, mask = _batch()
    expected = logits(model, ids, mask)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids, mask), expected)
    detach(twin)
    assert torch.equal(logits(model, ids, mask), expected)
    assert _largest(logits(twin, ids, mask), expected) > 0.05
