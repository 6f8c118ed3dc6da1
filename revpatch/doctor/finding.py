"""One thing that was looked at: green, yellow or red, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Colour = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Finding:
    """Green is fine, yellow is slower or riskier than it need be, red keeps a run from training."""

    check: str
    colour: Colour
    found: str
    advice: str = ""
    """What to do; empty where nothing is to be done."""

    def __post_init__(self) -> None:
        assert (self.colour == "green") == (not self.advice), f"{self.check}: advice goes with yellow and red"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Colour:
    """The worst of the colours."""
    colours = {finding.colour for finding in findings}
    return "red" if "red" in colours else "yellow" if "yellow" in colours else "green"
