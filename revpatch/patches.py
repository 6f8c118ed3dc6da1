"""Patches on a model: loaded from `FILE`, `RUN`, `RUN@REF` or a saved folder, saved, and several of them by name.

attach(model, first, name="a")
add_patch(model, second, name="b")
set_patch(model, "b")            # one is on; switching touches nothing but a reference
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from revpatch.base import DTYPES, BaseNotFoundError, load_base
from revpatch.config import SidecarConfig
from revpatch.corpus.tokenizer import load_tokenizer
from revpatch.ledger.ledger import PatchFile, base_place, read_patch
from revpatch.ledger.patch_file import FOLDER_CONFIG, FOLDER_WEIGHTS, write_entry, write_folder
from revpatch.patch.block import SWITCHING, Switchboard
from revpatch.patch.families import blocks_of, width_of
from revpatch.patch.patched_model import DEFAULT_NAME as DEFAULT_NAME
from revpatch.patch.patched_model import (
    Patch,
    attach,
    base_sha256,
    check_fits,
    free_switchboard,
    is_patched,
    load_tensors,
    patch_state,
    switchboard,
)


def load_patched(patch: str | Path, base: str | None = None) -> tuple[nn.Module, Any]:
    """Return the base with a patch attached, in eval mode, and the tokenizer.

    Args:
        patch: a file, a run, `RUN@REF` (as in `ledger.references`) or a folder that `save_pretrained` wrote.
        base: name or folder of the base; None is the name that the patch gives.

    Raises:
        FileNotFoundError: there is no such file, folder or run.
        ValueError: it is no patch, is damaged, is not what the journal recorded, or belongs to another base.

    >>> import tempfile, revpatch
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> patch = revpatch.Patch(8, 2, revpatch.SidecarConfig(bottleneck=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder)
    ...     _ = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel())).save_pretrained(folder)
    ...     revpatch.save_patch(patch, f"{folder}/mine.safetensors")
    ...     patched, tokenizer = revpatch.load_patched(f"{folder}/mine.safetensors", base=folder)
    >>> revpatch.is_patched(patched)
    True
    """
    return load_hashed(patch, base)[:2]


def load_hashed(patch: str | Path, base: str | None = None) -> tuple[nn.Module, Any, str]:
    """The same, and the base's sha256, rounded as patches name it."""
    read = read_patch(patch)
    name = base or read.base["model"]
    if name is None:
        raise ValueError(f"{patch} doesn't say what its base is called: name it with --base (base=)")
    revision = read.base.get("revision") if base is None else None
    if base is None:
        name = base_place(read, name)
    try:
        model = load_base(name, revision, DTYPES[read.base["dtype"] or "float32"])
    except BaseNotFoundError as error:
        raise ValueError(f"base {name}: {error}; name its folder with --base") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"base {name}: {str(error).splitlines()[0]}") from error
    tokenizer = load_tokenizer(name, revision)
    sha256 = _check_base(read, model, name)
    attach(model, _patch_of(read, model))
    return model, tokenizer, sha256


def load_patch(model: nn.Module, source: str | Path, name: str = DEFAULT_NAME) -> Patch:
    """Puts a stored patch on a model that is there already, beside those it carries, and switches it on.

    Args:
        model: the base of the patch, with or without other patches on it.
        source: as in `load_patched`.
        name: under which `set_patch` finds it.

    Raises:
        FileNotFoundError: there is no such file, folder or run.
        ValueError: as `load_patched`, or the model carries a patch of that name.

    >>> import tempfile, revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> folder = tempfile.TemporaryDirectory()
    >>> revpatch.save_patch(model, f"{folder.name}/mine.safetensors")
    >>> _ = revpatch.load_patch(model, f"{folder.name}/mine.safetensors", name="again")
    >>> revpatch.patch_names(model)
    ['default', 'again']
    >>> folder.cleanup()
    """
    read = read_patch(source)
    _check_base(read, model, "the model")
    patch = _patch_of(read, model)
    if not is_patched(model):
        return attach(model, patch, name)
    free_switchboard(model)  # before anything is put on it
    add_patch(model, patch, name)
    set_patch(model, name)
    return patch


