"""One patch in one file: its name, its bytes, writing it atomically, and reading it without trusting it.

NNN_PHASE_commit.safetensors holds named tensors and, in the file's own header, {"revpatch": text}, where text is
canonical JSON: {"format", "version", "content_sha256", "metadata"}. The bytes depend on nothing but tensors and
metadata, so the same patch has the same sha256 under every name. Nothing in such a file is code.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revpatch.config import SidecarConfig
from revpatch.durable import canonical_json, sha256_of, sha256_of_file, to_plain, write_atomically

if TYPE_CHECKING:  # torch takes seconds to import: only what packs or unpacks tensors does
    from torch import Tensor

FORMAT = "revpatch-entry"
VERSION = 2
KINDS = ("start", "good", "rollback", "commit", "origin")
"""`origin` is what a restored run begins with; see `restoring`."""
SUFFIX = ".safetensors"
OLD_SUFFIX = ".pt"
OLD_VERSION = "0.1"
"""The last revpatch that wrote patches, snapshots and runs with other files than this one."""
FOLDER_CONFIG = "patch_config.json"
FOLDER_WEIGHTS = "patch_model.safetensors"

DTYPES_OF_A_BASE = ("bfloat16", "float32", "float16", "float64")

_KINDS_WITH_STEP = ("good", "rollback")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_NAME = 128
_HEADER_KEY = "revpatch"
_DTYPES = {
    *("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"),
    *("torch.int64", "torch.int32", "torch.int16", "torch.int8", "torch.uint8", "torch.bool"),
}


class EntryError(ValueError):
    """A patch file that can't be written or must not be believed; the message names the file and what to do."""


