"""Reads the tables of tab-separated values in the rooms of this folder."""

from __future__ import annotations

import pkgutil


def read_table(name: str) -> list[list[str]]:
    """Return the rows below a table's heading, each as long as that. `name` is a path from this folder."""
    content = pkgutil.get_data("microvllm.runtime", name) or b""  # also out of a zipped package
    heading, *lines = content.decode().splitlines()
    width = heading.count("\t") + 1
    return [(line.split("\t") + [""] * width)[:width] for line in lines]
