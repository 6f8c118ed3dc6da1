"""A folder of token shards on disk: its manifest, and webdataset tars whose members all have one size.

A member is one block of tokens, named by its number in the whole set, so block i of a shard lies at i × stride:

    | header, 512 bytes | block_size tokens, little endian | zeros up to a multiple of 512 |  × blocks  | tar's end |

Time, user, group and mode are fixed: the same blocks give the same bytes, as webdataset's TarWriter writes them.
`manifest.json` (counts, sizes, hashes, tokenizer) is written last, so a folder that has one is whole. It is read
strictly: an unknown key, a wrong type or sums that do not add up are refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from revpatch.durable import canonical_json, sync_directory, write_atomically

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
_COUNTED = ("bad_documents", "bad", "highest_id", "characters", "lost_characters", "special_tokens")

Int64s = np.ndarray[Any, np.dtype[np.int64]]
Count = Annotated[int, Field(ge=0)]
_NO_OTHER_KEYS = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Shard:
    """One tar: its file name in the folder, how many blocks it holds, its size and its sha256 (hex)."""

    __pydantic_config__: ClassVar[ConfigDict] = _NO_OTHER_KEYS
    name: str
    blocks: Count
    bytes: Count
    sha256: str


@dataclass(frozen=True)
class TokenizerInfo:
    """What must agree between the shards and the model that trains on them."""

    __pydantic_config__: ClassVar[ConfigDict] = _NO_OTHER_KEYS
    name: str
    fingerprint: str
    vocab_size: Count
    eos_token_id: Count
    bos_token_ids: tuple[Count, ...] = ()
    """What a document begins with: what the tokenizer's template puts before a text, most often one BOS; see
    `stream.tokenizer`."""


@dataclass(frozen=True)
class Manifest:
    """A set of shards.

    `tokens` counts what the documents gave, their end-of-text tokens included; `dropped_tokens` of them did not
    fill a last block. `split` is 'all', 'train' or 'probe' (the two sides of `holdout`), or 'replay'.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _NO_OTHER_KEYS
    version: Count
    split: str
    block_size: Count
    dtype: str
    documents: Count
    empty_documents: Count
    tokens: Count
    dropped_tokens: Count
    blocks: Count
    shards: tuple[Shard, ...]
    tokenizer: TokenizerInfo
    sources: tuple[str, ...]
    text_column: str | None
    holdout: float
    max_tokens: Count | None
    licence: str | None
    note: str | None
    holdout_rule: str = "hash"
    """How the sides were chosen: by a 'hash' of each text, or as the 'tail' of the only document."""
    bad_documents: Count = 0
    """Documents that could not be read and were left out, of both sides together."""
    bad: tuple[str, ...] = ()
    """The first of them, each with the reason."""
    highest_id: Count | None = None
    """The highest id in any block, where the vocabulary ends with added tokens that no block holds."""
    characters: Count = 0
    """Of the text, where the tokenizer can't spell every character; 0 where it can."""
    lost_characters: Count = 0
    """Of these, those that vanished or became the unknown token."""
    special_tokens: Count = 0
    """Special tokens that the text itself spelled."""

    @property
    def last_id(self) -> int:
        """No block holds an id above this one."""
        return self.tokenizer.vocab_size - 1 if self.highest_id is None else self.highest_id

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON: two sets of one digest hold the same blocks in the same order.

        What was counted is left out: sets that were built before it was counted have the same digest.
        """
        facts = {key: value for key, value in plain(self).items() if key not in _COUNTED}
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's tokens, without header and padding."""
        return self.block_size * {"uint16": 2, "uint32": 4}[self.dtype]

    @cached_property
    def shard_ends(self) -> Int64s:
        """The number after that of each shard's last block, (shards,)."""
        return np.cumsum([shard.blocks for shard in self.shards], dtype=np.int64)

    def shards_of(self, block_ids: Int64s) -> Int64s:
        """Return the index of the shard that each block of the set lies in, (n,) -> (n,)."""
        return np.searchsorted(self.shard_ends, block_ids, side="right").astype(np.int64)

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """Read `directory/manifest.json`.

        Raises FileNotFoundError when there is none and ValueError when it is not a sound manifest.
        """
        path = Path(directory) / MANIFEST_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: there is no manifest, so {directory} is not a whole set of shards; "
                "build it with `revpatch shards build`, or check the path"
            )
        return cls.from_json(path.read_bytes(), str(path))

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Parse a manifest; `where` is the path or URL that error messages name."""
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error}); copy or build the shards again") from None
        # Looked at first: a newer version may well have other keys, and the person should be told of the version.
        if isinstance(value, dict) and value.get("version") != MANIFEST_VERSION:
            _fail(where, "version", MANIFEST_VERSION, value.get("version"))
        manifest = _parsed(text, where)
        manifest._check(where)
        return manifest

    def write(self, directory: str | Path) -> None:
        """Write `directory/manifest.json` atomically: there is either the old one or all of the new one."""
        text = json.dumps(plain(self), indent=2, ensure_ascii=False) + "\n"
        write_atomically(Path(directory) / MANIFEST_NAME, text.encode())

    def _check(self, where: str) -> None:
        if self.dtype not in ("uint16", "uint32"):
            _fail(where, "dtype", "'uint16' or 'uint32'", self.dtype)
        if self.block_size < 1:
            _fail(where, "block_size", "at least 1", self.block_size)
        if self.blocks < 1:
            _fail(where, "blocks", "at least 1", self.blocks)
        if sum(shard.blocks for shard in self.shards) != self.blocks:
            _fail(where, "blocks", f"{sum(shard.blocks for shard in self.shards)} (the shards' sum)", self.blocks)
        if self.blocks * self.block_size + self.dropped_tokens != self.tokens:
            expected = self.blocks * self.block_size + self.dropped_tokens
            _fail(where, "tokens", f"{expected} (blocks × block_size + dropped_tokens)", self.tokens)
        if self.holdout_rule not in ("hash", "tail"):
            _fail(where, "holdout_rule", "'hash' or 'tail'", self.holdout_rule)
        if self.highest_id is not None and self.highest_id >= self.tokenizer.vocab_size:
            _fail(where, "highest_id", f"less than {self.tokenizer.vocab_size} (vocab_size)", self.highest_id)
        if self.lost_characters > self.characters:
            _fail(where, "lost_characters", f"at most {self.characters} (characters)", self.lost_characters)
        if len({shard.name for shard in self.shards}) != len(self.shards):
            _fail(where, "shards", "names that differ", [shard.name for shard in self.shards])
        for i, shard in enumerate(self.shards):
            if not re.fullmatch(r"[\w][\w.\-]*", shard.name):
                _fail(where, f"shards[{i}].name", "a plain file name, so that it can't leave the folder", shard.name)
            if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
                _fail(where, f"shards[{i}].sha256", "64 hexadecimal digits", shard.sha256)
            if shard.blocks < 1:
                _fail(where, f"shards[{i}].blocks", "at least 1", shard.blocks)


def plain(record: Any) -> dict[str, Any]:
    """Return the fields of a manifest or of a part of it as JSON.

    Those that a later version of revpatch added have defaults, and are left out where they hold them: manifests written
    before keep their digests.
    """
    found = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if item.default is MISSING or value != item.default:
            found[item.name] = plain(value) if isinstance(value, TokenizerInfo) else value
            if isinstance(value, tuple):
                found[item.name] = [asdict(each) if isinstance(each, Shard) else each for each in value]
    return found


def _fail(where: str, key: str, expected: Any, found: Any) -> NoReturn:
    raise ValueError(
        f"{where}: {key}: expected {expected}, found {found!r}; "
        "if nobody has edited the file, copy or build the shards again"
    )


_WORDS = {
    "missing": "a value",
    "unexpected_keyword_argument": "no such key",
    "greater_than_equal": "a whole number, 0 or more",
    "int_type": "a whole number, 0 or more",
    "float_type": "a number",
    "string_type": "text",
    "tuple_type": "a list",
    "dataclass_type": "an object",
}
"""What is expected, by the kind of pydantic's error."""


