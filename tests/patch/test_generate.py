"""`generate` of transformers on a patched model: every family, in every mode, with the cache and without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import left_padded
from torch import Tensor, nn
from transformers import CompileConfig

from revpatch.config import SidecarConfig
from revpatch.patch.families import FAMILIES
from revpatch.patch.patched_model import attach, detach, patch_disabled, set_gate, switchboard

every_causal_gate = pytest.mark.parametrize("gate", ["prefix", "token"])
every_placement = pytest.mark.parametrize("placement", ["residual", "coupled"])
KINDS = [
    (family, *kind)
    for number, family in enumerate(sorted(FAMILIES))
    for kind in zip(("prefix", "token"), ("residual", "coupled")[:: 1 - 2 * (number % 2)], strict=True)
]
"""Every family with every gate, every gate with every placement."""
every_kind = pytest.mark.parametrize(("family", "gate", "placement"), KINDS)

Build = Callable[..., nn.Module]
Config = Callable[..., SidecarConfig]
Randomize = Callable[..., Any]


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
    "beam search": {"do_sample": False, "num_beams": 4},
    "several samples": {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


@every_kind
@pytest.mark.parametrize("how", sorted(GENERATION))
def test_generate_is_the_same_with_and_without_cache(
    patched: Callable[..., Any], family: str, gate: str, placement: str, how: str
) -> None:
    model = patched(family, gate=gate, placement=placement)
    ids, mask = left_padded(8)

    def run(**more: Any) -> Tensor:
        torch.manual_seed(3)
        knobs = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
        found: Tensor = model.generate(ids, attention_mask=mask, **knobs, **GENERATION[how], **more)
        return found

    cached = run(use_cache=True)
    assert cached.shape[1] == 16
    assert torch.equal(cached, run(use_cache=False))
    if how == "greedy":
        with patch_disabled(model):
            assert not torch.equal(cached, run(use_cache=True))
        for mode in ("on", "off"):
            set_gate(model, mode)
            assert torch.equal(run(use_cache=True), run(use_cache=False))


@every_kind
@pytest.mark.parametrize(("attention", "beams"), [("eager", 3), ("sdpa", 1)])
def test_generate_with_a_static_cache(
    patched: Callable[..., Any], family: str, gate: str, placement: str, attention: str, beams: int
) -> None:
    """The body is handed a mask of pairs at first."""
    model = patched(family, gate=gate, placement=placement)
    model.set_attn_implementation(attention)
    ids, mask = left_padded(8)
    knobs = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=mask, **knobs, use_cache=False)
    assert torch.equal(model.generate(ids, attention_mask=mask, **knobs, cache_implementation="static"), plain)


@pytest.mark.slow
def test_generate_compiles_around_the_past(build: Build, sidecar_config: Config, randomize: Randomize) -> None:
    """As it does by itself on a GPU with a static cache: the same tokens, and what is kept of the past in no graph."""
    model: Any = build("gpt2", blocks=1)
    randomize(attach(model, sidecar_config()))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = CompileConfig(backend=backend, mode=None)
    compiled._compile_all_devices = True
    ids, mask = left_padded(8)
    knobs = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    plain = model.generate(ids, **knobs, use_cache=False)
    assert torch.equal(model.generate(ids, **knobs, cache_implementation="static", compile_config=compiled), plain)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any("scaled_dot_product" in target for target in called)
    assert not any("sigmoid" in target for target in called)


@every_placement
def test_generate_off_is_the_bases(build: Build, sidecar_config: Config, randomize: Randomize, placement: str) -> None:
    model: Any = build("gpt2")
    ids, mask = left_padded(8)

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


@every_kind
def test_assisted_decoding(patched: Callable[..., Any], build: Build, family: str, gate: str, placement: str) -> None:
    """A smaller model guesses; the patched one keeps what it would have written itself."""
    model, assistant = patched(family, gate=gate, placement=placement), build(family, blocks=1)
    ids = left_padded()[0][1:2]
    knobs = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **knobs, use_cache=False)
    assert torch.equal(model.generate(ids, **knobs, assistant_model=assistant), expected)
    attach(assistant, switchboard(model).attached.config)
    assert torch.equal(model.generate(ids, **knobs, assistant_model=assistant), expected), "with a patch of its own"


@every_causal_gate
def test_assisted_by_its_own_first_blocks(patched: Callable[..., Any], gate: str) -> None:
    model = patched("llama", gate=gate)
    ids = left_padded()[0][1:2]
    knobs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    if gate == "token":
        expected = model.generate(ids, **knobs, use_cache=False)
        assert torch.equal(model.generate(ids, **knobs, assistant_early_exit=1), expected)
        return
    with pytest.raises(ValueError, match=r"last of the model's 3 blocks.*in place of assistant_early_exit"):
        model.generate(ids, **knobs, assistant_early_exit=1)
