"""A patch on a Hugging Face causal language model: attach, switch, record, detach.

    patch = attach(model, SidecarConfig(bottleneck=64))     # in place; the base is frozen, logits do not change yet
    with patch_disabled(model): ...                         # the base, bit for bit
    with active_patch(model, other): ...                    # another patch on the same base: the teacher
    detach(model)                                           # the very same modules as before

`PatchedBlock` wraps a block and asks the model's one `Switchboard` which patch is on. A switched-off patch is a branch
not taken, never a multiplication by zero. The sidecars live in `Patch`, apart from the base's modules.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor, nn

from revpatch.config import SidecarConfig
from revpatch.patch.block import SWITCHING, Choice, Generate, PatchedBlock, Recorder, Switchboard
from revpatch.patch.families import blocks_of, blocks_within, body_of, family_of, width_of
from revpatch.patch.padding import PaddingReader
from revpatch.patch.sidecar import Patch as Patch

GateMode = Literal["learned", "on", "off"]
DEFAULT_NAME = "default"


def attach(model: nn.Module, patch: Patch | SidecarConfig, name: str = DEFAULT_NAME) -> Patch:
    """Wraps every block of `model`, in place, and freezes the base.

    Args:
        model: a Hugging Face causal language model of a family in `FAMILIES`.
        patch: a patch for this base, or the knobs of a new one. It is moved to the base's device.
        name: under which `set_patch` finds it, when others are added.

    Raises:
        ValueError: the family is unknown, the model is patched already, the patch is of another shape, or the model's
            weights do not all lie on one device.

    >>> import revpatch, torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> before = model(ids).logits
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> _ = torch.nn.init.normal_(patch.sidecar(1).coupling.g.up.weight)  # as if it had been trained
    >>> torch.equal(model(ids).logits, before)
    False
    >>> with revpatch.patch_disabled(model):
    ...     torch.equal(model(ids).logits, before)
    True
    >>> revpatch.detach(model) is patch and torch.equal(model(ids).logits, before)
    True
    """
    with SWITCHING:
        if is_patched(model):
            raise ValueError("the model carries a patch already: detach(model) first, or add_patch another beside it")
        check_whole(model)
        return wrap(model, patch, name)


def wrap(model: nn.Module, patch: Patch | SidecarConfig, name: str = DEFAULT_NAME) -> Patch:
    """As `attach`, of a model without a patch whose weights may be anywhere: where transformers builds a model, they
    come later."""
    with SWITCHING:
        blocks, width = blocks_of(model), width_of(model)
        if isinstance(patch, SidecarConfig):
            patch = Patch(width, len(blocks), patch)
        check_fits(model, patch)
        patch.to(next(model.parameters()).device)
        body = body_of(model)
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        board = Switchboard(name, patch, trained, PaddingReader(body), blocks_within(model))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        board.hooks = [
            body.register_forward_pre_hook(board.begin_call, with_kwargs=True),
            body.register_forward_hook(board.end_call, always_call=True),
        ]
        _put(blocks, [PatchedBlock(block, layer, board) for layer, block in enumerate(blocks)])
        cast(Any, model).save_pretrained = _refuse_to_save
        cast(Any, model).generate = Generate(model, board)
        return patch


def detach(model: nn.Module) -> Patch:
    """Puts the base's own blocks back, with requires_grad as `attach` found it, and returns the chosen patch.

    Raises:
        ValueError: the model carries no patch.

    >>> import revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> revpatch.detach(model) is patch
    True
    """
    with SWITCHING:
        board, blocks = switchboard(model), blocks_of(model)
        for held in board.held:
            raise ValueError(
                f"{held.what} is under way in the thread {held.thread!r}: take the patch off when it has ended"
            )
        _put(blocks, [cast(PatchedBlock, block).block for block in blocks])
    for hook in board.hooks:
        hook.remove()
    for name in ("save_pretrained", "generate"):
        model.__dict__.pop(name, None)
    for name, parameter in model.named_parameters():
        if name in board.required_grad:  # not one that was added since
            parameter.requires_grad_(board.required_grad[name])
    return board.attached


def _put(blocks: nn.ModuleList, others: list[nn.Module]) -> None:
    """Replaces all blocks at once, so that a call that is under way in another thread ends with those it began with."""
    blocks._modules = {str(layer): block for layer, block in enumerate(others)}


def _refuse_to_save(*_: object, **__: object) -> NoReturn:
    """In the place of a patched model's `save_pretrained`. A function of the module, so that models can be copied."""
    raise ValueError(
        "the model carries a patch, and its blocks' weights would be written under names that no base has, without the "
        "patch: detach(model) first, or revpatch.save_pretrained(model, folder) for the patch"
    )


def is_patched(model: nn.Module) -> bool:
    """Return whether `attach` has wrapped the model's blocks.

    >>> import revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> revpatch.is_patched(model)
    False
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> revpatch.is_patched(model)
    True
    """
    return isinstance(blocks_of(model)[0], PatchedBlock)


def switchboard(model: nn.Module) -> Switchboard:
    """Return the model's switchboard.

    Raises:
        ValueError: the model carries no patch.
    """
    block = blocks_of(model)[0]
    if not isinstance(block, PatchedBlock):
        raise ValueError("the model carries no patch: attach(model, patch) first")
    return block._switchboard[0]


def free_switchboard(model: nn.Module) -> Switchboard:
    """The same, to switch something on it.

    Raises:
        ValueError: the model carries no patch, or `patch_disabled`, `active_patch` or `generate` is in force here.
    """
    board = switchboard(model)
    if (held := board.holding()) is not None:
        raise ValueError(f"{held.what} is in force: leave it before patches or gates are switched")
    return board


