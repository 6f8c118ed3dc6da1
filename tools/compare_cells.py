"""The cells of a comparison: what one is, which are needed, and the file that keeps those that are done."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""A finished cell, as the store keeps it."""


@dataclass(frozen=True)
class Cell:
    """One run: a method at one rate and one seed.

    `knobs`: with a dot in the name a key of the product's config; without one, of the comparison: `replay` (own, old or
    none) and `joint` (yes: all corpora mixed, in one phase as long as all).
    """

    method: str
    lr: float
    seed: int = 0
    knobs: tuple[tuple[str, str], ...] = ()

    @property
    def variant(self) -> str:
        """The method with its knobs."""
        inner = ",".join(f"{key}={value}" for key, value in self.knobs)
        return f"{self.method}[{inner}]" if inner else self.method

    @property
    def name(self) -> str:
        """What --only looks at."""
        return f"{self.variant} lr={self.lr:g} seed={self.seed}"

    @property
    def family(self) -> str:
        """ours, or the library's method."""
        return self.method.partition("+")[0]

    def knob(self, name: str, default: str) -> str:
        """A knob of the comparison."""
        return dict(self.knobs).get(name, default)

    @property
    def overrides(self) -> list[str]:
        """Knobs of the product's config, as `--set` takes them."""
        return [f"{key}={value}" for key, value in self.knobs if "." in key]

    @property
    def joint(self) -> bool:
        """Whether all corpora are taught at once."""
        return self.knob("joint", "no") == "yes"

    @property
    def replays(self) -> bool:
        """Whether old text is trained on."""
        return (self.family == "ours" or "+replay" in self.method) and self.knob("replay", "own") != "none"

    @property
    def distils(self) -> bool:
        """Whether the model as it was holds it to what it said."""
        return self.replays and (self.family == "ours" or self.method.endswith("+kl"))


def variant_of(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Method and knobs of what `Cell.variant` wrote. Raises ValueError."""
    found = re.fullmatch(r"([a-z+]+)(?:\[(.*)\])?", text)
    if not found:
        raise ValueError(f"expected a method like lora+replay+kl or ours[sidecar.gate=token], found {text!r}")
    pairs = [pair.partition("=") for pair in (found[2] or "").split(",") if pair]
    return found[1], tuple((key, value) for key, _, value in pairs)


def cell_of(result: Result) -> Cell:
    """The cell that a result is of."""
    key = result["key"]
    return Cell(key["method"], key["lr"], key["seed"], tuple(key["knobs"].items()))


def digest_of(key: dict[str, Any]) -> str:
    """The name under which the store knows a result."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


class Store:
    """Finished cells, one a line; a line that a kill cut short is dropped, with a word.

    Raises ValueError for a line that is no result.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, Result] = {}
        data = file.read_bytes() if file.exists() else b""
        *lines, torn = data.split(b"\n")
        if torn:
            print(f"{file}: the last line was cut short ({len(torn)} bytes) and is dropped", file=sys.stderr)
            os.truncate(file, len(data) - len(torn))
        for number, line in enumerate(lines, start=1):
            try:
                result = json.loads(line)
                self.found[digest_of(result["key"])] = result
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{file}, line {number}: expected a finished cell, found {line[:40]!r}: delete that line"
                ) from None

    def get(self, key: dict[str, Any]) -> Result | None:
        """The result of exactly this, if it is there."""
        return self.found.get(digest_of(key))

    def add(self, result: Result) -> None:
        """Keeps a result; it is on disk when this returns."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, sort_keys=True, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.found[digest_of(result["key"])] = result
