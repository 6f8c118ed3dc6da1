"""One patch file: its name, its bytes, writing it atomically, and reading it without trusting it.

An entry holds named tensors and plain metadata. The bytes depend on nothing but these (and the version of torch that
packs them), so the same patch has the same sha256 under every name:

    .pt            torch.save of {"header": text, "tensors": {name: tensor}}
    .safetensors   the tensors, and {"revpatch": text} in the file's own header

where text is canonical JSON: {"format", "version", "content_sha256", "metadata"}.

Reading goes from what needs no trust to what needs most: sha256 of the bytes, kind of file, unpickling of nothing but
tensors and strings, header, then tensors and metadata against `content_sha256`. No code in a file is ever run.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revpatch.durable import sha256_of, write_atomically
from revpatch.ledger.plain import canonical_json, to_plain

if TYPE_CHECKING:  # torch takes seconds to import: only what packs or unpacks tensors does
    from torch import Tensor

FORMAT = "revpatch-entry"
VERSION = 1
KINDS = ("start", "good", "rollback", "commit", "origin")
"""`origin` is what a restored run begins with; see `restoring`."""
SUFFIXES = (".pt", ".safetensors")

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


def check_name(name: str, what: str = "name") -> str:
    """Returns `name` if it can be part of a file's name and can't leave a folder; else raises EntryError."""
    if _NAME.fullmatch(name) and ".." not in name and len(name) <= _LONGEST_NAME:
        return name
    raise EntryError(
        f"{what} {name!r} can't be used: it must start with a letter or digit, have only letters, digits, '.', '_' "
        f"and '-', no '..', and at most {_LONGEST_NAME} characters"
    )


def entry_name(phase_index: int, phase: str, kind: str, step: int | None = None, suffix: str = ".pt") -> str:
    """The file name of an entry: `000_wikitext_commit.pt`, `000_wikitext_good_step000000500.pt`.

    `good` and `rollback` need a `step` (optimizer steps, not negative); the others take none. Raises
    EntryError for a kind, phase name, index, step or suffix that doesn't fit.
    """
    if kind not in KINDS:
        raise EntryError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if suffix not in SUFFIXES:
        raise EntryError(f"suffix {suffix!r} is none of {', '.join(SUFFIXES)}")
    if phase_index < 0 or (step is not None and step < 0):
        raise EntryError(f"phase index {phase_index} and step {step} must not be negative")
    if (step is not None) != (kind in _KINDS_WITH_STEP):
        raise EntryError(f"an entry of kind {kind!r} {'needs a' if step is None else 'has no'} step (got {step})")
    counter = "" if step is None else f"_step{step:09d}"
    return check_name(f"{phase_index:03d}_{check_name(phase, 'phase name')}_{kind}{counter}{suffix}", "entry name")


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


def serialise(tensors: dict[str, Tensor], metadata: dict[str, Any], suffix: str = ".pt") -> bytes:
    """The bytes of an entry; the same tensors and metadata always give the same.

    Tensors: dense, of any shape, real or integer or bool, on any device (copied to the CPU). Metadata: plain JSON
    values; tuples come back as lists, and a NaN as the string "NaN" (see `plain.py`). Put nothing in it that differs
    between two runs of the same seed, such as the time. Raises EntryError.
    """
    import safetensors.torch
    import torch

    prepared = _prepared(tensors)
    try:
        plain = to_plain(metadata, where="metadata")
    except ValueError as error:
        raise EntryError(str(error)) from error
    content = _content_sha256(prepared, plain)
    text = canonical_json({"format": FORMAT, "version": VERSION, "content_sha256": content, "metadata": plain})
    if suffix == ".safetensors":
        # One key only: the library writes several in an order that changes from run to run.
        return safetensors.torch.save(prepared, metadata={_HEADER_KEY: text})
    buffer = io.BytesIO()
    torch.save({"header": text, "tensors": prepared}, buffer)
    return buffer.getvalue()


def write_entry(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Writes an entry atomically, in the format of `path`'s suffix, and returns the sha256 of the file.

    If the same entry is there already, nothing is written. Raises EntryError when other content is, or the tensors,
    metadata or name can't be written, OSError when the disk fails; the file that was there is then untouched.
    """
    check_name(path.name, "entry name")
    if path.suffix not in SUFFIXES:
        raise EntryError(f"{path}: an entry's name must end in {' or '.join(SUFFIXES)}")
    data = serialise(tensors, metadata, path.suffix)
    sha256 = sha256_of(data)
    if path.exists():
        found = sha256_of(path.read_bytes())
        if found != sha256:
            raise EntryError(
                f"{path} exists with other content: sha256 {found}, to be written {sha256}. Entries are never "
                "overwritten: train into another output_dir, or move the file away if it is not needed."
            )
        return sha256
    write_atomically(path, data)
    return sha256