@contextlib.contextmanager
def active_patch(model: nn.Module, patch: Patch | None) -> Iterator[None]:
    """Runs the model with another patch on the same base, or with none.

    Raises:
        ValueError: the patch is of another shape, or the model carries no patch.

    >>> import revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> with revpatch.active_patch(model, revpatch.Patch(8, 2, revpatch.SidecarConfig(bottleneck=4))):
    ...     model.generate(max_new_tokens=1, bos_token_id=1, pad_token_id=0).shape  # with the other patch
    torch.Size([1, 2])
    """
    board = switchboard(model)
    if patch is not None:
        check_fits(model, patch)
    holding = board.holding()
    gate_open = (board.choice if holding is None else holding.choice).gate_open
    with board.hold("patch_disabled" if patch is None else "active_patch", Choice(patch, gate_open)):
        yield


def patch_disabled(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Runs the base alone; its logits are bit-identical to those of the model before `attach`.

    >>> import revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> with revpatch.patch_disabled(model):
    ...     model.generate(max_new_tokens=1, bos_token_id=1, pad_token_id=0).shape
    torch.Size([1, 2])
    """
    return active_patch(model, None)


def set_gate(model: nn.Module, mode: GateMode) -> None:
    """Sets the gates: as learned, all held at 1 ("on"), or the patch bypassed ("off").

    Raises:
        ValueError: another mode, the model carries no patch, or `patch_disabled` or `active_patch` is in force.

    >>> import revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> revpatch.set_gate(model, "off")
    """
    if mode not in ("learned", "on", "off"):
        raise ValueError(f"gate mode {mode!r} is unknown: choose 'learned', 'on' or 'off'")
    with SWITCHING:
        board = free_switchboard(model)
        board.choice = Choice(None if mode == "off" else board.attached, mode == "on")


@contextlib.contextmanager
def recording(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Shows the recorder what every sidecar does in this thread."""
    here = switchboard(model).here
    assert here.recorder is None, "recordings do not nest"
    here.recorder = recorder
    try:
        yield
    finally:
        here.recorder = None


def check_whole(model: nn.Module) -> None:
    """Raises a ValueError that names a tensor unless all the model's weights lie on one device, and stay there."""
    advice = (
        "hold it on one device before a patch is put on, as from_pretrained does without device_map, or with "
        'device_map={"": 0} or {"": "cpu"}'
    )
    places: dict[str, str] = {}
    for name, parameter in base_parameters(model):
        if type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "ds_id"):
            raise ValueError(f"the model is cut into parts that lie on several ranks, {name} among them: {advice}")
        places.setdefault(str(parameter.device), name)
    if "meta" in places:
        raise ValueError(
            f"the model's weights are not all in memory: {places['meta']} is on the meta device, as they are with "
            f"device_map where it offloads to the CPU or the disk, or before they are loaded: {advice}"
        )
    if len(places) > 1:
        found = ", ".join(f"{name} on {place}" for place, name in places.items())
        raise ValueError(f"the model is spread over {len(places)} devices ({found}): {advice}")


def check_fits(model: nn.Module, patch: Patch) -> None:
    """Raises a ValueError that shows both sides if the patch was made for another width or number of blocks."""
    blocks, width = len(blocks_of(model)), width_of(model)
    if patch.blocks != blocks:
        raise ValueError(f"the patch is for a model of {patch.blocks} blocks, the model has {blocks}")
    if patch.width != width:
        raise ValueError(f"the patch is for a width of {patch.width}, the model's width is {width}")


def patch_state(patch: Patch | nn.Module) -> dict[str, Tensor]:
    """Return the sidecars' tensors by name, as detached float32 copies on the CPU, in a fixed order."""
    patch = patch if isinstance(patch, Patch) else switchboard(patch).attached
    state = patch.sidecars.state_dict()
    return {name: state[name].detach().to("cpu", torch.float32, copy=True).contiguous() for name in sorted(state)}


def load_tensors(patch: Patch | nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies `patch_state` tensors into a patch, or into the one a model carries. All or nothing.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or not of floats; nothing is changed then.
    """
    patch = patch if isinstance(patch, Patch) else switchboard(patch).attached
    own = patch.sidecars.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"not the tensors of this patch: missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'} "
            f"({len(missing)} and {len(unknown)} in all); check gate, placement and layers"
        )
    for name, tensor in own.items():
        found = tensors[name]
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise ValueError(f"{name}: expected a tensor of floats, found {getattr(found, 'dtype', type(found))}")
        if found.shape != tensor.shape:
            raise ValueError(f"{name}: expected shape {tuple(tensor.shape)}, found {tuple(found.shape)}")
        if name.endswith(".channels") and not bool(((found > 0) & found.isfinite()).all()):
            raise ValueError(f"{name}: expected the sizes of a base's channels, all above 0 and finite: it is damaged")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's parameters by the names they have without a patch, sorted; tied ones once."""
    prefix = family_of(model).blocks + "."
    named = []
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{layer}.{rest.removeprefix('block.') if is_patched(model) else rest}"
        named.append((name, parameter))
    return iter(sorted(named, key=lambda item: item[0]))


def base_sha256(model: nn.Module, rounded: bool = False) -> str:
    """Return the sha256 of names, shapes and values of the base's parameters, patched or not.

    Args:
        rounded: hash the values rounded to bfloat16, so that a base has one identity whether it is held in float32 or
            bfloat16. Patches carry this one; the exact one proves that training changed nothing.

    Raises:
        ValueError: they do not all lie on one device.
    """
    check_whole(model)
    digest = hashlib.sha256()
    for name, parameter in base_parameters(model):
        value = parameter.detach().to(torch.bfloat16) if rounded else parameter.detach()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