def from_pretrained(model: nn.Module, folder: str | Path, name: str = DEFAULT_NAME) -> Patch:
    """`load_patch` of a folder that `save_pretrained` wrote; anything else is refused (ValueError).

    >>> import tempfile, revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> folder = tempfile.TemporaryDirectory()
    >>> revpatch.save_pretrained(model, folder.name)
    >>> _ = revpatch.detach(model)
    >>> revpatch.from_pretrained(model, folder.name).config.bottleneck
    2
    >>> folder.cleanup()
    """
    if not (Path(folder) / FOLDER_WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{folder}: expected a folder with {FOLDER_WEIGHTS} and {FOLDER_CONFIG}, as save_pretrained writes it, "
            f"found no {FOLDER_WEIGHTS}"
        )
    return load_patch(model, folder, name)


def _check_base(read: PatchFile, model: nn.Module, name: str) -> str:
    """Return the model's sha256, if it is that of the patch's base or the patch names none."""
    expected, found = read.base["sha256"], base_sha256(model, rounded=True)
    if expected is not None and found != expected:
        if "float16" in (read.base["dtype"], held := str(next(model.parameters()).dtype).removeprefix("torch.")):
            raise ValueError(
                f"{read.reference} is a patch of a base in {read.base['dtype']} with sha256 {expected[:16]}…, and "
                f"{name} is held in {held} with {found[:16]}…. If it is the same base: float16 rounds weights "
                f"otherwise than bfloat16 and float32, so hold it in {read.base['dtype']}; else name the right base "
                "with --base (base=)"
            )
        raise ValueError(
            f"{read.reference} is a patch of a base with sha256 {expected[:16]}…, but {name} has {found[:16]}…: name "
            "the right base with --base (base=)"
        )
    return found


def _patch_of(read: PatchFile, model: nn.Module) -> Patch:
    try:
        patch = Patch(width_of(model), len(blocks_of(model)), read.sidecar)
        load_tensors(patch, read.tensors)
    except ValueError as error:
        raise ValueError(f"{read.reference}: {error}") from error
    return patch


def save_patch(patch: Patch | nn.Module, file: str | Path) -> None:
    """Writes a patch, or the one that is chosen on a model, to one .safetensors file.

    Of a model, the base's name, dtype and sha256 go with it, and loading holds the base against them; a patch by itself
    knows nothing of its base but the shape.

    Raises:
        ValueError: the model carries no patch, the file's name can't be used, or the file is there with other content.
        OSError: the disk fails.

    >>> import tempfile, revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     revpatch.save_patch(model, f"{folder}/mine.safetensors")
    ...     again = revpatch.load_patch(model, f"{folder}/mine.safetensors", name="again")
    >>> again.config == patch.config
    True
    """
    write_entry(Path(file), *_stored(patch))


def save_pretrained(patch: Patch | nn.Module, folder: str | Path) -> None:
    """The same, as a folder of a config and safetensors; raises as `save_patch`.

    >>> import tempfile, revpatch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> patch = revpatch.attach(model, revpatch.SidecarConfig(bottleneck=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     revpatch.save_pretrained(model, folder)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['patch_config.json', 'patch_model.safetensors']
    """
    write_folder(Path(folder), *_stored(patch))


def _stored(patch: Patch | nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    base: dict[str, Any] = {"model": None, "revision": None, "sha256": None, "dtype": None}
    if not isinstance(patch, Patch):
        model, patch = patch, switchboard(patch).attached
        base["model"] = getattr(model.config, "name_or_path", None) or None
        base["sha256"] = base_sha256(model, rounded=True)
        base["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    return patch_state(patch), {"base": base, "sidecar": patch.config.model_dump(mode="json")}


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
    """Return the names of the patches on a model, in the order in which they came. Raises ValueError if there is none.

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
