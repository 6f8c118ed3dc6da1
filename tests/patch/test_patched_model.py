"""A patch on a whole model: what it must never change, what it must not see, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

from revpatch.config import SidecarConfig
from revpatch.patch.families import FAMILIES, blocks_of, body_of, check_head, family_of, head_of, width_of
from revpatch.patch.gates import GATES
from revpatch.patch.patched_model import (
    Patch,
    PatchedBlock,
    active_patch,
    attach,
    base_parameters,
    base_sha256,
    detach,
    is_patched,
    load_tensors,
    patch_disabled,
    patch_state,
    recording,
    set_gate,
    switchboard,
)
from revpatch.patch.sidecar import SidecarOutput
from revpatch.saving import save_patch

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
every_gate = pytest.mark.parametrize("gate", sorted(GATES))
every_placement = pytest.mark.parametrize("placement", ["residual", "coupled"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

ROUNDING = 2e-5
"""Logits of a few units after three blocks in float32, summed in another order: 2⁻²³ · 5 · a few dozen sums."""

PADDED = {torch.float64: ROUNDING * 2**-29, torch.float32: ROUNDING, torch.bfloat16: 8 * 2**-8 * 5}
"""The same for other dtypes; in bfloat16 a few roundings of a logit of 5, as sums are kept in float32 there."""

Build = Callable[..., nn.Module]
Logits = Callable[..., Tensor]
Config = Callable[..., SidecarConfig]
Randomize = Callable[..., Any]


def _ids(rows: int = 2, time: int = 9, seed: int = 5) -> Tensor:
    return torch.randint(3, 61, (rows, time), generator=torch.Generator().manual_seed(seed))


def _largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# What it must never change


@every_family
@every_gate
@every_placement
@every_dtype
def test_logits_are_the_bases_at_the_start(
    build: Build, logits: Logits, sidecar_config: Config, family: str, gate: str, placement: str, dtype: torch.dtype
) -> None:
    model, ids = build(family, dtype=dtype), _ids()
    before = logits(model, ids)
    attach(model, sidecar_config(gate=gate, placement=placement))
    after = logits(model, ids)
    assert after.dtype == dtype
    assert torch.equal(after, before)


@every_family
@every_placement
@every_dtype
def test_off_is_the_base_bit_for_bit(
    build: Build,
    logits: Logits,
    sidecar_config: Config,
    randomize: Randomize,
    family: str,
    placement: str,
    dtype: torch.dtype,
) -> None:
    model, ids = build(family, dtype=dtype), _ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    before = logits(model, ids, mask)
    blocks = list(blocks_of(model))
    frozen = dict(model.named_parameters())
    cast(Any, model).lm_head.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in frozen.items()}
    assert len(set(flags.values())) == 2
    patch = attach(model, sidecar_config(placement=placement))
    randomize(patch)

    patched = logits(model, ids, mask)
    assert _largest(patched, before) > 0.5
    with patch_disabled(model):
        assert torch.equal(logits(model, ids, mask), before)
    assert torch.equal(logits(model, ids, mask), patched)
    set_gate(model, "off")
    assert torch.equal(logits(model, ids, mask), before)
    set_gate(model, "on")
    assert _largest(logits(model, ids, mask), patched) > 0.05
    assert _largest(logits(model, ids, mask), before) > 0.05
    set_gate(model, "learned")
    assert torch.equal(logits(model, ids, mask), patched)
    assert not any(parameter.requires_grad for _, parameter in base_parameters(model))

    assert detach(model) is patch
    assert torch.equal(logits(model, ids, mask), before)
    assert all(a is b for a, b in zip(blocks_of(model), blocks, strict=True))
    after = dict(model.named_parameters())
    assert after.keys() == frozen.keys()
    assert all(after[name] is frozen[name] for name in frozen)
    assert {name: parameter.requires_grad for name, parameter in after.items()} == flags
    assert not body_of(model)._forward_pre_hooks
    assert not any(isinstance(module, PatchedBlock) for module in model.modules())

    attach(model, patch)
    assert torch.equal(logits(model, ids, mask), patched)


@every_dtype
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_training_touches_the_sidecars_alone(
    build: Build, sidecar_config: Config, family: str, dtype: torch.dtype
) -> None:
    model, ids = build(family, dtype=dtype), _ids(4, 12)
    patch = attach(model, sidecar_config())
    before = base_sha256(model)
    base = dict(model.named_parameters())
    assert not {id(p) for p in patch.parameters()} & {id(p) for p in model.parameters()}
    assert not any("sidecar" in name for name in base)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in patch.parameters())
    optimizer = torch.optim.AdamW(patch.parameters(), lr=1e-2)
    start = patch_state(patch)
    losses = []
    for _ in range(8):
        out = model(ids, use_cache=False)
        assert out.logits.dtype == dtype
        loss = nn.functional.cross_entropy(out.logits.float()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in patch.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all(), name
        assert all(p.grad is None and not p.requires_grad for p in base.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(tensor, start[name]) for name, tensor in patch_state(patch).items())
    assert base_sha256(model) == before
    with patch_disabled(model):
        assert not model(ids, use_cache=False).logits.requires_grad
    detach(model)
    assert base_sha256(model) == before


# What a position must not see


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
    model, ids = build(family, dtype=dtype), _ids(2, 10)
    randomize(attach(model, sidecar_config(gate=gate, placement=placement)))
    before = logits(model, ids)
    for t in (0, 4, 8):
        other = ids.clone()
        other[:, t + 1] = (other[:, t + 1] + 7) % 50 + 3
        after = logits(model, other)
        leak = _largest(after[:, : t + 1], before[:, : t + 1])
        assert _largest(after[:, t + 1 :], before[:, t + 1 :]) > 1e-2
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
    rows = [_ids(1, length, seed=index)[0] for index, length in enumerate(real)]
    width = max(length + pad for length, pad in zip(real, pads, strict=False))
    ids = torch.full((len(rows), width), junk)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    batch = logits(model, ids, mask)
    for index, row in enumerate(rows):
        assert _largest(batch[index][mask[index].bool()], logits(model, row[None])[0]) <= PADDED[dtype]


def test_padding_matters_without_a_mask(
    build: Build, logits: Logits, sidecar_config: Config, randomize: Randomize
) -> None:
    """The check on the check: the gate does hang on the mask it is given."""
    model = build("gpt2")
    patch = randomize(attach(model, sidecar_config()))
    u = torch.randn(2, 6, 16)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert _largest(patch.sidecar(0)(u, mask).gate[0, 2:], patch.sidecar(0)(u).gate[0, 2:]) > 1e-2


# How a model may be called


@every_family
def test_every_way_of_calling_sees_the_mask(
    build: Build, logits: Logits, sidecar_config: Config, randomize: Randomize, family: str
) -> None:
    model, ids = build(family), _ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    randomize(attach(model, sidecar_config()))
    expected = logits(model, ids, mask, position_ids=None)
    assert _largest(logits(model, ids, position_ids=None), expected) > 1e-3
    with torch.no_grad():
        embedded = cast(Any, model).get_input_embeddings()(ids)
        head, body = head_of(model), body_of(model)
        ways = {
            "embeddings": model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits,
            "body, by position": head(
                (body(ids, None, mask) if family == "gpt2" else body(ids, mask)).last_hidden_state
            ),
            "boolean mask": model(ids, attention_mask=mask.bool(), use_cache=False).logits,
            "with a cache": model(ids, attention_mask=mask).logits,
        }
    for way, found in ways.items():
        assert _largest(found, expected) <= ROUNDING, way
    # The mask of one call must not stay for the next.
    assert _largest(logits(model, ids[:, :6]), logits(model, ids)[:, :6]) <= ROUNDING


def test_a_mask_per_pair_of_tokens_is_refused_only_where_it_is_used(
    build: Build, sidecar_config: Config, randomize: Randomize, logits: Logits
) -> None:
    model, ids = build("llama"), _ids(2, 6)
    mask = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
    base = model(ids, attention_mask=mask, use_cache=False).logits
    randomize(attach(model, sidecar_config()))
    with pytest.raises(ValueError, match=r"\(batch, time\).*two-dimensional"):
        model(ids, attention_mask=mask, use_cache=False)
    with patch_disabled(model):
        assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, base)
    detach(model)
    randomize(attach(model, sidecar_config(gate="token")))
    assert _largest(model(ids, attention_mask=mask, use_cache=False).logits, logits(model, ids)) <= ROUNDING


# Switching


@every_family
def test_another_patch_on_the_same_base(
    build: Build, logits: Logits, sidecar_config: Config, randomize: Randomize, family: str
) -> None:
    """Of another gate, placement and set of layers, too."""
    model, ids = build(family), _ids()
    base = logits(model, ids)
    one = randomize(attach(model, sidecar_config()), seed=1)
    other = randomize(Patch(16, 3, sidecar_config(gate="token", placement="coupled", layers=[2, 0])), seed=2)
    assert other.layers == [0, 2]
    with_one = logits(model, ids)
    with active_patch(model, other):
        with_other = logits(model, ids)
        with patch_disabled(model):
            assert torch.equal(logits(model, ids), base)
        assert torch.equal(logits(model, ids), with_other)
    assert torch.equal(logits(model, ids), with_one)
    with pytest.raises(RuntimeError, match="boom"), active_patch(model, other):
        raise RuntimeError("boom")
    assert torch.equal(logits(model, ids), with_one)
    detach(model)
    attach(model, other)
    assert torch.equal(logits(model, ids), with_other)
    assert _largest(with_one, with_other) > 0.05
    for width, blocks, words in ((16, 2, "2 blocks.*has 3"), (8, 3, "width of 8.*width is 16")):
        with pytest.raises(ValueError, match=words), active_patch(model, Patch(width, blocks, sidecar_config())):
            pass
    assert torch.equal(logits(model, ids), with_other)
    assert patch_state(one) != {}


class _Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, tuple[Tensor, ...]]] = []
        self.plain: list[tuple[int, Tensor]] = []

    def measure(self, output: SidecarOutput) -> tuple[Tensor, ...]:
        return output.gate, output.update

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        self.seen.append((layer, hidden, measured))

    def record_plain(self, layer: int, hidden: Tensor) -> None:
        self.plain.append((layer, hidden))


def test_recording_shows_what_the_blocks_hand_on(build: Build, sidecar_config: Config, randomize: Randomize) -> None:
    model, ids = build("qwen2"), _ids()
    randomize(attach(model, sidecar_config(layers=[0, 2])))
    entering: list[Tensor] = []
    hooks = [
        block.block.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        for block in cast(Any, blocks_of(model))
    ]
    with recording(model, recorder := _Recorder()):
        out = model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert [layer for layer, *_ in recorder.seen] == [0, 2]
    assert [layer for layer, _ in recorder.plain] == [1]
    assert recorder.seen[0][1] is entering[1]
    assert recorder.plain[0][1] is entering[2]
    last = recorder.seen[1][1]
    assert torch.equal(head_of(model)(cast(Any, body_of(model)).norm(last)), out.logits)
    with recording(model, recorder := _Recorder()), patch_disabled(model):
        model(ids, use_cache=False)
    assert [layer for layer, _ in recorder.plain] == [0, 1, 2]
    model(ids, use_cache=False)
    assert len(recorder.plain) == 3
    assert not recorder.seen


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("recorded", [False, True], ids=["alone", "recorded"])
@pytest.mark.parametrize("use_cache", [False, None], ids=["no cache", "default"])
def test_checkpointing_changes_memory_only(
    build: Build, sidecar_config: Config, randomize: Randomize, family: str, recorded: bool, use_cache: bool | None
) -> None:
    model, ids = build(family), _ids()
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    patch = randomize(attach(model, sidecar_config()))
    runs: list[int] = []
    for block in cast(Any, blocks_of(model)):
        block.block.register_forward_pre_hook(lambda *_: runs.append(1))

    def step() -> tuple[float, list[Tensor], int]:
        patch.zero_grad()
        runs.clear()
        recorder = _Recorder()
        if recorded:
            with recording(model, recorder):
                out = model(ids, attention_mask=mask, use_cache=use_cache).logits
        else:
            out = model(ids, attention_mask=mask, use_cache=use_cache).logits
        loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for _, _, (gate, update) in recorder.seen:
            loss = loss + gate.mean() + update.square().mean()
        loss.backward()
        assert len(recorder.seen) == (3 if recorded else 0)
        return loss.item(), [p.grad.clone() for p in patch.parameters()], len(runs)

    switchboard(model).recompute_sidecars = False
    plain = step()
    switchboard(model).recompute_sidecars = True
    recomputed = step()
    switchboard(model).checkpointing = True
    saved = step()
    for other in (recomputed, saved):
        assert other[0] == plain[0]
        for a, b in zip(other[1], plain[1], strict=True):
            assert torch.equal(a, b)
    assert recomputed[2] == plain[2]
    assert plain[2] == 3
    # The first block has nothing to learn before it, so it is not run again; a cache would grow if blocks were.
    assert saved[2] == (5 if use_cache is False else 3)
    with torch.no_grad():
        assert torch.isfinite(model(ids, use_cache=False).logits).all()
    assert all(parameter.grad is None for parameter in model.parameters())


# State


@every_gate
@every_placement
def test_state_round_trips_exactly(
    build: Build, logits: Logits, sidecar_config: Config, randomize: Randomize, gate: str, placement: str
) -> None:
    model, ids = build("gpt2"), _ids()
    config = sidecar_config(gate=gate, placement=placement)
    patch = randomize(attach(model, config))
    expected, state = logits(model, ids), patch_state(model)
    assert list(state) == sorted(state)
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in patch.parameters())
    for tensor in state.values():
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad
        assert tensor.is_contiguous()
    frozen = {name: tensor.clone() for name, tensor in state.items()}
    identities = [id(p) for p in patch.parameters()]
    randomize(patch, seed=9)
    assert all(torch.equal(state[name], frozen[name]) for name in state), "the state must be a copy"
    assert _largest(logits(model, ids), expected) > 0.05
    load_tensors(model, state)
    assert torch.equal(logits(model, ids), expected)
    assert [id(p) for p in patch.parameters()] == identities, "an optimizer holds these"
    assert all(p.requires_grad for p in patch.parameters())
    fresh = Patch(16, 3, config)
    load_tensors(fresh, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in patch_state(fresh).items())


def _missing(state: dict[str, Any]) -> None:
    del state[next(reversed(state))]


def _unknown(state: dict[str, Any]) -> None:
    state["07.coupling.f.up.weight"] = torch.zeros(2)


def _mis_shaped(state: dict[str, Any]) -> None:
    name = next(reversed(state))
    state[name] = torch.zeros(*state[name].shape, 1)


def _broadcast(state: dict[str, Any]) -> None:
    state["02.coupling.g.up.weight"] = state["02.coupling.g.up.weight"][:1]


def _integers(state: dict[str, Any]) -> None:
    name = next(reversed(state))
    state[name] = state[name].long()


def _no_tensor(state: dict[str, Any]) -> None:
    name = next(reversed(state))
    state[name] = state[name].tolist()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_missing, r"missing \['02\.gates\.0\.weight'\], unknown none"),
        (_unknown, r"missing none, unknown \['07\.coupling\.f\.up\.weight'\]"),
        (_mis_shaped, r"02\.gates\.0\.weight: expected shape \(16,\), found \(16, 1\)"),
        (_broadcast, r"02\.coupling\.g\.up\.weight: expected shape \(8, 4\), found \(1, 4\)"),
        (_integers, r"02\.gates\.0\.weight: expected a tensor of floats, found torch\.int64"),
        (_no_tensor, r"02\.gates\.0\.weight: expected a tensor of floats, found .*list"),
    ],
)
def test_loading_is_all_or_nothing(
    sidecar_config: Config, randomize: Randomize, spoil: Callable[[dict[str, Any]], None], words: str
) -> None:
    patch = randomize(Patch(16, 3, sidecar_config()))
    before = patch_state(patch)
    other: dict[str, Any] = patch_state(randomize(Patch(16, 3, sidecar_config()), seed=2))
    spoil(other)
    with pytest.raises(ValueError, match=words):
        load_tensors(patch, other)
    after = patch_state(patch)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_state_of_another_kind_of_patch_is_refused(sidecar_config: Config) -> None:
    state = patch_state(Patch(16, 3, sidecar_config(placement="coupled")))
    for config in (sidecar_config(), sidecar_config(placement="coupled", layers=[0, 1])):
        with pytest.raises(ValueError, match="check gate, placement and layers"):
            load_tensors(Patch(16, 3, config), state)
    with pytest.raises(ValueError, match="expected shape"):
        load_tensors(Patch(16, 3, sidecar_config(placement="coupled", bottleneck=5)), state)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_patch_of_gpt2_is_small(tmp_path: Path, suffix: str) -> None:
    """Five megabytes in float32 at the defaults, against the 498 MB of GPT-2."""
    patch = Patch(768, 12, SidecarConfig())
    save_patch(patch, tmp_path / f"patch{suffix}")
    assert all(tensor.dtype == torch.float32 for tensor in patch_state(patch).values())
    assert (tmp_path / f"patch{suffix}").stat().st_size <= 5e6


def test_sidecars_are_found_by_their_block(sidecar_config: Config, randomize: Randomize) -> None:
    patch = randomize(Patch(16, 3, sidecar_config(layers=[2, 0])))
    assert patch.layers == [0, 2]
    assert patch.log_scales().tolist() == [patch.sidecar(layer).coupling.log_scale.item() for layer in (0, 2)]
    assert patch.sidecar(1) is None


# Refusals


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
    model, ids = build("llama"), _ids()
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


def _untouched(model: nn.Module) -> None:
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, PatchedBlock) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


# Families


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_the_parts(build: Build, family: str, tied: bool) -> None:
    model, ids = build(family, tied), _ids()
    assert width_of(model) == 16
    assert len(blocks_of(model)) == 3
    hidden = body_of(model)(ids, use_cache=False).last_hidden_state
    assert torch.equal(hidden @ head_of(model).weight.T, model(ids, use_cache=False).logits)


def test_a_head_that_is_not_linear_is_refused(build: Build) -> None:
    model = cast(Any, build("llama"))
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"final_logit_softcapping = 30\.0"):
        head_of(model)
    model.config.final_logit_softcapping = None
    model.lm_head = nn.Linear(16, 61)
    with pytest.raises(ValueError, match="without a bias"):
        head_of(model)


@every_family
@every_dtype
def test_logits_are_held_against_the_head(build: Build, family: str, dtype: torch.dtype) -> None:
    """Whatever the key is called that makes more of them than the head's product."""
    model = cast(Any, build(family, dtype=dtype))
    check_head(model)
    for change in (lambda x: x * 0.9, lambda x: 30 * torch.tanh(x / 30) * 1.02, lambda x: x + 0.3):

        def changed(_: nn.Module, __: Any, out: Any, change: Callable[[Tensor], Tensor] = change) -> None:
            out.logits = change(out.logits)

        hook = model.register_forward_hook(changed)
        with pytest.raises(ValueError, match=r"logits are not its head's product.*scaled, capped or shifted"):
            check_head(model)
        hook.remove()
    check_head(model)
    assert not body_of(model)._forward_hooks