def _parsed(text: str | bytes, where: str) -> Manifest:
    try:
        return TypeAdapter(Manifest).validate_json(text, strict=True)
    except ValidationError as refused:
        first = refused.errors()[0]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        found = "nothing" if first["type"] == "missing" else first["input"]
        _fail(where, key or "the whole file", _WORDS.get(first["type"], first["msg"]), found)


_log = logging.getLogger(__name__)

HEADER_BYTES = 512
DEFAULT_SHARD_BYTES = 64 * 2**20
_SUFFIX = "bin"
_KEY_DIGITS = 12
_COPY_BYTES = 2**20


@dataclass(frozen=True)
class ShardFault:
    """A shard that can't be read, or is not what its manifest says: what ranks tell one another, the quarantine keeps
    and the journal writes."""

    digest: str
    """Of the manifest of its set."""
    shard: int
    """Its index in that manifest."""
    location: str
    """Full path or URL."""
    reason: str
    since: int | None = None
    """Step of the run from which on it is read around; None until it is taken out."""

    def as_fields(self) -> dict[str, Any]:
        """Return what the journal and a snapshot keep of it."""
        return {key: getattr(self, key) for key in ("digest", "shard", "since", "location", "reason")}


class ShardError(ValueError):
    """A shard can't be read, or has another size or sha256 than its manifest says; `fault` is None where no one shard
    is to blame."""

    def __init__(self, message: str, fault: ShardFault | None = None) -> None:
        super().__init__(message)
        self.fault = fault


