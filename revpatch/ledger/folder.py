"""A patch as a folder, as people know them from PEFT: a config to read, and the tensors as safetensors.

patch_config.json           {"format", "version", "weights_sha256", "metadata"}, metadata as in an entry
patch_model.safetensors     an entry (see entry.py), which vouches for its tensors and holds the same metadata
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from revpatch.durable import sha256_of, write_atomically
from revpatch.ledger.entry import EntryError, read_entry, serialise
from revpatch.ledger.plain import to_plain

CONFIG_NAME = "patch_config.json"
WEIGHTS_NAME = "patch_model.safetensors"
FORMAT = "revpatch-patch-folder"
VERSION = 1


def is_patch_folder(path: Path) -> bool:
    """Whether `path` is a folder with a patch's config in it."""
    return (path / CONFIG_NAME).is_file()


def write_folder(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a patch into `folder`, which is made if it is not there.

    Raises:
        EntryError: another patch lies there, or the tensors or the metadata can't be written.
        OSError: the disk fails.
    """
    data = serialise(tensors, metadata, ".safetensors")
    config = {"format": FORMAT, "version": VERSION, "weights_sha256": sha256_of(data), "metadata": to_plain(metadata)}
    text = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    for name, content in ((WEIGHTS_NAME, data), (CONFIG_NAME, text)):
        if (folder / name).exists() and (folder / name).read_bytes() != content:
            raise EntryError(f"{folder / name} exists with other content: name another folder, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS_NAME, data)
    write_atomically(folder / CONFIG_NAME, text)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (CPU) and metadata of a patch folder. No code in it is run.

    Raises:
        EntryError: it is no patch folder, is damaged, or config and weights are not of one patch.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise EntryError(
            f"{folder}: expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, as save_pretrained writes it, found "
            f"no {CONFIG_NAME} that can be read ({error.strerror})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise EntryError(f"{path} is no JSON ({error}): take it from where the folder came from") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
        raise EntryError(f"{path}: expected format {FORMAT!r} of version {VERSION}: not a folder of a patch")
    sha256 = config.get("weights_sha256")
    tensors, metadata = read_entry(folder / WEIGHTS_NAME, sha256 if isinstance(sha256, str) else "none")
    if config.get("metadata") != metadata:
        raise EntryError(
            f"{path} says something else of the patch than {WEIGHTS_NAME} itself: one of them was changed by hand. "
            "Take the folder from where it came from."
        )
    return tensors, metadata
