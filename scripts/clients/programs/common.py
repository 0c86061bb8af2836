"""What the programs in Python share: the arguments, the tool, and how they report."""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

URL, MODEL = sys.argv[1], sys.argv[2]
KEY = "none"
QUESTION = "What is the weather in Paris?"
ORDER = "Describe a person."


class Person(BaseModel):
    """A person; the bounds keep a weak model from writing until its context is full."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


def get_weather(city: str) -> str:
    """Return the weather of a city.

    Args:
        city: The name of the city.

    """
    return f"sunny in {city}"


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "The name of the city."}},
    "required": ["city"],
    "additionalProperties": False,
}


def report(**found: Any) -> None:
    """Print what was found as the last line: `structured`, an object, and `tools`, the final text."""
    print(
        json.dumps(
            {name: part.model_dump() if isinstance(part, BaseModel) else part for name, part in found.items()}
        )
    )
