"""Patches from what a person writes to name them: `FILE`, `RUN`, `RUN@REF` or a folder of save_pretrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from revpatch.base import DTYPES, BaseNotFoundError, load_base
from revpatch.config import SidecarConfig
from revpatch.ledger.base_place import base_place
from revpatch.ledger.entry import EntryError
from revpatch.ledger.folder import is_patch_folder, read_folder
from revpatch.ledger.references import locate
from revpatch.patch.families import blocks_of, width_of
from revpatch.patch.named import DEFAULT_NAME, add_patch, set_patch
from revpatch.patch.patched_model import Patch, attach, base_sha256, free_switchboard, is_patched, load_tensors
from revpatch.stream.tokenizer import load_tokenizer


class Stored(NamedTuple):
    """A patch as it was stored."""

    tensors: dict[str, Tensor]
    base: dict[str, Any]
    """model, revision, sha256 and dtype of its base; None for what was not known."""
    sidecar: SidecarConfig


def read_patch(source: str | Path) -> Stored:
    """Reads a patch, without a model.

    Raises:
        FileNotFoundError: there is no such file, folder or run.
        ValueError: it is no patch, is damaged, or is not what the journal recorded.
    """
    tensors, metadata = read_folder(Path(source)) if is_patch_folder(Path(source)) else locate(source).load()
    return Stored(tensors, *whose(source, metadata))


def whose(source: str | Path, metadata: dict[str, Any]) -> tuple[dict[str, Any], SidecarConfig]:
    """The base (with model, sha256 and dtype at least) and the sidecar config that a patch's metadata names.

    Raises:
        EntryError: they name none, or say something of the base that can't be so.
    """
    try:
        base, sidecar = dict(metadata["base"]), SidecarConfig.model_validate(metadata["sidecar"])
        base = {key: base[key] for key in ("model", "sha256", "dtype")} | base
    except (KeyError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise EntryError(
            f"{source}: expected metadata of a base and a sidecar, found none ({first}): not a patch"
        ) from error
    for key in ("model", "revision", "sha256", "dtype"):
        if (value := base.get(key)) is not None and not isinstance(value, str):
            raise EntryError(f"{source}: expected text as base.{key}, found {value!r}: not a patch that revpatch wrote")
    if base["dtype"] not in (None, *DTYPES):
        raise EntryError(
            f"{source}: expected one of {', '.join(DTYPES)} as base.dtype, found {base['dtype']!r}: not a patch that "
            "revpatch wrote"
        )
    return base, sidecar


def load_patched(patch: str | Path, base: str | None = None) -> tuple[nn.Module, Any]:
    """The base with a patch attached, in eval mode, and the tokenizer.

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
    ...     revpatch.save_patch(patch, f"{folder}/mine.pt")
    ...     patched, tokenizer = revpatch.load_patched(f"{folder}/mine.pt", base=folder)
    >>> revpatch.is_patched(patched)
    True
    """
    return load_hashed(patch, base)[:2]


def load_hashed(patch: str | Path, base: str | None = None) -> tuple[nn.Module, Any, str]:
    """The same, and the base's sha256, rounded as patches name it."""
    stored = read_patch(patch)
    name = base or stored.base["model"]
    if name is None:
        raise ValueError(f"{patch} doesn't say what its base is called: name it with --base (base=)")
    revision = stored.base.get("revision") if base is None else None
    if base is None and not is_patch_folder(Path(patch)):
        name = base_place(locate(patch), name)
    try:
        model = load_base(name, revision, DTYPES[stored.base["dtype"] or "float32"])
    except BaseNotFoundError as error:
        raise ValueError(f"base {name}: {error}; name its folder with --base") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"base {name}: {str(error).splitlines()[0]}") from error
    tokenizer = load_tokenizer(name, revision)
    sha256 = _check_base(patch, stored, model, name)
    attach(model, _patch_of(patch, stored, model))
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
    stored = read_patch(source)
    _check_base(source, stored, model, "the model")
    patch = _patch_of(source, stored, model)
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
    if not is_patch_folder(Path(folder)):
        read_folder(Path(folder))  # says what is missing
    return load_patch(model, folder, name)


def _check_base(source: str | Path, stored: Stored, model: nn.Module, name: str) -> str:
    """The model's sha256, if it is that of the patch's base or the patch names none."""
    expected, found = stored.base["sha256"], base_sha256(model, rounded=True)
    if expected is not None and found != expected:
        if "float16" in (stored.base["dtype"], held := str(next(model.parameters()).dtype).removeprefix("torch.")):
            raise ValueError(
                f"{source} is a patch of a base in {stored.base['dtype']} with sha256 {expected[:16]}…, and {name} is "
                f"held in {held} with {found[:16]}…. If it is the same base: float16 rounds weights otherwise than "
                f"bfloat16 and float32, so hold it in {stored.base['dtype']}; else name the right base with --base "
                "(base=)"
            )
        raise ValueError(
            f"{source} is a patch of a base with sha256 {expected[:16]}…, but {name} has {found[:16]}…: name the right "
            "base with --base (base=)"
        )
    return found


def _patch_of(source: str | Path, stored: Stored, model: nn.Module) -> Patch:
    try:
        patch = Patch(width_of(model), len(blocks_of(model)), stored.sidecar)
        load_tensors(patch, stored.tensors)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return patch
