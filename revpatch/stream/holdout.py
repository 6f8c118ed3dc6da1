"""Which side of the holdout a document is on: a function of its text alone, and of the fraction.

The same text is always on the same side, whatever else is in the corpus, so the split neither leaks nor moves. The only
document of a corpus can't be on both sides: the end of it is held out instead.
"""

from __future__ import annotations

import hashlib


def is_held_out(text: str, holdout: float) -> bool:
    """Return whether a document is on the probe's side when about the fraction `holdout` of all documents is."""
    return _rank_of(text) < holdout * 2**64


def share_of(text: str) -> float:
    """Return the least fraction, 0 to 1, from which on a document is held out, but for rounding."""
    return _rank_of(text) / 2**64


def place_of_tail(text: str, holdout: float) -> int:
    """Return where the last `holdout` of a text's characters begins: at a line's beginning or a space where one is
    near."""
    place = round(len(text) * (1 - holdout))
    near = place + (len(text) - place) // 2
    line = text.find("\n", place, near)
    if line >= 0:
        return line + 1
    space = text.find(" ", place, near)
    return space if space >= 0 else place


def _rank_of(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"holdout")
    return int.from_bytes(digest.digest(), "big")
