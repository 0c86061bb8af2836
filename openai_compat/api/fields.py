"""Request fields: how a value of JSON becomes one of ours, and what happens to each field of the API.

Every field that OpenAI or vLLM defines has a row in a table (`schemas.py`) and one of three fates:
it is honoured, it is ignored on purpose, or it is refused with a 400 that names it as soon as its value
asks for something. A name without a row is ignored, as in vLLM.

Parsing is lax where vLLM's is: a number may come as a numeric string, 1 may stand for true, null for
"not given". A boolean is never a number. A parser carries the JSON schema of what it takes, so that the
OpenAPI document (`openapi.py`) is made of the very table that requests are read with.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from microvllm.openai_compat.errors import Fault, shape_error
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import INT64_MAX, INT64_MIN

T = TypeVar("T")
JsonSchema = Mapping[str, Any]  # draft 2020-12, as in OpenAPI 3.1

_INTEGER = re.compile(r"[+-]?\d{1,20}(\.0{1,8})?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,3})?", re.ASCII)
MAX_EXACT = 1 << 53  # a float beyond it may stand for another integer than was written
_TRUE = frozenset({"true", "t", "yes", "y", "on", "1"})
_FALSE = frozenset({"false", "f", "no", "n", "off", "0"})


@dataclass(frozen=True)
class Parser(Generic[T]):
    """Turns one value of JSON, never null, into one of ours, or raises `Fault`.

    `schema` says what it takes in its canonical form, without the lax spellings.
    """

    convert: Callable[[Any], T]
    schema: JsonSchema

    def __call__(self, value: Any) -> T:
        return self.convert(value)

    def described(self, **keywords: Any) -> Parser[T]:
        """The same parser with more keywords in its schema: what is checked later, with the whole request."""
        return replace(self, schema={**self.schema, **keywords})


def parser(**schema: Any) -> Callable[[Callable[[Any], T]], Parser[T]]:
    """Makes a function a `Parser` with this schema; as a decorator."""
    return lambda convert: Parser(convert, schema)


class Fate(enum.Enum):
    HONOURED = "honoured"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True)
class Field:
    """One row: `parse` and `default` for a honoured field, `harmless` values for a refused one.

    A honoured field with `only_with` (another field, its value) is refused unless the body has that too.
    """

    name: str
    fate: Fate
    parse: Parser[Any] | None = None
    default: Any = None
    required: bool = False
    harmless: tuple[Any, ...] = ()
    only_with: tuple[str, Any] | None = None


def honoured(
    name: str,
    parse: Parser[Any],
    default: Any = None,
    *,
    required: bool = False,
    only_with: tuple[str, Any] | None = None,
) -> Field:
    return Field(name, Fate.HONOURED, parse, default, required, only_with=only_with)


def ignored(name: str) -> Field:
    return Field(name, Fate.IGNORED)


def refused(name: str, *harmless: Any) -> Field:
    """Not implemented; null and the `harmless` values ask for nothing and are let through."""
    return Field(name, Fate.REFUSED, harmless=harmless)


class Table(dict[str, Field]):
    """The rows of one endpoint by their names; `defaults` is what a body without any field would give."""

    def __init__(self, rows: Sequence[Field]) -> None:
        super().__init__((row.name, row) for row in rows)
        self.defaults = {row.name: row.default for row in rows if row.fate is Fate.HONOURED}
        self.required = [row.name for row in rows if row.required]

    def without(self, *names: str) -> Table:
        """The rows but those of these names."""
        return Table([row for name, row in self.items() if name not in names])


def table(*rows: Field) -> Table:
    return Table(rows)


def parse_fields(rows: Table, body: Mapping[str, Any]) -> dict[str, Any]:
    """The honoured fields of a body, each parsed or at its default.

    Raises `InvalidRequestError`: for wrong shapes (all of them, "Bad Request"), then for the refused fields,
    in the order of the table.
    """
    values = dict(rows.defaults)
    missing = Fault("missing", "Field required")
    faults = [(f"body.{name}", missing) for name in rows.required if name not in body]
    refusals = set()
    for name, value in body.items():
        row = rows.get(name)
        if row is None:
            continue
        if row.fate is Fate.REFUSED and not asks_nothing(value, row.harmless):
            refusals.add(name)
        if row.parse is None or (value is None and not row.required):
            continue
        if row.only_with is not None and body.get(row.only_with[0]) != row.only_with[1]:
            refusals.add(name)
            continue
        try:
            values[name] = row.parse(value)
        except Fault as fault:
            faults.append((f"body.{name}", fault))
    if faults:
        raise shape_error(faults)
    if refusals:
        names = [name for name in rows if name in refusals]
        verb = "is" if len(names) == 1 else "are"
        raise InvalidRequestError(
            f"{', '.join(names)} {verb} not supported by this server. "
            "docs/http.md and /openapi.json list the fields that are.",
            names[0],
        )
    return values


def asks_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Whether a value is null or one of the harmless ones."""
    if value is None:
        return True
    # bool is an int in Python, but `logprobs: false` and `logprobs: 0` are different wishes.
    return any(isinstance(value, bool) == isinstance(known, bool) and value == known for known in harmless)


