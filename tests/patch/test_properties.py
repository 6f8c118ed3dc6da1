"""What holds of every patched model, whichever its family, gate, placement and dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from patching import (
    ROUNDING,
    TOLERANCE,
    Build,
    every_causal_gate,
    every_dtype,
    every_family,
    every_gate,
    every_placement,
    knobs,
    largest,
    left_padded,
    logits,
    some_ids,
    trained,
)
from torch import Tensor, nn

from revpatch import Patch, SidecarConfig, attach, detach, patch_disabled, save_patch, set_gate
from revpatch.patch import patched_model
from revpatch.patch.families import blocks_of, body_of, check_head, head_of, width_of
from revpatch.patch.patched_model import base_parameters, base_sha256, load_tensors, patch_state, recording, switchboard


@every_family
@every_gate
@every_placement
@every_dtype
def test_off_is_the_base_to_the_bit(build: Build, family: str, gate: str, placement: str, dtype: torch.dtype) -> None:
    """So is a new patch; a detached model has the very same modules, and an attached patch gives what it gave."""
    model, ids = build(family, dtype=dtype), some_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    before, blocks, frozen = logits(model, ids, mask), list(blocks_of(model)), dict(model.named_parameters())
    model.lm_head.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in frozen.items()}
    assert len(set(flags.values())) == 2
    patch = attach(model, knobs(gate=gate, placement=placement))
    assert torch.equal(logits(model, ids, mask), before)
    trained(patch)

    learned = logits(model, ids, mask)
    assert learned.dtype == dtype and largest(learned, before) > 0.5
    with patch_disabled(model):
        assert torch.equal(logits(model, ids, mask), before)
    set_gate(model, "off")
    assert torch.equal(logits(model, ids, mask), before)
    set_gate(model, "on")
    opened = logits(model, ids, mask)
    assert min(largest(opened, learned), largest(opened, before)) > 0.05
    set_gate(model, "learned")
    assert torch.equal(logits(model, ids, mask), learned)
    assert not any(parameter.requires_grad for _, parameter in base_parameters(model))

    assert detach(model) is patch
    assert torch.equal(logits(model, ids, mask), before)
    assert all(a is b for a, b in zip(blocks_of(model), blocks, strict=True))
    after = dict(model.named_parameters())
    assert after.keys() == frozen.keys() and all(after[name] is frozen[name] for name in frozen)
    assert {name: parameter.requires_grad for name, parameter in after.items()} == flags
    assert not body_of(model)._forward_pre_hooks
    assert not any(isinstance(module, patched_model.PatchedBlock) for module in model.modules())
    attach(model, patch)
    assert torch.equal(logits(model, ids, mask), learned)


@every_family
@every_gate
@every_placement
def test_causality(build: Build, family: str, gate: str, placement: str) -> None:
    """Token t + 1 does not reach the logits up to t; with a SeqGate it does, so its losses are no language model's."""
    for dtype in (torch.float32, torch.bfloat16):
        model, ids = build(family, dtype=dtype), some_ids(2, 10)
        trained(attach(model, knobs(gate=gate, placement=placement)))
        before = logits(model, ids)
        for t in (0, 4, 8):
            other = ids.clone()
            other[:, t + 1] = (other[:, t + 1] + 7) % 50 + 3
            after = logits(model, other)
            leak = largest(after[:, : t + 1], before[:, : t + 1])
            assert largest(after[:, t + 1 :], before[:, t + 1 :]) > 1e-2
            assert leak > 1e-3 if gate == "seq" else leak <= 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@every_gate
@every_placement
def test_padding_and_company_change_nothing(patched: Build, family: str, gate: str, placement: str) -> None:
    """A row's logits are those it has alone and unpadded, whatever it is padded with and whoever shares the batch."""
    rows = [some_ids(1, length, seed=length)[0] for length in (5, 1, 8, 3)]
    for dtype, bound in ((torch.float64, ROUNDING * 2**-29), (torch.float32, ROUNDING)):
        model = patched(family, dtype, gate=gate, placement=placement)
        alone = [logits(model, row[None])[0] for row in rows]
        for left, width, junk in ((True, 8, 0), (False, 13, 60), (True, 13, 7)):
            ids = torch.full((len(rows), width), junk)
            mask = torch.zeros_like(ids)
            for index, row in enumerate(rows):
                place = slice(width - len(row), width) if left else slice(0, len(row))
                ids[index, place], mask[index, place] = row, 1
            batch = logits(model, ids, mask)
            for index, expected in enumerate(alone):
                assert largest(batch[index][mask[index].bool()], expected) <= bound


