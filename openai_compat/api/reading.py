"""Reads request bodies and single values as the types of `requests.py`.

Reading is lax where vLLM's is: a number may come as a numeric string, 1 may stand for true, null for "not
given". A boolean is never a number. A body that has exactly the declared types is converted by msgspec at
once; any other is read field by field, which finds every fault. What the first way takes the second takes
as the same value, so the second is the definition and the first its fast path.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from microvllm.openai_compat.api.requests import Body, all_fields, is_harmless
from microvllm.openai_compat.errors import Fault, shape_error
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import INT64_MAX, INT64_MIN, SamplingParams

MAX_EXACT = 1 << 53  # a float beyond it may stand for another integer than was written
BodyT = TypeVar("BodyT", bound=Body)
_INTEGER = re.compile(r"[+-]?\d{1,20}(\.0{1,8})?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,3})?", re.ASCII)
_WORDS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}
_JSON_TYPES = {
    inspect.StrType: str,
    inspect.LiteralType: str,
    inspect.ListType: list,
    inspect.BoolType: bool,
    inspect.StructType: dict,
}
_NAMES = {
    inspect.StrType: "a string",
    inspect.ListType: "a list",
    inspect.BoolType: "a boolean",
    inspect.StructType: "an object",
}
_LATE = frozenset(SamplingParams.__struct_fields__)  # `check_sampling` checks the ranges of these


def read_request(kind: type[BodyT], body: Mapping[str, Any]) -> BodyT:
    """Return the request that a body holds, null fields at their defaults.

    Raises `InvalidRequestError`: for wrong shapes (all of them, "Bad Request"), then for the refused fields,
    in the order of their table.
    """
    unsupported: list[str] = []
    sifted = None in body.values() or body.get("stream_options") == {}
    if sifted or not _special(kind).isdisjoint(body):
        body, unsupported = _sift(kind, body)
    try:
        request = msgspec.convert(body, kind)
    except msgspec.ValidationError:
        request = _read_each(kind, body)
    if unsupported:
        verb = "is" if len(unsupported) == 1 else "are"
        here = "".join(
            f" {name} is `{kind.renamed[name]}` here." for name in unsupported if name in kind.renamed
        )
        raise InvalidRequestError(
            f"{', '.join(unsupported)} {verb} not supported by this server.{here} "
            "docs/http.md and /openapi.json list the fields that are.",
            unsupported[0],
        )
    return request


@functools.cache
def _special(kind: type[Body]) -> frozenset[str]:
    return frozenset(kind.refused)


def _sift(kind: type[Body], body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields to read, and the names of those that are refused."""
    given, unsupported, fields = {}, [], all_fields(kind)
    for name, value in body.items():
        if name in kind.refused:
            if not is_harmless(value, kind.refused[name]):
                unsupported.append(name)
        elif value is None and not (name in fields and fields[name].required):
            continue
        elif name == "stream_options" and value == {}:
            continue  # without any option it needs no stream
        else:
            given[name] = value
    return given, sorted(unsupported, key=[*kind.refused].index)


def _read_each(kind: type[BodyT], given: Mapping[str, Any]) -> BodyT:
    """Read field by field, so that each wrong one is named."""
    fields, found = all_fields(kind), {}
    missing = Fault("Field required")
    faults = [
        (f"body.{name}", missing) for name, field in fields.items() if field.required and name not in given
    ]
    for name, value in given.items():
        if name not in fields:
            continue
        try:
            found[name] = _read(fields[name].type, value, late=name in _LATE)
        except Fault as fault:
            faults.append((f"body.{name}", fault))
    if faults:
        raise shape_error(faults)
    return kind(**found)


def read_value(kind: Any, value: Any) -> Any:
    """Read one JSON value, never null, as a value of this type. Raises `Fault`."""
    return _read(inspect.type_info(kind), value)


def _read(kind: inspect.Type, value: Any, late: bool = False) -> Any:
    """Read a value of an inspected type; `late` leaves ranges within 64 bits to `check_sampling`."""
    if isinstance(kind, inspect.Metadata):
        try:
            return _read(kind.type, value, late)
        except Fault:
            if kind.extra and (type(value) is str or isinstance(kind.type, inspect.UnionType)):
                raise Fault(kind.extra["problem"]) from None
            raise
    if isinstance(kind, inspect.UnionType):
        options = [option for option in kind.types if not isinstance(option, inspect.NoneType)]
        fitting = [option for option in options if _JSON_TYPES.get(type(_plain(option))) is type(value)]
        if fitting or len(options) == 1:
            return _read((fitting or options)[0], value, late)
        raise Fault(f"Input should be {' or '.join(map(_name, options))}")
    return _READERS[type(kind)](kind, value, late)


def _plain(kind: inspect.Type) -> inspect.Type:
    return kind.type if isinstance(kind, inspect.Metadata) else kind


def _name(kind: inspect.Type) -> str:
    """Return what a value of this type is, for a sentence."""
    kind = _plain(kind)
    if isinstance(kind, inspect.LiteralType):
        return ", ".join(map(repr, kind.values))
    if isinstance(kind, inspect.ListType) and isinstance(kind.item_type, inspect.StrType):
        return "a list of strings"
    return _NAMES[type(kind)]


