"""Characters that a tokenizer can't spell: they vanish, or become its unknown token.

A byte-level BPE and one that falls back to bytes spell everything, so nothing is counted there. Whitespace and control
characters are never counted: many tokenizers drop some of them on purpose.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

_MARKS = "▁Ġ "
"""What normalizers and pre-tokenizers put before a word."""


class Spelling:
    """Counts what one tokenizer loses of a text.

    Args:
        backend: without truncation; its post-processor is not used.

    `can_lose` says whether there is anything to count at all.
    """

    def __init__(self, backend: Tokenizer) -> None:
        state = json.loads(backend.to_str())
        self._backend = backend
        self._model: dict[str, Any] = state["model"]
        self._vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=False)
        self.unknown = _unknown_of(self._model, self._vocabulary)
        """The id and the text of the unknown token, or None."""
        normalizers, pre_tokenizers = list(_parts(state["normalizer"])), list(_parts(state["pre_tokenizer"]))
        kinds = {part["type"] for part in (*normalizers, *pre_tokenizers)}
        in_bytes = "ByteLevel" in kinds and self._vocabulary.keys() >= set(ByteLevel.alphabet())
        self._falls_back = bool(self._model.get("byte_fallback"))
        complete = in_bytes or (self._falls_back and all(_byte(value) in self._vocabulary for value in range(256)))
        self._removes = any(map(_may_remove, (*normalizers, *pre_tokenizers)))
        self._vanishes = not complete and self._model["type"] == "BPE" and self.unknown is None
        self._has_unknown = not complete and self.unknown is not None
        self.can_lose = self._removes or self._vanishes or self._has_unknown
        self._lost: dict[str, bool] = {}

    def lost(self, text: str, ids: list[int]) -> int:
        """Return how many characters of `text` are in none of its `ids`, or in unknown ones."""
        count = 0
        if self._has_unknown and self.unknown is not None and self.unknown[0] in ids:
            count += self._in_unknown_tokens(text, *self.unknown)
        if self._removes or self._vanishes:
            count += sum(text.count(character) for character in set(text) if self._is_lost(character))
        return count

    def _in_unknown_tokens(self, text: str, unknown: int, spelled: str) -> int:
        encoding = self._backend.encode(text, add_special_tokens=False)
        spans = (
            text[slice(*offsets)] for id_, offsets in zip(encoding.ids, encoding.offsets, strict=True) if id_ == unknown
        )
        return sum(sum(_counts(character) for character in span) for span in spans if span != spelled)

    def _is_lost(self, character: str) -> bool:
        if character not in self._lost:
            self._lost[character] = _counts(character) and character not in _MARKS and not self._keeps(character)
        return self._lost[character]

    def _keeps(self, character: str) -> bool:
        normalizer, pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        text = character if normalizer is None else normalizer.normalize_str(character)
        if pre_tokenizer is not None:
            text = "".join(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
        left = text.strip(_MARKS)
        return bool(left) and not (self._vanishes and any(not self._knows(symbol) for symbol in left))

    def _knows(self, symbol: str) -> bool:
        """Return whether the model has a token for a symbol wherever in a word it stands."""
        before, after = self._model.get("continuing_subword_prefix") or "", self._model.get("end_of_word_suffix") or ""
        if all(f"{start}{symbol}{end}" in self._vocabulary for start in {"", before} for end in {"", after}):
            return True
        return self._falls_back and all(_byte(value) in self._vocabulary for value in symbol.encode())


def _counts(character: str) -> bool:
    return not character.isspace() and unicodedata.category(character) != "Cc"


def _byte(value: int) -> str:
    return f"<0x{value:02X}>"


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    inner = part.get("normalizers") or part.get("pretokenizers")
    if part["type"] != "Sequence":
        yield part
    for each in inner or ():
        yield from _parts(each)


def _may_remove(part: dict[str, Any]) -> bool:
    """Return whether a normalizer or a pre-tokenizer may take characters away that are no whitespace."""
    kind = part["type"]
    if kind == "Replace":
        return not part["content"]
    if kind in ("StripAccents", "BertNormalizer", "Nmt", "Precompiled", "CharDelimiterSplit"):
        return True
    return part.get("behavior") == "Removed"


def _unknown_of(model: dict[str, Any], vocabulary: dict[str, int]) -> tuple[int, str] | None:
    if model["type"] == "Unigram":
        unknown = model.get("unk_id")
        return None if unknown is None else (int(unknown), str(model["vocab"][unknown][0]))
    token = model.get("unk_token")
    return None if token is None or token not in vocabulary else (vocabulary[token], str(token))