@every_family
def test_every_way_of_calling_sees_the_mask(patched: Build, family: str) -> None:
    model, ids = patched(family), some_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    expected = logits(model, ids, mask, position_ids=None)
    assert largest(logits(model, ids, position_ids=None), expected) > 1e-3
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        head, body = head_of(model), body_of(model)
        by_position = body(ids, None, mask) if family == "gpt2" else body(ids, mask)
        ways = {
            "embeddings": model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits,
            "body, by position": head(by_position.last_hidden_state),
            "boolean mask": model(ids, attention_mask=mask.bool(), use_cache=False).logits,
            "with a cache": model(ids, attention_mask=mask).logits,
        }
    for way, found in ways.items():
        assert largest(found, expected) <= ROUNDING, way
    # The mask of one call must not stay for the next.
    assert largest(logits(model, ids[:, :6]), logits(model, ids)[:, :6]) <= ROUNDING


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
        ({"position_ids": PACKED, "attention_mask": torch.ones_like(IDS)}, "position_ids says"),
        ({"position_ids": PACKED[0]}, "position_ids says"),
        ({"position_ids": JUMP}, "position_ids says"),  # transformers begins a sequence there
        ({"seq_idx": torch.zeros(2, 6, dtype=torch.int32)}, "seq_idx says"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]])}, "attention_mask .*0 and 1.* says"),
        ({"attention_mask": PAIRS}, r"need a padding mask of shape \(batch, time\).*two-dimensional"),
        ({"position_ids": ARANGE[0]}, ""),
        ({"position_ids": JUMP, "attention_mask": torch.ones_like(IDS)}, ""),
        ({"position_ids": (LEFT.cumsum(1) - 1).clamp(min=0), "attention_mask": LEFT}, ""),
        ({"position_ids": ARANGE, "attention_mask": LEFT.flip(1)}, ""),
        ({"attention_mask": LEFT.float()}, ""),
    ],
)
def test_rows_of_several_sequences_are_refused_and_padded_ones_are_not(
    patched: Build, call: dict[str, Any], words: str
) -> None:
    """By prefix and seq gates, which would average over the neighbours; a token gate and the base take them all."""
    flat = isinstance(positions := call.get("position_ids"), Tensor) and positions.dim() == 1
    for gate in ("prefix", "seq", "token"):
        model = patched("gpt2" if flat else "llama", gate=gate)
        given = {"input_ids": IDS, "use_cache": False, **call}
        if gate == "seq":
            given["use_cache"] = False
        if words and gate != "token":
            with pytest.raises(ValueError, match=words):
                model(**given)
            with patch_disabled(model):
                model(**given)
        else:
            model(**given)