def or_null(schema: JsonSchema) -> JsonSchema:
    """The schema of what may be left out: null means "not given" everywhere."""
    kind = schema.get("type")
    if isinstance(kind, str) and "enum" not in schema:
        return {**schema, "type": [kind, "null"]}
    return {"anyOf": [schema, {"type": "null"}]} if schema else schema


def integer(low: int = INT64_MIN, high: int = INT64_MAX) -> Parser[int]:
    """A whole number; the sampling ranges are checked by `SamplingParams`, only the type's bounds here."""

    @parser(type="integer", minimum=low, maximum=high)
    def parse(value: Any) -> int:
        if type(value) is str and _INTEGER.fullmatch(value):
            value = int(value.split(".")[0])
        elif type(value) is float and value.is_integer():
            if abs(value) < MAX_EXACT:
                value = int(value)
            elif abs(value) > INT64_MAX:  # JSON's parser makes a float of an integer beyond 64 bits
                value = INT64_MAX + 1 if value > 0 else INT64_MIN - 1
        if type(value) is not int:
            raise Fault("int_type", "Input should be a valid integer")
        if value < low:
            raise Fault("greater_than_equal", f"Input should be greater than or equal to {low}")
        if value > high:
            raise Fault("less_than_equal", f"Input should be less than or equal to {high}")
        return value

    return parse


@parser(type="number")
def number(value: Any) -> float:
    """A finite number."""
    if type(value) is str and _NUMBER.fullmatch(value):
        value = float(value)
    if type(value) not in (int, float):
        raise Fault("float_type", "Input should be a valid number")
    if not math.isfinite(value):
        raise Fault("finite_number", "Input should be a finite number")
    return value if type(value) is float else float(value)


@parser(type="boolean")
def boolean(value: Any) -> bool:
    if type(value) is bool:
        return value
    if type(value) in (int, float) and value in (0, 1):
        return bool(value)
    if type(value) is str and len(value) <= 5:
        word = value.lower()
        if word in _TRUE or word in _FALSE:
            return word in _TRUE
    raise Fault("bool_type", "Input should be a valid boolean")


@parser(type="string")
def string(value: Any) -> str:
    if type(value) is not str:
        raise Fault("string_type", "Input should be a valid string")
    return value


@parser(type="array")
def array(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Fault("list_type", "Input should be a valid list")
    return value


def array_of(parse: Parser[T], max_items: int) -> Parser[list[T]]:
    """A list, its length bounded before its items are looked at."""

    @parser(type="array", items=parse.schema, maxItems=max_items)
    def parse_list(value: Any) -> list[T]:
        if len(array(value)) > max_items:
            raise Fault("too_long", f"List should have at most {max_items} items, not {len(value)}")
        return [parse(item) for item in value]

    return parse_list


def token_ids(max_items: int) -> Parser[list[int]]:
    """Token ids, at least 0; that the model has them is checked with the request."""
    one = integer(low=0)

    @parser(type="array", items=one.schema, maxItems=max_items)
    def parse(value: Any) -> list[int]:
        items = array(value)
        if len(items) > max_items:
            raise Fault("too_long", f"List should have at most {max_items} items, not {len(items)}")
        # A loop over every id of a long list would hold up all other requests; these three run at C speed.
        if set(map(type, items)) == {int} and min(items) >= 0 and max(items) <= INT64_MAX:
            return items
        return [one(item) for item in items]

    return parse


def choice(*words: str) -> Parser[str]:
    """One of a few words."""

    @parser(type="string", enum=list(words))
    def parse(value: Any) -> str:
        if type(value) is not str or value not in words:
            raise Fault("literal_error", f"Input should be one of {', '.join(map(repr, words))}")
        return value

    return parse


def one_or_many(parse: Parser[T], max_items: int) -> Parser[list[T]]:
    """One value or a list of them, as a list."""
    parse_list = array_of(parse, max_items)

    @parser(anyOf=[parse.schema, parse_list.schema])
    def parse_either(value: Any) -> list[T]:
        return parse_list(value if type(value) is list else [value])

    return parse_either


@parser(type="object")
def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Fault("dict_type", "Input should be a valid dictionary")
    return value


def map_of(parse: Parser[T], max_items: int) -> Parser[dict[str, T]]:
    """An object whose values are all alike, its size bounded before they are looked at."""

    @parser(type="object", additionalProperties=parse.schema, maxProperties=max_items)
    def parse_map(value: Any) -> dict[str, T]:
        if len(mapping(value)) > max_items:
            raise Fault("too_long", f"Dictionary should have at most {max_items} items, not {len(value)}")
        return {key: parse(item) for key, item in value.items()}

    return parse_map


def record(**parsers: Parser[Any]) -> Parser[dict[str, Any]]:
    """An object with known keys; unknown ones are dropped, null means "not given"."""

    @parser(type="object", properties={key: or_null(item.schema) for key, item in parsers.items()})
    def parse(value: Any) -> dict[str, Any]:
        found = {}
        for key, parse_item in parsers.items():
            item = mapping(value).get(key)
            if item is None:
                continue
            try:
                found[key] = parse_item(item)
            except Fault as fault:
                raise Fault(fault.kind, f"{key}: {fault.problem}") from None
        return found

    return parse


@parser()
def anything(value: Any) -> Any:
    """Left to the endpoint, which knows the bounds."""
    return value