def stride_of(block_bytes: int) -> int:
    """Return bytes from one member's header to the next one's."""
    return HEADER_BYTES + -(-block_bytes // 512) * 512


def blocks_in(shard_bytes: int, block_bytes: int) -> int:
    """Return how many blocks fit a shard of about this size; at least one."""
    return max(1, shard_bytes // stride_of(block_bytes))


class ShardWriter:
    """Writes blocks one after another into `directory/shard-000000.tar`, `shard-000001.tar`, ...

    `tokens` given to `write` is a (n, block_size) array; it is stored as `dtype` ('uint16' or 'uint32').
    """

    def __init__(self, directory: Path, dtype: str, blocks_per_shard: int, prefix: str = "shard") -> None:
        if blocks_per_shard < 1:
            raise ValueError(f"blocks_per_shard is {blocks_per_shard}; it must be at least 1")
        self.directory = directory
        self.blocks = 0
        self.shards: list[Shard] = []
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._blocks_per_shard = blocks_per_shard
        self._prefix = prefix
        self._open: _OpenShard | None = None

    @property
    def open_blocks(self) -> int:
        """Return how many blocks of `blocks` are in the shard that is not finished."""
        return self._open.blocks if self._open is not None else 0

    def write(self, tokens: np.ndarray[Any, Any]) -> None:
        """Append blocks, opening a new shard whenever the last one is full."""
        while len(tokens):
            if self._open is None:
                self._open = _OpenShard(self._next_path())
            now = tokens[: self._blocks_per_shard - self._open.blocks]
            self._open.write(now.astype(self._dtype), self.blocks)
            self.blocks += len(now)
            tokens = tokens[len(now) :]
            if self._open.blocks == self._blocks_per_shard:
                self._finish_shard()

    def sync(self) -> None:
        """Bring what was written to the disk, so that it is there after a loss of power."""
        if self._open is not None:
            os.fsync(self._open.file.fileno())

    def resume(self, shards: list[Shard], open_blocks: int, block_bytes: int) -> None:
        """Go on after these finished shards and so many blocks of the next one, whatever else its file holds.

        Raises ShardError when a file is missing or shorter than that.
        """
        for shard in shards:
            _check_length(self.directory / shard.name, shard.bytes, exact=True)
        self.shards = list(shards)
        self.blocks = sum(shard.blocks for shard in shards) + open_blocks
        if open_blocks:
            self._open = _OpenShard(self._next_path(), open_blocks, stride_of(block_bytes))

    def close(self) -> tuple[Shard, ...]:
        """Finish the last shard and return all of them, in order."""
        if self._open is not None:
            self._finish_shard()
        return tuple(self.shards)

    def abandon(self) -> None:
        """Close the open file, if any, without caring for what is in it."""
        if self._open is not None:
            self._open.file.close()
            self._open = None

    def _next_path(self) -> Path:
        return self.directory / f"{self._prefix}-{len(self.shards):06d}.tar"

    def _finish_shard(self) -> None:
        assert self._open is not None
        self.shards.append(self._open.finish())
        self._open = None


def members(blocks: np.ndarray[Any, Any], first_id: int) -> memoryview:
    """Return the tar members of (n, block_size) blocks, numbered from `first_id`, without a tar's end."""
    from webdataset.writer import TarWriter  # imports torch, which takes seconds

    tar = io.BytesIO()
    with TarWriter(tar, user="revpatch", group="revpatch", mode=0o644, mtime=0, encoder=False) as writer:
        for number, block in enumerate(blocks, first_id):
            writer.write({"__key__": f"{number:0{_KEY_DIGITS}d}", _SUFFIX: block.tobytes()})
    return tar.getbuffer()[: len(blocks) * stride_of(blocks.shape[1] * blocks.itemsize)]


class _OpenShard:
    """The tar that is being written, hashed on its way to the disk."""

    def __init__(self, path: Path, blocks: int = 0, stride: int = 0) -> None:
        """Goes on after so many blocks of the file, if any."""
        self.path = path
        self.blocks = blocks
        self.bytes = blocks * stride
        self.sha256 = hashlib.sha256()
        if blocks:
            _check_length(path, self.bytes, exact=False)
            with path.open("rb") as file:
                while data := file.read(min(_COPY_BYTES, self.bytes - file.tell())):
                    self.sha256.update(data)
        self.file = path.open("r+b" if blocks else "wb", buffering=0)
        self.file.truncate(self.bytes)
        self.file.seek(self.bytes)

    def write(self, blocks: np.ndarray[Any, Any], first_id: int) -> None:
        """Append (n, block_size) blocks, numbered from `first_id`."""
        self._append(members(blocks, first_id))
        self.blocks += len(blocks)

    def finish(self) -> Shard:
        """End the tar."""
        end = 2 * 512  # of zeros, and more of them up to a whole record
        self._append(memoryview(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE)))
        os.fsync(self.file.fileno())
        self.file.close()
        return Shard(self.path.name, self.blocks, self.bytes, self.sha256.hexdigest())

    def _append(self, data: memoryview) -> None:
        self.sha256.update(data)
        self.bytes += len(data)
        while data:  # a disk that is nearly full takes a part
            data = data[self.file.write(data) :]


def _check_length(path: Path, length: int, *, exact: bool) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found is None or found < length or (exact and found != length):
        raise ShardError(
            f"{path}: expected {'' if exact else 'at least '}{length} bytes, found {found if found else 'nothing'}; "
            f"the unfinished build is damaged: delete {path.parent.parent} and build anew"
        )


def refuse_foreign(folder: Path) -> None:
    """Raise FileExistsError when `folder` holds anything but a set of shards, before any work is done for it."""
    if folder.is_dir() and (not any(folder.iterdir()) or (folder / MANIFEST_NAME).is_file()):
        return
    if folder.exists():
        raise FileExistsError(
            f"{folder}: expected a new or empty folder, found {'files that are no set of shards' * folder.is_dir()}"
            f"{'a file' * (not folder.is_dir())}; choose another folder, or remove it first"
        )


def temporary_folder(folder: Path) -> Path:
    """Return a new, empty folder beside `folder`, on the same disk, so that it can take its name by a rename."""
    temporary = folder.with_name(f".{folder.name}.building-{os.getpid()}-{os.urandom(4).hex()}")
    temporary.mkdir(parents=True)
    return temporary


def check_installable(folder: Path, manifest: Manifest) -> None:
    """Raise FileExistsError when `folder` holds another set than the one that is to be installed."""
    refuse_foreign(folder)
    if not (folder / MANIFEST_NAME).is_file():
        return
    found = Manifest.read(folder)
    if found.digest != manifest.digest:
        differing = [key.name for key in fields(manifest) if getattr(manifest, key.name) != getattr(found, key.name)]
        raise FileExistsError(
            f"{folder}: holds another set of shards (it differs in {', '.join(differing)}); "
            "choose another folder, or remove this one first"
        )


def install_folder(temporary: Path, folder: Path, manifest: Manifest) -> None:
    """Give a whole set its name. A set that has it already stays, and must be the same one (FileExistsError)."""
    sync_directory(temporary)
    try:
        temporary.rename(folder)  # succeeds over an empty folder, fails over one that holds something
    except OSError:
        check_installable(folder, manifest)
        if not folder.is_dir():
            raise
        _log.info("%s: this very set of shards is there already; left as it is", folder)
        return
    sync_directory(folder.parent)