def parse_base(name: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the base (with model, sha256 and dtype at least) that a patch's metadata names.

    Raises EntryError, which begins with `name`, if it names none, or says something of it that can't be so.
    """
    try:
        base = dict(metadata["base"])
        base = {key: base[key] for key in ("model", "sha256", "dtype")} | base
    except (KeyError, TypeError, ValueError) as error:
        raise _no_patch(name, error) from error
    for key in ("model", "revision", "sha256", "dtype"):
        if (value := base.get(key)) is not None and not isinstance(value, str):
            raise EntryError(f"{name}: expected text as base.{key}, found {value!r}: not a patch that revpatch wrote")
    if base["dtype"] not in (None, *DTYPES_OF_A_BASE):
        raise EntryError(
            f"{name}: expected one of {', '.join(DTYPES_OF_A_BASE)} as base.dtype, found {base['dtype']!r}: not a "
            "patch that revpatch wrote"
        )
    return base


def parse_sidecar(name: str, metadata: dict[str, Any]) -> SidecarConfig:
    """Return the config of the sidecars that a patch's metadata names. Raises EntryError, which begins with `name`."""
    try:
        return SidecarConfig.model_validate(metadata["sidecar"])
    except (KeyError, TypeError, ValueError) as error:
        raise _no_patch(name, error) from error


def check_name(name: str, what: str = "name") -> str:
    """Returns `name` if it can be part of a file's name and can't leave a folder; else raises EntryError."""
    if _NAME.fullmatch(name) and ".." not in name and len(name) <= _LONGEST_NAME:
        return name
    raise EntryError(
        f"{what} {name!r} can't be used: it must start with a letter or digit, have only letters, digits, '.', '_' "
        f"and '-', no '..', and at most {_LONGEST_NAME} characters"
    )


def entry_name(phase_index: int, phase: str, kind: str, step: int | None = None) -> str:
    """Return the file name of an entry, as `000_wikitext_commit.safetensors` or
    `000_wikitext_good_step000000500.safetensors`.

    `good` and `rollback` need a `step` (optimizer steps, not negative); the others take none. Raises EntryError for a
    kind, phase name, index or step that doesn't fit.
    """
    if kind not in KINDS:
        raise EntryError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if phase_index < 0 or (step is not None and step < 0):
        raise EntryError(f"phase index {phase_index} and step {step} must not be negative")
    if (step is not None) != (kind in _KINDS_WITH_STEP):
        raise EntryError(f"an entry of kind {kind!r} {'needs a' if step is None else 'has no'} step (got {step})")
    counter = "" if step is None else f"_step{step:09d}"
    return check_name(f"{phase_index:03d}_{check_name(phase, 'phase name')}_{kind}{counter}{SUFFIX}", "entry name")


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and values, in the order of the names: equal on every rank and in any format.

    Tensors may be of any shape and on any device; raises EntryError for what an entry can't hold.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in _prepared(tensors).items():
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def serialise(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    """Return the bytes of a file; the same tensors and metadata always give the same.

    Tensors: dense, of any shape, real or integer or bool, on any device (copied to the CPU). Metadata: plain JSON
    values; tuples come back as lists, and a NaN as the string "NaN" (see `durable.py`). Put nothing in it that differs
    between two runs of the same seed, such as the time. Raises EntryError.
    """
    import safetensors.torch

    prepared = _prepared(tensors)
    try:
        plain = to_plain(metadata, where="metadata")
    except ValueError as error:
        raise EntryError(str(error)) from error
    content = _content_sha256(prepared, plain)
    text = canonical_json({"format": FORMAT, "version": VERSION, "content_sha256": content, "metadata": plain})
    # One key only: the library writes several in an order that changes from run to run.
    return safetensors.torch.save(prepared, metadata={_HEADER_KEY: text})


def write_entry(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Write a file atomically and return its sha256.

    If the same content is there already, nothing is written. Raises EntryError when other content is, or the tensors,
    metadata or name can't be written, OSError when the disk fails; the file that was there is then untouched.
    """
    check_name(path.name, "entry name")
    if path.suffix != SUFFIX:
        raise EntryError(f"{path}: a patch is a {SUFFIX} file: give the name that ending")
    data = serialise(tensors, metadata)
    sha256 = sha256_of(data)
    if path.exists():
        found = sha256_of_file(path)
        if found != sha256:
            raise EntryError(
                f"{path} exists with other content: sha256 {found}, to be written {sha256}. Entries are never "
                "overwritten: train into another output_dir, or move the file away if it is not needed."
            )
        return sha256
    write_atomically(path, data)
    return sha256


def write_torch(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write {"tensors", "metadata"} as torch.save does, for programs that read nothing else. Nothing here reads it
    again. Raises OSError."""
    import torch

    buffer = io.BytesIO()
    torch.save({"tensors": _prepared(tensors), "metadata": to_plain(metadata)}, buffer)
    write_atomically(path, buffer.getvalue())


def write_folder(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a patch into `folder`, which is made if it is not there, as people know it from PEFT.

    `patch_model.safetensors` is the patch; `patch_config.json` shows people its metadata and is never read.

    Raises:
        EntryError: another patch lies there, or the tensors or the metadata can't be written.
        OSError: the disk fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = write_entry(folder / FOLDER_WEIGHTS, tensors, metadata)
    text = json.dumps({"weights_sha256": sha256, "metadata": to_plain(metadata)}, indent=2, ensure_ascii=False)
    write_atomically(folder / FOLDER_CONFIG, f"{text}\n".encode())


def read_entry(path: Path, sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file: tensors on the CPU, by name, and the metadata.

    `sha256` is what the journal says about the file; it is compared before anything in the file is interpreted.
    Raises EntryError for a missing, foreign or damaged file.
    """
    import safetensors.torch

    data = _read(path)
    if sha256 is not None and (found := sha256_of(data)) != sha256:
        raise _replaced(path, sha256, found)
    header = _header_text(path, data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata, expected = _checked_header(path, header)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, len(data), _reason(error)) from error
    try:
        found = _content_sha256(tensors, metadata)
    except (ValueError, RecursionError) as error:
        raise _foreign(path, str(error)) from error
    if found != expected:
        raise EntryError(
            f"{path} is damaged: tensors and metadata should hash to {expected}, found {found}. Take it from a backup."
        )
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """Read what a file says of itself, without its tensors and without torch.

    The text is held against no hash: who needs it to be true compares the file's sha256 first. Raises EntryError for a
    file that is missing, foreign or damaged.
    """
    check_kind(path)
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if length > size:
                raise _damaged(path, size)
            return _checked_header(path, _header_text(path, file.read(length)))[0]
    except OSError as error:
        raise _unreadable(path, error) from error


def check_kind(path: Path) -> None:
    """Raise EntryError, with the version that reads it, for a file whose name ends as those of earlier versions."""
    if path.suffix == OLD_SUFFIX:
        raise EntryError(
            f"{path}: expected a {SUFFIX} file, found a {OLD_SUFFIX} file: if revpatch {OLD_VERSION} wrote it, that "
            f"version reads it (pip install revpatch=={OLD_VERSION})"
        )


def _prepared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain, contiguous CPU tensors that own their memory, by name in sorted order."""
    import torch

    prepared = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            raise EntryError(f"tensor {name!r} is a {type(tensor).__name__}: only dense tensors with data can be kept")
        if str(tensor.dtype) not in _DTYPES:
            raise EntryError(f"tensor {name!r} has dtype {tensor.dtype}: one of {sorted(_DTYPES)} is needed")
        prepared[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return prepared


def _content_sha256(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    return sha256_of(f"{tensors_digest(tensors)}\n{canonical_json(metadata)}".encode())


def _read(path: Path) -> bytes:
    check_kind(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _header_text(path: Path, data: bytes) -> Any:
    """Return our text in the JSON with which a safetensors file begins, or None. Raises EntryError."""
    try:
        return json.loads(data).get("__metadata__", {}).get(_HEADER_KEY)
    except (ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, path.stat().st_size) from error


def _checked_header(path: Path, text: Any) -> tuple[dict[str, Any], str]:
    """Return the metadata and `content_sha256` in a header's text. Raises EntryError for a text that is no header."""
    try:
        header = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise _foreign(path, "it has no readable header") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _foreign(path, f"expected a header of format {FORMAT!r}")
    if header.get("version") != VERSION:
        raise EntryError(
            f"{path} has format version {header.get('version')}, and this revpatch reads version {VERSION}: "
            f"{f'install revpatch {OLD_VERSION}' if header.get('version') == 1 else 'install a newer revpatch'}"
        )
    metadata, content_sha256 = header.get("metadata"), header.get("content_sha256")
    if not isinstance(metadata, dict) or not isinstance(content_sha256, str):
        raise _foreign(path, "its header lacks metadata or content_sha256")
    return metadata, content_sha256


def _unreadable(path: Path, error: OSError) -> EntryError:
    return EntryError(f"{path} can't be read: {error.strerror}. Check the path and its permissions.")


def _replaced(path: Path, expected: str, found: str) -> EntryError:
    return EntryError(
        f"{path} is not the file that was recorded: expected sha256 {expected}, found {found} ({path.stat().st_size} "
        "bytes). It was damaged or replaced, and has not been opened. Take it from a backup, or go back to another "
        "entry."
    )


def _damaged(path: Path, size: int, why: str = "its header can't be read") -> EntryError:
    return EntryError(
        f"{path} is truncated or damaged, or no safetensors file ({size} bytes; {why}). Take it from a backup."
    )


def _foreign(path: Path, why: str) -> EntryError:
    return EntryError(f"{path} is not a revpatch entry: {why}. Give a file that revpatch train wrote.")


def _reason(error: Exception) -> str:
    """Return the first line of a library's message, short enough to be part of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _no_patch(name: str, error: Exception) -> EntryError:
    first = str(error).splitlines()[0]
    return EntryError(f"{name}: expected metadata of a base and a sidecar, found none ({first}): not a patch")
