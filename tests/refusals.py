"""The message with which a file of a model is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from microvllm.adapters.errors import ModelFileError


def refusal(read: Callable[..., Any], *arguments: Any, most: int = 500) -> str:
    """The message of the `ModelFileError` that a call raises; one line of less than `most` characters."""
    with pytest.raises(ModelFileError) as caught:
        read(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < most
    return message
