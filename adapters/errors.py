"""The errors of the adapters: a file of the model is not usable, or not with the values given for it."""

from __future__ import annotations

import errno


class ModelFileError(Exception):
    """A file of the model is missing, truncated, malformed or inconsistent; the message names it."""

    remedy = (
        "fetch the file again if it is damaged, and let this user read it; README.md lists the models "
        "that are supported"
    )

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem


class OverrideError(ModelFileError):
    """A value given in place of one of config.json does not fit the model, whose files may be fine."""


class NoMemoryError(ModelFileError):
    """There is too little memory for a file or a tensor of the model, whose files may be fine."""

    remedy = "free memory, or take a smaller or a packed model"


def unreadable(path: object, error: OSError) -> ModelFileError:
    """Return the error for a file that the system does not open, read or map."""
    kind = NoMemoryError if error.errno == errno.ENOMEM else ModelFileError
    return kind(path, f"cannot be read ({error.strerror})")


class CutError(ModelFileError):
    """A shard would begin or end within a block of packed weights."""
