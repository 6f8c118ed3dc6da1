"""Decoding: with a cache and without it a patched model is the same model, and caches that can't serve are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patching import (
    TOLERANCE,
    Build,
    every_causal_gate,
    every_family,
    every_placement,
    in_chunks,
    knobs,
    largest,
    left_padded,
    logits,
    trained,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from revpatch import Patch, SidecarConfig, active_patch, attach, detach, patch_disabled, set_gate
from revpatch.patch.families import FAMILIES
from revpatch.patch.patched_model import switchboard

DEMO_BASE = Path(__file__).resolve().parents[2] / "shards/demo_base"
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
every_kind = pytest.mark.parametrize(
    ("family", "gate", "placement"),
    [
        (family, *kind)
        for number, family in enumerate(sorted(FAMILIES))
        for kind in zip(("prefix", "token"), ("residual", "coupled")[:: 1 - 2 * (number % 2)], strict=True)
    ],
)
"""Every family with every gate that takes a cache, every gate with every placement."""


def agrees(model: Any, cuts: list[int], cache: Any = None, rows: int = 3, padded: bool = True) -> float:
    """Return the largest difference, at real tokens, of logits in calls of so many tokens from those of one call."""
    ids, mask = (tensor[:rows] for tensor in left_padded())
    given = mask if padded else None
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    return largest(in_chunks(model, ids, given, cuts, cache)[real].float(), logits(model, ids, given)[real].float())


@every_family
@every_causal_gate
@every_placement
def test_a_cache_agrees_with_one_pass(patched: Build, family: str, gate: str, placement: str) -> None:
    """To 1e-5 in float32, where rounding hides much; in float64, and with wilder sidecars, to a few thousand eps."""
    for dtype, strength, bound in ((torch.float32, 0.3, TOLERANCE), (torch.float64, 1.0, 1e-12)):
        model = patched(family, dtype, strength, gate=gate, placement=placement)
        for cuts, rows, padded in (([1] * 12, 3, False), ([1] * 12, 1, True), ([5, 1, 6], 3, True)):
            assert agrees(model, cuts, None, rows, padded) <= bound
        for rows, padded in ((3, True), (1, False)):  # empty places are not attended to, mask or none
            assert agrees(model, [5, 1, 1, 5], StaticCache(model.config, max_cache_len=20), rows, padded) <= bound


@every_causal_gate
@every_placement
@pytest.mark.parametrize("layers", [[0, 2], [1], [2]])
def test_a_cache_agrees_with_sidecars_on_some_blocks(
    patched: Build, gate: str, placement: str, layers: list[int]
) -> None:
    """A DynamicCache() without a config has no layers at first and gets them in the middle of the first call."""
    for family in ("gpt2", "llama"):
        model = patched(family, gate=gate, placement=placement, layers=layers)
        for cache in (DynamicCache(config=model.config), DynamicCache()):
            assert agrees(model, [4, 1, 7], cache) <= TOLERANCE


def test_a_cache_agrees_in_bfloat16(build: Build) -> None:
    """Past scores stay in float32, so that a long prefix does not lose its last tokens."""
    model = build("llama", dtype=torch.bfloat16)
    trained(attach(model, knobs()))
    cache = DynamicCache(config=model.config)
    # Each of some dozen roundings of the stream to 8 bits, half an eps of 2⁻⁷, of logits of a few units.
    assert agrees(model, [1] * 12, cache) <= 12 * 4 * 2**-8
    assert {layer.keys.dtype for layer in cache.layers[3:]} == {torch.float32}


def test_decoding_takes_steps(patched: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check on these checks: with steps that are wrong, the logits are."""
    monkeypatch.setattr("revpatch.patch.block.step", lambda _, u, *__: u if u.shape[1] == 1 else None)
    assert agrees(patched("gpt2", gate="token"), [1] * 12, rows=1) > 0.1


