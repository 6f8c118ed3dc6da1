"""What a patch file or a snapshot says of itself, read without its tensors, without torch and without unpickling.

`.pt` files are archives; the header is the first text in their `data.pkl` after the key "header", which is found by
walking the pickle's operations, of which none is carried out. The text is held against no hash: whoever needs it to be
true compares the file's sha256 first.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

from revpatch.durable import sha256_of_file
from revpatch.ledger.entry import EntryError, checked_header, safetensors_header


def read_metadata(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """The metadata of an entry or a snapshot; `sha256` is compared with the file's before it is looked into.

    Raises EntryError for a file that is missing, foreign, damaged, or not the one of that sha256.
    """
    try:
        if sha256 is not None and (found := sha256_of_file(path)) != sha256:
            raise EntryError(
                f"{path} is not the file that was recorded: expected sha256 {sha256}, found {found}. It was damaged or "
                "replaced, and has not been opened. Take it from a backup, or go back to another entry."
            )
        text = _safetensors_text(path) if path.suffix == ".safetensors" else _pt_text(path)
    except OSError as error:
        raise EntryError(f"{path} can't be read: {error.strerror}. Check the path and its permissions.") from error
    return checked_header(path, text)[0]


def _pt_text(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1 or archive.getinfo(names[0]).compress_type != zipfile.ZIP_STORED:
                return None
            key = None
            for _, argument, _ in pickletools.genops(archive.read(names[0])):
                if isinstance(argument, str):
                    if key == "header":
                        return argument
                    key = argument
    except (zipfile.BadZipFile, ValueError, RuntimeError, NotImplementedError) as error:
        raise EntryError(f"{path} is truncated or damaged ({error}). Take it from a backup.") from error
    return None


def _safetensors_text(path: Path) -> Any:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise EntryError(f"{path} is truncated or damaged, or no safetensors file. Take it from a backup.")
        return safetensors_header(path, file.read(length))
