"""What all sections of a page share: strictness, immutability, and the number types they are written in."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A share or a probability, in [0, 1]."""
Decay = Annotated[float, Field(ge=0, lt=1)]
"""A factor of an exponential average, in [0, 1)."""
SchemaVersion = Annotated[int, Field(ge=1, le=1)]
"""`migrate` has brought the page to today's keys before this is looked at."""
NonEmptyStr = Annotated[str, Field(min_length=1)]

_ENTRY = re.compile(r"^(\w+): (.+(?:\n[ ]{4,}.+)*)", re.MULTILINE)


def described_fields(section: type[BaseModel]) -> dict[str, str]:
    """The `Attributes:` of a section's docstring, so that the JSON schema says what the code says."""
    _, _, attributes = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")
    return {name: " ".join(text.split()) for name, text in _ENTRY.findall(inspect.cleandoc(attributes))}


def _add_descriptions(schema: dict[str, Any], section: type[BaseModel]) -> None:
    for name, text in described_fields(section).items():
        if name in schema.get("properties", {}):
            schema["properties"][name]["description"] = text


class Section(BaseModel):
    """A part of a page: unknown keys are errors, nothing is converted silently, nothing changes afterwards."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        defer_build=True,  # a page of one kind does not pay for the validators of the others
        json_schema_extra=_add_descriptions,
    )