@every_causal_gate
def test_a_mask_longer_than_the_tokens_so_far(patched: Build, gate: str) -> None:
    """Ones for the tokens, then zeros for the places to come: those are not this call's padding."""
    model, (ids, mask) = patched("llama", gate=gate), left_padded()
    for cache in (StaticCache(model.config, max_cache_len=20), DynamicCache(config=model.config)):
        found = in_chunks(model, ids, mask, [7, 1, 4], cache, places=20)
        assert largest(found[mask.bool()], logits(model, ids, mask)[mask.bool()]) <= TOLERANCE


@every_causal_gate
@pytest.mark.parametrize(("full", "placement"), [(1, "residual"), (0, "coupled")], ids=["some layers", "all layers"])
def test_sliding_windows(gate: str, full: int, placement: str) -> None:
    """The cache forgets keys beyond the window; the gates' past goes back to the first token."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": full}
    more = {"num_key_value_heads": 1, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 2}
    config = Qwen2Config(vocab_size=61, **sizes, **window, **more)
    assert config.layer_types == full * ["full_attention"] + (3 - full) * ["sliding_attention"]
    model: Any = Qwen2ForCausalLM(config).eval()
    trained(attach(model, knobs(gate=gate, placement=placement)))
    for cuts in ([1] * 12, [5, 3, 4]):
        assert agrees(model, cuts) <= TOLERANCE
    ids, mask = left_padded()
    plain = model.generate(ids, attention_mask=mask, **GREEDY, num_beams=3, use_cache=False)
    for how in ({"use_cache": True}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, num_beams=3, **how), plain)


@every_causal_gate
def test_cached_generation_on_real_weights(gate: str) -> None:
    """The demo's base, in float32, with a patch of the size that training gives it."""
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(DEMO_BASE)("My fellow citizens, the state", return_tensors="pt").input_ids
    more = {**GREEDY, "max_new_tokens": 24, "min_new_tokens": 24}
    base = model.generate(ids, **more)
    trained(attach(model, SidecarConfig(bottleneck=16, gate=gate)), 1, 0.5)
    text = model.generate(ids, **more)
    assert torch.equal(text, model.generate(ids, **more, use_cache=False))
    assert not torch.equal(text, base)
    found, expected = in_chunks(model, text, None, [5] + [1] * (text.shape[1] - 5)), logits(model, text)
    # Of logits of up to 16; the base's own, with a cache and without, differ by 1.2e-5.
    assert largest(found, expected) <= TOLERANCE * float(expected.abs().max())
    detach(model)
    assert torch.equal(model.generate(ids, **more), base)


