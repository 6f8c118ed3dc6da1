"""A patch brought back into a ledger: an entry's file, or a folder of export or save_pretrained. No code is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from revpatch.durable import sha256_of
from revpatch.ledger.history import PatchFile
from revpatch.ledger.patch_file import FOLDER_WEIGHTS, SUFFIX, EntryError, check_name, entry_name, tensors_digest
from revpatch.ledger.plain import canonical_json
from revpatch.ledger.references import read_patch
from revpatch.surgery.arithmetic import check_finite
from revpatch.surgery.modeling import PREFIX
from revpatch.surgery.new_entry import Made, claimed, write
from revpatch.surgery.subject import check_one_kind, of_base

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def import_patch(source: Path, run: Path) -> Made:
    """Records the patch as the newest commit of a run, under its phase's name.

    Args:
        source: a patch file, or a folder that `export` or `save_pretrained` wrote.
        run: a run, or a folder that is not there yet, which gets a ledger.

    Raises:
        ValueError, OSError: it is damaged, no patch, or not finite; or of another base or shape than the run's.
    """
    entry = _read_folder(source) if source.is_dir() else of_base(read_patch(str(source)))
    phase = str(entry.metadata.get("phase", "imported"))
    try:
        entry_name(0, phase, "commit")  # before a folder is made
    except EntryError as error:
        raise EntryError(f"{source}: {error}") from error
    made_by: dict[str, Any] = {
        "operation": "import",
        "sha256": entry.sha256,
        "parent": entry.metadata.get("parent"),
        "made_by": entry.metadata.get("made_by"),
    }
    check_finite(entry.tensors, str(source))
    with claimed(run, create=True) as ledger:
        if (newest := ledger.newest()) is not None:
            there = of_base(ledger.read(newest.name))
            check_one_kind(there, entry)
            # The same base, by the name under which this run finds it.
            said = {**entry.metadata, "base": there.base}
            entry = replace(entry, metadata=said, ledger=there.ledger, event=there.event)
        return write(ledger, phase, entry.tensors, entry, made_by, judgement=None)


def _read_folder(folder: Path) -> PatchFile:
    """Of the three kinds that there are: of save_pretrained, of `--to hf`, of `--to safetensors`."""
    if (folder / FOLDER_WEIGHTS).is_file():
        return of_base(read_patch(folder))
    if (folder / _CONFIG).is_file():
        return _read_hf(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
    if len(files) != 1:
        raise FileNotFoundError(
            f"{folder}: expected a patch file, or a folder that `revpatch ledger export` or save_pretrained wrote, "
            f"found a folder without {_CONFIG} and {FOLDER_WEIGHTS}, and {len(files)} files ending in {SUFFIX}"
        )
    return of_base(read_patch(str(files[0])))


def _read_hf(folder: Path) -> PatchFile:
    config = folder / _CONFIG
    try:
        said = json.loads(config.read_text(encoding="utf-8"))["revpatch"]
        metadata, sha256, expected = dict(said["entry"]), str(said["sha256"]), str(said["tensors_sha256"])
        guarded = said.get("content_sha256")
        held = sha256_of(canonical_json({key: said[key] for key in said if key != "content_sha256"}).encode())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EntryError(
            f"{config}: expected a table `revpatch` that `revpatch ledger export` wrote, found none"
        ) from error
    if guarded != held:
        raise EntryError(
            f"{config}: its table `revpatch` should hash to {guarded}, found {held}: it was damaged or edited; take "
            "the folder from where it came again"
            if guarded
            else f"{config}: its table `revpatch` has no content_sha256, so nothing vouches for what it says of the "
            "patch: an older revpatch wrote it, or it was edited; export the patch again"
        )
    tensors = _sidecars(folder)
    if (found := tensors_digest(tensors)) != expected:
        raise EntryError(
            f"{folder}: its sidecars should hash to {expected}, found {found}: they were damaged or edited; take the "
            "folder from where it came again"
        )
    return of_base(PatchFile(folder, sha256, metadata, tensors, str(folder)))


def _sidecars(folder: Path) -> dict[str, Tensor]:
    files = [_WEIGHTS]
    if (folder / _INDEX).is_file():
        try:
            places = dict(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EntryError(f"{folder / _INDEX}: expected a table `weight_map`, found none") from error
        names = {str(file) for name, file in places.items() if str(name).startswith(PREFIX)}
        files = sorted(check_name(name, f"{folder / _INDEX}: file") for name in names)
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                ours = [key for key in file.keys() if key.startswith(PREFIX)]  # noqa: SIM118  (it is no dict)
                tensors |= {key.removeprefix(PREFIX): file.get_tensor(key) for key in ours}
        except (SafetensorError, OSError) as error:
            raise EntryError(
                f"{folder / name}: can't be read as safetensors ({error}): take it from where it came again"
            ) from error
    return tensors