def read_entry(path: Path, sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads an entry: tensors on the CPU, by name, and the metadata.

    `sha256` is what the journal says about the file; it is compared before anything in the file is interpreted.
    Raises EntryError for a missing, foreign, damaged or unsafe file; no code in it is executed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EntryError(f"{path} can't be read: {error.strerror}. Check the path and its permissions.") from error
    if sha256 is not None and (found := sha256_of(data)) != sha256:
        raise EntryError(
            f"{path} is not the file that was recorded: expected sha256 {sha256}, found {found} ({len(data)} bytes). "
            "It was damaged or replaced, and has not been opened. Take it from a backup, or go back to another entry."
        )
    header, tensors = _unpack_safetensors(path, data) if path.suffix == ".safetensors" else _unpack_pt(path, data)
    metadata, expected = checked_header(path, header)
    try:
        found = _content_sha256(tensors, metadata)
    except (ValueError, RecursionError) as error:
        raise _foreign(path, str(error)) from error
    if found != expected:
        raise EntryError(
            f"{path} is damaged: tensors and metadata should hash to {expected}, found {found}. Take it from a backup."
        )
    return tensors, metadata


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
        # torch.save writes the whole storage of a view. And pickle spells a string it has met before (the same object)
        # otherwise than an equal one: interned, equal is the same.
        prepared[sys.intern(name)] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return prepared


def _content_sha256(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    return sha256_of(f"{tensors_digest(tensors)}\n{canonical_json(metadata)}".encode())


def _unpack_pt(path: Path, data: bytes) -> tuple[Any, dict[str, Tensor]]:
    import torch

    if not data.startswith(b"PK\x03\x04"):
        raise EntryError(
            f"{path} is not a revpatch entry: expected an archive written by torch.save (starting with 'PK'), found "
            f"{data[:8]!r}. Nothing in it was run. If it was a patch once, it is damaged: take it from a backup."
        )
    try:
        payload = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EntryError(
            f"{path} is refused: expected tensors and strings alone, found something that would run code when loaded "
            f"({_reason(error)}). Nothing was executed. Don't load it with anything else; ask where it came from."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if _is_torchscript(data):
            raise EntryError(
                f"{path} is refused: expected tensors and texts, found a TorchScript archive, which is a program. "
                "Nothing in it was run. Give a file that revpatch wrote."
            ) from error
        raise EntryError(
            f"{path} is truncated or damaged ({len(data)} bytes; {_reason(error)}). Take it from a backup, or go back "
            "to another entry."
        ) from error
    if not isinstance(payload, dict) or payload.keys() != {"header", "tensors"}:
        found = sorted(map(str, payload))[:5] if isinstance(payload, dict) else type(payload).__name__
        raise _foreign(path, f"expected 'header' and 'tensors' in it, found {found}")
    tensors = payload["tensors"]
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise _foreign(path, "its tensors are not a table by name")
    return payload["header"], tensors


def _is_torchscript(data: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, RuntimeError):
        return False


def _unpack_safetensors(path: Path, data: bytes) -> tuple[Any, dict[str, Tensor]]:
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise EntryError(
            f"{path} is truncated or damaged, or no safetensors file ({len(data)} bytes; {_reason(error)}). Take it "
            "from a backup."
        ) from error
    # The library has checked the header (8 bytes of length, then JSON), but hands out tensors alone.
    return safetensors_header(path, data[8 : 8 + int.from_bytes(data[:8], "little")]), tensors


def safetensors_header(path: Path, data: bytes) -> Any:
    """Our header's text in the JSON with which a safetensors file begins, or None. Raises EntryError."""
    try:
        text = json.loads(data)
        return text.get("__metadata__", {}).get(_HEADER_KEY)
    except (ValueError, AttributeError, RecursionError) as error:
        raise EntryError(f"{path} is truncated or damaged, or no safetensors file. Take it from a backup.") from error


def checked_header(path: Path, text: Any) -> tuple[dict[str, Any], str]:
    """The metadata and `content_sha256` in a header's text. Raises EntryError for a text that is no header."""
    try:
        header = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise _foreign(path, "it has no readable header") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _foreign(path, f"expected a header of format {FORMAT!r}")
    if header.get("version") != VERSION:
        raise EntryError(
            f"{path} has format version {header.get('version')}, and this revpatch reads version {VERSION}. "
            "Install the revpatch that wrote it, or a newer one."
        )
    metadata, content_sha256 = header.get("metadata"), header.get("content_sha256")
    if not isinstance(metadata, dict) or not isinstance(content_sha256, str):
        raise _foreign(path, "its header lacks metadata or content_sha256")
    return metadata, content_sha256


def _foreign(path: Path, why: str) -> EntryError:
    return EntryError(f"{path} is not a revpatch entry: {why}. Give a file that revpatch train wrote.")


def _reason(error: Exception) -> str:
    """The first line of a library's message, short enough to be part of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
