"""The one error of the adapters: a file of the model is not usable."""

from __future__ import annotations


class ModelFileError(Exception):
    """A file of the model is missing, truncated, malformed or inconsistent; the message names it."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem
