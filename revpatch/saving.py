"""Patches of a model, or by themselves, to files and folders that `loading` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from revpatch.ledger.patch_file import write_entry, write_folder
from revpatch.patch.patched_model import Patch, base_sha256, patch_state, switchboard


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
