"""What every section of a config is made of: its strictness, and the types of its keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _something(text: str) -> str:
    """Return the text; raises ValueError for one that can name nothing, as a path or a column."""
    if not text.strip():
        raise ValueError("is empty; give a value, or remove the key")
    if "\0" in text:
        raise ValueError("holds a NUL, which no name has; take it out")
    return text


Text = Annotated[str, AfterValidator(_something)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]


class ConfigError(ValueError):
    """A config that can't be used; the message names the file, every wrong key, what was found and what to do."""


class Section(BaseModel):
    """Base of all sections: no unknown keys, no silent conversion of types, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