@every_dtype
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_training_touches_the_sidecars_alone(build: Build, family: str, dtype: torch.dtype) -> None:
    model, ids = build(family, dtype=dtype), some_ids(4, 12)
    patch = attach(model, knobs())
    before, start, base = base_sha256(model), patch_state(patch), dict(model.named_parameters())
    assert not {id(p) for p in patch.parameters()} & {id(p) for p in model.parameters()}
    assert not any("sidecar" in name for name in base)
    optimizer, losses = torch.optim.AdamW(patch.parameters(), lr=1e-2), []
    for _ in range(8):
        out = model(ids, use_cache=False).logits.float()
        loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in patch.named_parameters():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
            assert torch.isfinite(parameter.grad).all(), name
        assert all(p.grad is None and not p.requires_grad for p in base.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in patch_state(patch).items():
        assert torch.equal(tensor, start[name]) is name.endswith("channels"), name
    with patch_disabled(model):
        assert not model(ids, use_cache=False).logits.requires_grad
    assert base_sha256(model) == before
    detach(model)
    assert base_sha256(model) == before


@every_gate
@every_placement
def test_tensors_go_out_and_in_again_exactly(build: Build, gate: str, placement: str) -> None:
    model, ids, config = build("gpt2"), some_ids(), knobs(gate=gate, placement=placement)
    patch = trained(attach(model, config))
    expected, state = logits(model, ids), patch_state(model)
    assert list(state) == sorted(patch.sidecars.state_dict())
    for tensor in state.values():
        assert (tensor.dtype, tensor.device.type, tensor.requires_grad) == (torch.float32, "cpu", False)
    frozen = {name: tensor.clone() for name, tensor in state.items()}
    identities = [id(p) for p in patch.parameters()]
    trained(patch, seed=9)
    assert all(torch.equal(state[name], frozen[name]) for name in state), "the state must be a copy"
    assert largest(logits(model, ids), expected) > 0.05
    load_tensors(model, state)
    assert torch.equal(logits(model, ids), expected)
    assert [id(p) for p in patch.parameters()] == identities, "an optimizer holds these"
    load_tensors(fresh := Patch(16, 3, config), state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in patch_state(fresh).items())


LAST, UP = "02.gates.0.weight", "02.coupling.g.up.weight"
SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({LAST: None}, r"missing \['02\.gates\.0\.weight'\], unknown none"),
    "unknown": (
        {"07.x": torch.zeros(2)},
        r"missing none, unknown \['07\.x'\] \(0 and 1 in all\).*check gate, placement",
    ),
    "shape": ({LAST: torch.zeros(16, 1)}, r"02\.gates\.0\.weight: expected shape \(16,\), found \(16, 1\)"),
    "broadcast": ({UP: torch.zeros(1, 4)}, r"02\.coupling\.g\.up\.weight: expected shape \(8, 4\), found \(1, 4\)"),
    "integers": (
        {LAST: torch.zeros(16).long()},
        r"02\.gates\.0\.weight: expected a tensor of floats, found torch\.int64",
    ),
    "a list": ({LAST: [0.0] * 16}, r"02\.gates\.0\.weight: expected a tensor of floats, found .*list"),
    "size 0": ({"01.channels": torch.zeros(16)}, r"01\.channels: expected the sizes of a base's channels, all above 0"),
    "size nan": ({"01.channels": torch.full((16,), float("nan"))}, r"01\.channels: expected the sizes"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_loading_is_all_or_nothing(case: str) -> None:
    changes, words = SPOILED[case]
    patch = trained(Patch(16, 3, knobs()))
    before = patch_state(patch)
    other: dict[str, Any] = {**patch_state(trained(Patch(16, 3, knobs()), seed=2)), **changes}
    with pytest.raises(ValueError, match=words):
        load_tensors(patch, {name: value for name, value in other.items() if value is not None})
    assert all(torch.equal(value, before[name]) for name, value in patch_state(patch).items())


def test_a_patch_of_gpt2_is_small(tmp_path: Path) -> None:
    """Five megabytes in float32 at the defaults, against the 498 MB of GPT-2."""
    save_patch(Patch(768, 12, SidecarConfig()), tmp_path / "patch.safetensors")
    assert (tmp_path / "patch.safetensors").stat().st_size <= 5e6


class _Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, tuple[Tensor, ...]]] = []
        self.plain: list[tuple[int, Tensor]] = []

    def measure(self, output: Any) -> tuple[Tensor, ...]:
        return output.gate, output.update

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        self.seen.append((layer, hidden, measured))

    def record_plain(self, layer: int, hidden: Tensor) -> None:
        self.plain.append((layer, hidden))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("use_cache", [False, None], ids=["no cache", "default"])
def test_checkpointing_changes_memory_only(patched: Build, family: str, use_cache: bool | None) -> None:
    model, (ids, mask), runs = patched(family), left_padded(9), []
    patch = switchboard(model).attached
    for block in blocks_of(model):
        block.block.register_forward_pre_hook(lambda *_: runs.append(1))

    def run(**switches: bool) -> tuple[float, list[Tensor], int]:
        vars(switchboard(model)).update(switches)
        patch.zero_grad()
        runs.clear()
        with recording(model, recorder := _Recorder()):
            out = model(ids, attention_mask=mask, use_cache=use_cache, output_hidden_states=True)
        loss = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss = loss + sum(state.square().mean() for state in out.hidden_states)
        for _, _, (gate, update) in recorder.seen:
            loss = loss + gate.mean() + update.square().mean()
        loss.backward()
        assert len(recorder.seen) == 3 and len(out.hidden_states) == 4
        return loss.item(), [p.grad.clone() for p in patch.parameters()], len(runs)

    plain = run(recompute_sidecars=False)
    recomputed = run(recompute_sidecars=True)
    saved = run(checkpointing=True)
    for other in (recomputed, saved):
        assert other[0] == plain[0]
        assert all(torch.equal(a, b) for a, b in zip(other[1], plain[1], strict=True))
    assert recomputed[2] == plain[2] == 3
    # The first block has nothing to learn before it, so it is not run again; a cache would grow if blocks were.
    assert saved[2] == (5 if use_cache is False else 3)


