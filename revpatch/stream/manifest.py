"""What a folder of shards holds: counts, sizes, hashes, and the tokenizer that made the tokens.

`manifest.json` is written last, so a folder that has one is whole. It is meant to be read by people and is read
strictly by us: an unknown key, a wrong type or sums that do not add up are refused, with key, expected and found.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from revpatch.durable import write_atomically

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
_COUNTED = ("bad_documents", "bad", "highest_id", "characters", "lost_characters", "special_tokens")

Int64s = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Shard:
    """One tar: its file name in the folder, how many blocks it holds, its size and its sha256 (hex)."""

    name: str
    blocks: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenizerInfo:
    """What must agree between the shards and the model that trains on them."""

    name: str
    fingerprint: str
    vocab_size: int
    eos_token_id: int
    bos_token_ids: tuple[int, ...] = ()
    """What a document begins with: what the tokenizer's template puts before a text, most often one BOS; see
    `stream.tokenizer`."""


@dataclass(frozen=True)
class Manifest:
    """A set of shards.

    `tokens` counts what the documents gave, their end-of-text tokens included; `dropped_tokens` of them did not
    fill a last block. `split` is 'all', 'train' or 'probe' (the two sides of `holdout`), or 'replay'.
    """

    version: int
    split: str
    block_size: int
    dtype: str
    documents: int
    empty_documents: int
    tokens: int
    dropped_tokens: int
    blocks: int
    shards: tuple[Shard, ...]
    tokenizer: TokenizerInfo
    sources: tuple[str, ...]
    text_column: str | None
    holdout: float
    max_tokens: int | None
    licence: str | None
    note: str | None
    holdout_rule: str = "hash"
    """How the sides were chosen: by a 'hash' of each text, or as the 'tail' of the only document."""
    bad_documents: int = 0
    """Documents that could not be read and were left out, of both sides together."""
    bad: tuple[str, ...] = ()
    """The first of them, each with the reason."""
    highest_id: int | None = None
    """The highest id in any block, where the vocabulary ends with added tokens that no block holds."""
    characters: int = 0
    """Of the text, where the tokenizer can't spell every character; 0 where it can."""
    lost_characters: int = 0
    """Of these, those that vanished or became the unknown token."""
    special_tokens: int = 0
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
        """The index of the shard that each block of the set lies in, (n,) -> (n,)."""
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
        manifest: Manifest = _parse(cls, value, where, "")
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


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _fail(where: str, key: str, expected: Any, found: Any) -> None:
    raise ValueError(
        f"{where}: {key}: expected {expected}, found {found!r}; "
        "if nobody has edited the file, copy or build the shards again"
    )


def _parse(cls: type, value: Any, where: str, key: str) -> Any:
    """Make a dataclass of this module from parsed JSON; its annotations, which are strings here, are the schema."""
    prefix = f"{key}." if key else ""
    if not isinstance(value, dict):
        _fail(where, key or "the whole file", "an object", value)
    names = [field.name for field in fields(cls)]
    required = [field.name for field in fields(cls) if field.default is MISSING]
    for name in (*(n for n in required if n not in value), *(n for n in value if n not in names)):
        _fail(where, f"{prefix}{name}", "a value" if name in names else "no such key", value.get(name, "nothing"))
    return cls(
        **{
            f.name: _parse_field(str(f.type), value[f.name], where, f"{prefix}{f.name}")
            for f in fields(cls)
            if f.name in value
        }
    )


def _parse_field(kind: str, value: Any, where: str, key: str) -> Any:
    if kind.endswith(" | None"):
        return None if value is None else _parse_field(kind.removesuffix(" | None"), value, where, key)
    if kind == "TokenizerInfo":
        return _parse(TokenizerInfo, value, where, key)
    if kind.startswith("tuple["):
        if not isinstance(value, list):
            _fail(where, key, "a list", value)
        item_kind = kind.removeprefix("tuple[").removesuffix(", ...]")
        if item_kind == "Shard":
            return tuple(_parse(Shard, item, where, f"{key}[{i}]") for i, item in enumerate(value))
        return tuple(_parse_field(item_kind, item, where, f"{key}[{i}]") for i, item in enumerate(value))
    if kind == "int" and not (type(value) is int and value >= 0):
        _fail(where, key, "a whole number, 0 or more", value)
    if kind == "float" and type(value) not in (int, float):
        _fail(where, key, "a number", value)
    if kind == "str" and not isinstance(value, str):
        _fail(where, key, "text", value)
    return float(value) if kind == "float" else value
