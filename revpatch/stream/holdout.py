"""Which side of the holdout a document is on: a function of its text alone, and of the fraction.

The same text is always on the same side, whatever else is in the corpus, so the split neither leaks nor moves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def is_held_out(text: str, holdout: float) -> bool:
    """Whether a document is on the probe's side when about the fraction `holdout` of all documents is."""
    return is_held_out_in_parts([text], holdout)


def is_held_out_in_parts(parts: Iterable[str], holdout: float) -> bool:
    """The same of a text that comes in parts."""
    digest = hashlib.blake2b(digest_size=8, person=b"holdout")
    for part in parts:
        digest.update(part.encode("utf-8"))
    return int.from_bytes(digest.digest(), "big") < holdout * 2**64
