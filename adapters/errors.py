"""The errors of the adapters: a file of the model is not usable, or not with the values given for it."""

from __future__ import annotations


class ModelFileError(Exception):
    """A file of the model is missing, truncated, malformed or inconsistent; the message names it."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem


class OverrideError(ModelFileError):
    """A value given in place of one of config.json does not fit the model, whose files may be fine."""


class NoMemoryError(ModelFileError):
    """There is too little memory for a tensor of the model, whose files may be fine."""


class CutError(ModelFileError):
    """A shard would begin or end within a block of packed weights."""
