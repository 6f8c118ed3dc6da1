"""Plain values and their one spelling in JSON: what the journal's lines and an entry's metadata are made of.

The same value gives the same text (sorted keys, no spaces, ASCII), so that it can be hashed. JSON has no NaN, and a
diverged run has to be recorded all the same: a float that is not finite becomes one of the strings "NaN", "Infinity",
"-Infinity", which Python's `float()` turns back.
"""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import BaseModel


def to_plain(value: Any, where: str = "value") -> Any:
    """Returns `value` as None, bool, int, float, str, list and dict with str keys; tuples become lists, and a model a
    dict of the fields that it was given.

    Raises ValueError with the path below `where` of the first thing that has no place in JSON (a tensor, a Path, a
    numpy number, a key that is not a str).
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r} of type {type(key).__name__}: keys must be str")
        return {key: to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, BaseModel):
        return to_plain(value.model_dump(exclude_unset=True, warnings=False), where)
    raise ValueError(
        f"{where} is a {type(value).__name__}: only None, bool, int, float, str, list and dict can be recorded. "
        "Convert it first (a tensor or numpy number with .item() or .tolist(), a path with str())."
    )


def canonical_json(value: Any, where: str = "value") -> str:
    """The one JSON spelling of `value`, on one line. Raises ValueError as `to_plain` does."""
    return json.dumps(to_plain(value, where), sort_keys=True, separators=(",", ":"), allow_nan=False)
