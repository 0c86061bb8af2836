"""Replaces values of a model's `config.json` by those that the user gives (`--hf-overrides` of vLLM).

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SCALINGS = ("rope_scaling", "rope_parameters")  # one thing under its older and its newer name
ROTARY = (*SCALINGS, "rope_theta")


def override(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values with each of `overrides` in place of its own; an object is replaced as a whole, as in vLLM.

    A rotary scaling that names no base keeps the model's: in files it is beside the scaling or inside of it.
    """
    merged = {**values, **overrides}
    if not overrides.keys() & set(ROTARY):
        return merged
    stored = values.get("rope_scaling") or values.get("rope_parameters") or {}
    scaling = next((overrides[key] for key in SCALINGS if key in overrides), stored) or {}
    places = (overrides, scaling, stored, values)
    thetas = [place["rope_theta"] for place in places if isinstance(place, dict) and place.get("rope_theta")]
    for key in ROTARY:
        merged.pop(key, None)
    merged["rope_scaling"] = scaling
    if thetas:
        merged["rope_theta"] = thetas[0]
        if isinstance(scaling, dict):
            merged["rope_scaling"] = {**scaling, "rope_theta": thetas[0]}
    return merged


def unread(overrides: Iterable[str], read: Iterable[str]) -> list[str]:
    """The overrides that no reader has asked for: they would change nothing."""
    return sorted(set(overrides) - {*read, *ROTARY})
