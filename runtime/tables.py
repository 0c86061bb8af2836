"""Reads the tables of tab-separated values in this folder."""

from __future__ import annotations

import pkgutil


def read_table(name: str) -> list[list[str]]:
    """Return the rows of a table in this folder, each as long as its heading, which is left out."""
    content = pkgutil.get_data("microvllm.runtime", name) or b""  # also out of a zipped package
    heading, *lines = content.decode().splitlines()
    width = heading.count("\t") + 1
    return [(line.split("\t") + [""] * width)[:width] for line in lines]