def _read_integer(kind: inspect.IntType, value: Any, late: bool) -> int:
    if type(value) is str and _INTEGER.fullmatch(value):
        value = int(value.split(".")[0])
    elif type(value) is float and value.is_integer():
        if abs(value) < MAX_EXACT:
            value = int(value)
        elif abs(value) > INT64_MAX:  # JSON's parser makes a float of an integer beyond 64 bits
            value = INT64_MAX + 1 if value > 0 else INT64_MIN - 1
    if type(value) is not int:
        raise Fault("Input should be a valid integer")
    low = INT64_MIN if late or kind.ge is None else kind.ge
    high = INT64_MAX if late or kind.le is None else kind.le
    if value < low:
        raise Fault(f"Input should be greater than or equal to {low}")
    if value > high:
        raise Fault(f"Input should be less than or equal to {high}")
    return value


def _read_number(kind: inspect.FloatType, value: Any, late: bool) -> float:
    """Read a finite number. Every number with a range is read late."""
    if type(value) is str and _NUMBER.fullmatch(value):
        value = float(value)
    if type(value) not in (int, float):
        raise Fault("Input should be a valid number")
    if not math.isfinite(value):
        raise Fault("Input should be a finite number")
    return float(value)


def _read_boolean(kind: inspect.BoolType, value: Any, late: bool) -> bool:
    if type(value) in (bool, int, float) and value in (0, 1):
        return bool(value)
    word = _WORDS.get(value.lower()) if type(value) is str and len(value) <= 5 else None
    if word is None:
        raise Fault("Input should be a valid boolean")
    return word


def _read_string(kind: inspect.StrType, value: Any, late: bool) -> str:
    if type(value) is not str:
        raise Fault("Input should be a valid string")
    if len(value) < (kind.min_length or 0):
        raise Fault(f"Input should have at least {kind.min_length} character")
    if kind.max_length is not None and len(value) > kind.max_length:
        raise Fault(f"Input should have at most {kind.max_length} characters")
    if kind.pattern is not None and not re.search(kind.pattern, value):
        raise Fault(f"Input should match {kind.pattern}")
    return value


def _read_literal(kind: inspect.LiteralType, value: Any, late: bool) -> Any:
    if type(value) is not str or value not in kind.values:
        words = ", ".join(map(repr, kind.values))
        raise Fault(f"Input should be {'one of ' * (len(kind.values) > 1)}{words}")
    return value


def _read_list(kind: inspect.ListType, value: Any, late: bool) -> list[Any]:
    """Read a list whose length is bounded before any item is looked at."""
    if not isinstance(value, list):
        raise Fault("Input should be a valid list")
    if kind.max_length is not None and len(value) > kind.max_length:
        raise Fault(f"List should have at most {kind.max_length} items, not {len(value)}")
    if len(value) < (kind.min_length or 0):
        raise Fault(f"List should have at least {kind.min_length} item")
    item = kind.item_type
    if isinstance(item, inspect.IntType) and set(map(type, value)) == {int}:
        # At C speed: a loop over every id of a long list would hold up all other requests.
        low, high = item.ge or 0, item.le or INT64_MAX
        if low <= min(value) <= max(value) <= high:
            return value
    if not isinstance(item, inspect.StructType):
        return [_read(item, entry) for entry in value]
    found = []
    for index, entry in enumerate(value):
        try:
            found.append(_read_struct(item, entry, late))
        except Fault as fault:
            raise Fault(fault.problem, place=_inside(f"[{index}]", fault.place)) from None
    return found


def _inside(outer: str, place: str) -> str:
    """Return the path of a place in a member or an item."""
    return outer + place if not place or place.startswith("[") else f"{outer}.{place}"


def _read_dict(kind: inspect.DictType, value: Any, late: bool) -> dict[str, Any]:
    """Read an object whose size is bounded first; with given keys, a fault names the key."""
    if not isinstance(value, dict):
        raise Fault("Input should be a valid dictionary")
    if kind.max_length is not None and len(value) > kind.max_length:
        raise Fault(f"Dictionary should have at most {kind.max_length} items, not {len(value)}")
    if not isinstance(kind.key_type, inspect.LiteralType):
        return {key: _read(kind.value_type, item) for key, item in value.items()}
    for key, item in value.items():
        if key not in kind.key_type.values:
            raise Fault(f"Only {', '.join(map(str, kind.key_type.values))} are supported")
        try:
            _read(kind.value_type, item)
        except Fault as fault:
            raise Fault(fault.problem.replace("Input", key, 1)) from None
    return value


def _read_struct(kind: inspect.StructType, value: Any, late: bool) -> msgspec.Struct:
    """Read an object with known members and drop the others.

    Null means "not given", unless the member is required or one of a few words.
    """
    if not isinstance(value, dict):
        raise Fault("Input should be a valid dictionary")
    found = {}
    for field in kind.fields:
        if field.name not in value:
            if field.required:
                raise Fault(
                    f"Field required{getattr(kind.cls, 'hints', {}).get(field.name, '')}", place=field.name
                )
            continue
        item = value[field.name]
        if item is None and not field.required and not isinstance(field.type, inspect.LiteralType):
            continue
        try:
            found[field.name] = _read(field.type, item, late)
        except Fault as fault:
            raise Fault(fault.problem, place=_inside(field.name, fault.place)) from None
    return kind.cls(**found)


_READERS: Mapping[type[inspect.Type], Callable[[Any, Any, bool], Any]] = {
    inspect.AnyType: lambda kind, value, late: value,
    inspect.IntType: _read_integer,
    inspect.FloatType: _read_number,
    inspect.BoolType: _read_boolean,
    inspect.StrType: _read_string,
    inspect.LiteralType: _read_literal,
    inspect.ListType: _read_list,
    inspect.DictType: _read_dict,
    inspect.StructType: _read_struct,
}