# The base's identity


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_base_sha256(build: Build, sidecar_config: Config, family: str, tied: bool) -> None:
    model = build(family, tied)
    exact, rounded = base_sha256(model), base_sha256(model, rounded=True)
    names = [name for name, _ in base_parameters(model)]
    assert names == sorted(names)
    assert ("lm_head.weight" in names) is not tied
    assert exact != rounded
    assert base_sha256(build(family, tied)) == exact
    assert base_sha256(build(family, tied, seed=1)) != exact

    patch = attach(model, sidecar_config())
    assert base_sha256(model) == exact
    assert base_sha256(model, rounded=True) == rounded
    assert [name for name, _ in base_parameters(model)] == names
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.fill_(1.0)
    assert base_sha256(model) == exact
    detach(model)
    assert base_sha256(model) == exact

    cast_down = build(family, tied, dtype=torch.bfloat16)
    assert base_sha256(cast_down, rounded=True) == rounded
    assert base_sha256(cast_down) == rounded
    for name, parameter in base_parameters(model):
        with torch.no_grad():
            value = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] = value + 0.5
            assert base_sha256(model) != exact, name
            assert base_sha256(model, rounded=True) != rounded, name
            parameter.view(-1)[-1] = value
    with torch.no_grad():
        last = list(model.parameters())[-1].view(-1)
        last[0] = torch.nextafter(last[0], last[0] + 1)
    assert base_sha256(model) != exact