@every_causal_gate
@every_placement
def test_cropped_copied_and_chosen_caches(patched: Build, gate: str, placement: str) -> None:
    model, ids = patched("qwen2", gate=gate, placement=placement), left_padded()[0]
    cache = DynamicCache(config=model.config)
    in_chunks(model, ids[:, :8], None, [6, 2], cache)
    filled = copy.deepcopy(cache)
    cache.crop(-3)
    other = torch.cat([ids[:, :5], ids[:, 5:].flip(1)], 1)
    found = in_chunks(model, other[:, 5:], None, [3, 4], cache)
    assert largest(found, logits(model, other)[:, 5:]) <= TOLERANCE
    for choose, rows in (
        (lambda cache: None, [0, 1, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    ):
        chosen = copy.deepcopy(filled)
        choose(chosen)
        found = in_chunks(model, ids[rows][:, 8:], None, [1, 3], chosen)
        assert largest(found, logits(model, ids[rows])[:, 8:]) <= TOLERANCE
    cache.reset()
    assert agrees(model, [7, 5], cache) <= TOLERANCE


class _OtherCache(Cache):
    """A kind that nobody has heard of."""


class _Offloaded(DynamicCache):
    """As one that is offloaded, without the streams that only a GPU has."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.offloading = False
        try:
            return super().update(*args, **kwargs)
        finally:
            self.offloading = True


def other_cache() -> Cache:
    return _OtherCache(layer_class_to_replicate=DynamicLayer)


@pytest.mark.parametrize("gate", ["prefix", "token", "seq"])
def test_which_caches_and_calls_a_gate_takes(patched: Build, gate: str) -> None:
    """What one of them is not right with is refused, and left to the base."""
    model, (ids, mask) = patched("llama", gate=gate), left_padded()
    pairs = torch.zeros(3, 1, 12, 20, dtype=torch.bool)
    pairs[..., :12] = True  # every token sees every other
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)  # as `generate_batch` packs rows
    static, packed = StaticCache(model.config, max_cache_len=20), {"cu_seq_lens_q": ends}
    calls: list[tuple[str, str, Callable[[], Any]]] = [
        ("seq", "whole sequence.*use_cache=False", lambda: model(ids, attention_mask=mask, use_cache=True)),
        ("seq", "whole sequence.*use_cache=False", lambda: model.generate(ids, attention_mask=mask, **GREEDY)),
        ("prefix seq", "cu_seq_lens_q says.*several sequences.*gate: token", lambda: logits(model, ids, **packed)),
        ("prefix", "or a StaticCache, found _Other", lambda: in_chunks(model, ids, None, [5, 7], other_cache())),
        ("prefix token", "is offloaded .* layer by layer", lambda: in_chunks(model, ids, None, [5], _Offloaded())),
        ("prefix", "two-dimensional", lambda: in_chunks(model, ids, pairs, [12], static)),
        ("prefix", "in place of assistant_early", lambda: model.generate(ids[1:2], **GREEDY, assistant_early_exit=1)),
    ]
    for refused, words, call in calls:
        if gate in refused:
            with pytest.raises(ValueError, match=words):
                call()
            with patch_disabled(model):
                call()
        elif gate == "token":
            call()
    if gate == "token":
        assert torch.equal(logits(model, ids, **packed), logits(model, ids))
        assert agrees(model, [5, 7], other_cache(), padded=False) <= TOLERANCE
        expected = model.generate(ids[1:2], **GREEDY, use_cache=False)
        assert torch.equal(model.generate(ids[1:2], **GREEDY, assistant_early_exit=1), expected)
    uncached = model.generate(ids, attention_mask=mask, **GREEDY, use_cache=False)
    assert uncached.shape == (3, 20)


def read_by(others: str, model: Any, run: Callable[[], Any]) -> None:
    """Let others than the model's patch go over a cache."""
    if others == "detached":
        patch = detach(model)
        run()
        attach(model, patch)
    elif others in ("on", "off"):
        set_gate(model, others)  # type: ignore[arg-type]
        run()
        set_gate(model, "learned")
    else:
        another = trained(Patch(16, 3, switchboard(model).attached.config), seed=2)
        with active_patch(model, None if others == "the base" else another):
            run()


@every_causal_gate
@pytest.mark.parametrize("others", ["the base", "on", "off", "another patch", "detached"])
def test_tokens_that_others_have_read_are_noticed(patched: Build, gate: str, others: str) -> None:
    """Their keys and values are another model's, even if the cache holds no more of them than the patch had read."""
    model, ids = patched("gpt2", gate=gate, layers=[1, 2]), left_padded()[0]
    words = r"holds \d+ past tokens.*without this patch.*empty cache"
    for static, own, crop in ((False, 0, 0), (False, 5, 0), (False, 5, 2), (True, 5, 0)):
        if own and others == "another patch":
            continue  # which refuses it
        cache: Any = StaticCache(model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
        if own:
            in_chunks(model, ids[:, :own], None, [own], cache)
            attach(model, detach(model))  # no token is read meanwhile, so nothing is lost
            found = in_chunks(model, ids[:, 5:7], None, [1, 1], copy.deepcopy(cache))
            assert largest(found, logits(model, ids[:, :7])[:, 5:]) <= TOLERANCE
        if crop:
            cache.crop(-crop)
        read_by(others, model, lambda cache=cache: in_chunks(model, ids[:, 3:5], None, [2], cache))
        with pytest.raises(ValueError, match=words):
            in_chunks(model, ids[:, 5:], None, [7], cache)
        cache.reset()
        assert agrees(model, [5, 7], cache) <= TOLERANCE
        other = trained(Patch(16, 3, knobs(placement="coupled", layers=[0, 2])), seed=2)
        cache.reset()
        with active_patch(model, other):
            assert agrees(model, [6, 6], cache) <= TOLERANCE


@pytest.mark.parametrize("change", ["crop", "detached", "the base"])
def test_other_kinds_of_cache_are_held_to_their_length(patched: Build, change: str) -> None:
    """They can't hold a token gate's marks."""
    model, ids, cache = patched("llama", gate="token"), left_padded()[0], other_cache()
    in_chunks(model, ids[:, :5], None, [5], cache)
    if change == "crop":
        cache.crop(-2)
    else:
        read_by(change, model, lambda: in_chunks(model, ids[:, 5:6], None, [1], cache))
    words = "without this patch" if change == "the base" else "last call there were 5: .* _OtherCache can't say which"
    with pytest.raises(ValueError, match=words):
        in_chunks(model, ids[:, 6:], None, [6], cache)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam search": {"do_sample": False, "num_beams": 3},
    "several samples": {"do_sample": True, "top_p": 0.9, "temperature": 0.8, "num_return_sequences": 3},
}


@every_kind
@pytest.mark.parametrize("how", GENERATION)
def test_generate_is_the_same_with_and_without_cache(
    patched: Build, family: str, gate: str, placement: str, how: str
) -> None:
    model, (ids, mask) = patched(family, gate=gate, placement=placement), left_padded(8)

    def run(**more: Any) -> Tensor:
        torch.manual_seed(3)
        found: Tensor = model.generate(ids, attention_mask=mask, **{**GREEDY, **GENERATION[how], **more})
        return found

    cached = run(use_cache=True)
    assert cached.shape[1] == 16
    assert torch.equal(cached, run(use_cache=False))
    if how in ("greedy", "beam search"):
        assert torch.equal(cached, run(cache_implementation="static"))
    if how == "greedy":
        set_gate(model, "on")
        assert torch.equal(run(use_cache=True), run(use_cache=False))
        set_gate(model, "off")
        off = run(use_cache=True)
        assert torch.equal(off, run(use_cache=False)) and not torch.equal(off, cached)
        with patch_disabled(model):
            assert torch.equal(run(), off)
        detach(model)
        assert torch.equal(run(), off)


@every_kind
def test_generate_that_takes_back_tokens(patched: Build, build: Build, family: str, gate: str, placement: str) -> None:
    """A smaller model, or the prompt, guesses tokens ahead; the patched one keeps what it would have written itself."""
    model, assistant = patched(family, gate=gate, placement=placement), build(family, blocks=1)
    ids = torch.tensor([[5, 9, 17, 5, 9, 17, 5, 9]])
    expected = model.generate(ids, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=assistant), expected)
    attach(assistant, switchboard(model).attached.config)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=assistant), expected), "with a patch of its own"


@pytest.mark.slow
def test_generate_compiles_around_the_past(build: Build) -> None:
    """As it does by itself on a GPU with a static cache: the same tokens, and what is kept of the past in no graph."""
    model = build("gpt2", blocks=1)
    trained(attach(model, knobs()))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = CompileConfig(backend=backend, mode=None)
    compiled._compile_all_devices = True
    ids, mask = left_padded(8)
    more = {**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3, "attention_mask": mask}
    plain = model.generate(ids, **more)
    assert torch.equal(model.generate(ids, **more, cache_implementation="static", compile_config=compiled), plain)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any("scaled_dot_product" in target for target in called)
    assert not any("sigmoid" in target for target in called)
