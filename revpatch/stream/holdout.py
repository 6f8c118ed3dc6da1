"""Which side of the holdout a document is on: a function of its text alone, and of the fraction.

The same text is always on the same side, whatever else is in the corpus, so the split neither leaks nor moves.
"""

from __future__ import annotations

import hashlib


def is_held_out(text: str, holdout: float) -> bool:
    """Whether a document is on the probe's side when about the fraction `holdout` of all documents is."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"holdout")
    return int.from_bytes(digest.digest(), "big") < holdout * 2**64
