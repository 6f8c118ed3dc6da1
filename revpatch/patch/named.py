"""Several patches on one model, by name; one of them is on, and switching touches nothing but a reference.

attach(model, first, name="a")
add_patch(model, second, name="b")
set_patch(model, "b")
"""

from __future__ import annotations

from torch import nn

from revpatch.config import SidecarConfig
from revpatch.patch.families import blocks_of, width_of
from revpatch.patch.patched_model import DEFAULT_NAME as DEFAULT_NAME
from revpatch.patch.patched_model import Patch, check_fits, free_switchboard, switchboard
from revpatch.patch.switchboard import SWITCHING, Switchboard


def add_patch(model: nn.Module, patch: Patch | SidecarConfig, name: str) -> Patch:
    """Puts another patch beside those that a model carries; it is not switched on.

    Raises:
        ValueError: the model carries no patch, or one of this name, or the patch is of another shape.

    >>> import revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> first = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2), name="a")
    >>> second = revpatch.add_patch(model, revpatch.SidecarConfig(bottleneck=4, gate="token"), name="b")
    >>> revpatch.set_patch(model, "b")
    >>> revpatch.patch_names(model)
    ['a', 'b']
    >>> revpatch.remove_patch(model, "a") is first
    True
    """
    with SWITCHING:
        board = switchboard(model)
        if name in board.patches:
            raise ValueError(
                f"the model carries a patch named {name!r} already: choose another name, or remove_patch it"
            )
        if isinstance(patch, SidecarConfig):
            patch = Patch(width_of(model), len(blocks_of(model)), patch)
        check_fits(model, patch)
        board.patches[name] = patch.to(next(model.parameters()).device)
        return patch


def set_patch(model: nn.Module, name: str) -> None:
    """Chooses the patch that is on; where the gates are off, they stay off. Takes microseconds and copies nothing.

    Raises:
        ValueError: there is no patch of that name, or `patch_disabled` or `active_patch` is in force.

    >>> import revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> first = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2), name="a")
    >>> second = revpatch.add_patch(model, revpatch.SidecarConfig(bottleneck=4), name="b")
    >>> revpatch.set_patch(model, "b")
    >>> revpatch.detach(model) is second
    True
    """
    with SWITCHING:
        board = free_switchboard(model)
        board.attached = _named(board, name)
        if board.choice.patch is not None:
            board.choice = board.choice._replace(patch=board.attached)


def remove_patch(model: nn.Module, name: str) -> Patch:
    """Takes a patch that is not chosen off the model, and returns it.

    Raises:
        ValueError: there is no patch of that name, it is the chosen one, or `patch_disabled` or `active_patch` is in
            force.

    >>> import revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> first = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2), name="a")
    >>> second = revpatch.add_patch(model, revpatch.SidecarConfig(bottleneck=4), name="b")
    >>> revpatch.remove_patch(model, "b") is second
    True
    """
    with SWITCHING:
        board = free_switchboard(model)
        if _named(board, name) is board.attached:
            raise ValueError(f"the patch {name!r} is the chosen one: set_patch another first, or detach(model)")
        return board.patches.pop(name)


def patch_names(model: nn.Module) -> list[str]:
    """The names of the patches on a model, in the order in which they came. Raises ValueError if there is none.

    >>> import revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> revpatch.patch_names(model)
    ['default']
    """
    return list(switchboard(model).patches)


def _named(board: Switchboard, name: str) -> Patch:
    if name not in board.patches:
        raise ValueError(f"no patch named {name!r} on the model; there: {', '.join(board.patches)}")
    return board.patches[name]
