"""What is in sets of shards, and what is in corpora, for tests that compare them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from revpatch.shards.shard_set import ShardSet


def tokens_of(directory: Path) -> list[int]:
    """Return all tokens of a set."""
    with ShardSet(directory) as shards:
        return [int(token) for token in shards.read(np.arange(len(shards))).ravel()]


def texts_of(directory: Path, tokenizer: Any) -> list[str]:
    """Return the texts of a set; the last one may be cut."""
    return str(tokenizer.decode(tokens_of(directory))).split("<|endoftext|>")


def files_of(out: Path) -> dict[str, bytes]:
    """Return the files of a set and of its probe, if there is one."""
    folders = [folder for folder in (out, out.with_name(f"{out.name}_probe")) if folder.exists()]
    return {f"{folder.name[len(out.name) :]}/{p.name}": p.read_bytes() for folder in folders for p in folder.iterdir()}


def lines(*values: object) -> bytes:
    """Return values as lines of JSON."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def tar(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    """Return a tar of these members, names with data or headers without."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            data = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