@every_family
@pytest.mark.parametrize("recorded_before", [False, True], ids=["fresh", "recorded before"])
@torch.no_grad()
def test_recorded_states_are_what_the_blocks_hand_on(build: Build, family: str, recorded_before: bool) -> None:
    """transformers hooks the blocks when it first records, which may be before a patch is attached or after."""
    model: Any = build(family)
    model.set_attn_implementation("eager")
    ids, mask = left_padded(6)

    def call() -> Any:
        return model(ids, attention_mask=mask, use_cache=False, output_attentions=True, output_hidden_states=True)

    if recorded_before:
        call()
    trained(attach(model, knobs(layers=[0, 2])))
    outputs = {}
    for mode in ("learned", "on", "off"):
        set_gate(model, mode)  # type: ignore[arg-type]
        entering: list[Tensor] = []
        hooks = [
            block.block.register_forward_pre_hook(lambda _, args, seen=entering: seen.append(args[0]))
            for block in blocks_of(model)
        ]
        with recording(model, recorder := _Recorder()):
            out = call()
        for hook in hooks:
            hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(out.hidden_states[:3], entering, strict=True))
        assert torch.equal(model.lm_head(out.hidden_states[3]), out.logits)
        assert [layer for layer, *_ in recorder.seen] == ([] if mode == "off" else [0, 2])
        assert [layer for layer, _ in recorder.plain] == ([0, 1, 2] if mode == "off" else [1])
        handed_on = {layer: hidden for layer, hidden, *_ in (*recorder.seen, *recorder.plain)}
        assert handed_on[0] is entering[1] and handed_on[1] is entering[2]
        outputs[mode] = out
    off, learned = outputs["off"], outputs["learned"]
    assert not torch.equal(learned.hidden_states[1], off.hidden_states[1])
    assert torch.equal(learned.attentions[0], off.attentions[0]), "there is no sidecar before it"
    assert not torch.equal(learned.attentions[1], off.attentions[1])
    detach(model)
    base = call()
    for found, expected in ((base.hidden_states, off.hidden_states), (base.attentions, off.attentions)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_family
@every_causal_gate
def test_states_recorded_by_generate(patched: Build, family: str, gate: str) -> None:
    """Step by step with a cache, as in one call without."""
    model = patched(family, gate=gate, strength=0.3)
    ids, more = left_padded(6)[0][1:2], {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = model.generate(ids, **more, output_hidden_states=True, return_dict_in_generate=True)
    with torch.no_grad():
        whole = model(out.sequences[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
    for layer, expected in enumerate(whole):
        assert largest(torch.cat([state[layer] for state in out.hidden_states], 1), expected) <= TOLERANCE


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_the_identity_of_a_base(build: Build, family: str, tied: bool) -> None:
    """Of every bit of it, and of nothing else; rounded, of it in bfloat16 and float32 alike."""
    model, ids = build(family, tied), some_ids()
    assert (width_of(model), len(blocks_of(model))) == (16, 3)
    hidden = body_of(model)(ids, use_cache=False).last_hidden_state
    assert torch.equal(hidden @ head_of(model).weight.T, model(ids, use_cache=False).logits)
    exact, rounded = base_sha256(model), base_sha256(model, rounded=True)
    names = [name for name, _ in base_parameters(model)]
    assert names == sorted(names) and ("lm_head.weight" in names) is not tied
    assert exact != rounded
    assert base_sha256(build(family, tied)) == exact
    assert base_sha256(build(family, tied, seed=1)) != exact
    trained(attach(model, knobs()))
    assert (base_sha256(model), base_sha256(model, rounded=True)) == (exact, rounded)
    assert [name for name, _ in base_parameters(model)] == names
    detach(model)
    assert base_sha256(model) == exact
    low = build(family, tied, dtype=torch.bfloat16)
    assert base_sha256(low, rounded=True) == base_sha256(low) == rounded
    with torch.no_grad():
        for name, parameter in base_parameters(model):
            value = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] = value + 0.5
            assert base_sha256(model) != exact and base_sha256(model, rounded=True) != rounded, name
            parameter.view(-1)[-1] = value
        last = list(model.parameters())[-1].view(-1)
        last[0] = torch.nextafter(last[0], last[0] + 1)
    assert base_sha256(model) != exact


@every_dtype
@torch.no_grad()
def test_a_head_that_is_no_plain_product_is_refused(build: Build, dtype: torch.dtype) -> None:
    """By its name or its kind, and else by what its logits are."""
    model = build("llama", dtype=dtype)
    check_head(model)
    for change in (lambda x: x.mul_(0.9), lambda x: x.div_(30).tanh_().mul_(30.6), lambda x: x.add_(0.3)):
        hook = model.register_forward_hook(lambda _, __, out, change=change: (change(out.logits), None)[1])
        with pytest.raises(ValueError, match=r"logits are not its head's product.*scaled, capped or shifted"):
            check_head(model)
        hook.remove()
    assert not body_of(model)._forward_hooks
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"final_logit_softcapping = 30\.0"):
        head_of(model)
    model.config.final_logit_softcapping = None
    model.lm_head = nn.Linear(16, 61)
    with pytest.raises(ValueError, match="without a bias"):
        head_of(model)
