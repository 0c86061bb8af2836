"""A Jinja environment in which an untrusted chat template can do no harm, only fail.

Jinja's `ImmutableSandboxedEnvironment` keeps a template away from Python's internals and from changing its
inputs. It bounds neither time nor memory, so this module adds: a deadline that interrupts a running template
(`run_with_deadline`), and `LimitedEnvironment`, which refuses the operations that make a huge value out of
small ones (`"a" * 10**9`, `s ~ s` in a loop, `"%1000000000d"`) before they allocate. Torch-free.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Sized
from datetime import datetime
from typing import Any, TypeVar

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

T = TypeVar("T")

MAX_VALUE_CHARS = 8_000_000  # length of any one string or list that a template builds
MAX_NUMBER_BITS = 4096  # size of any one integer
MAX_ARGUMENT = 100_000  # any integer given to a filter or a string method, such as a width
_LONG_NUMBER = re.compile(r"\d{6,}")


class TemplateRefusal(TemplateError):
    """The template called `raise_exception`: it says what is wrong with the conversation."""


class DeadlineExceeded(BaseException):
    """Raised inside the interrupted thread. Not an `Exception`, so that nothing on the way catches it."""


def run_with_deadline(function: Callable[[], T], seconds: float) -> T:
    """Run `function` in this thread; raises `DeadlineExceeded` out of it when it takes longer.

    A timer thread makes the interpreter raise the exception here at the next bytecode (so a single long call
    into C is not cut short). Whatever happens, it can neither arrive after this function returned nor twice.
    """
    watchdog = _Watchdog(seconds)
    try:
        watchdog.start()
        return function()
    finally:
        watchdog.disarm()


class _Watchdog:
    def __init__(self, seconds: float) -> None:
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._armed = True
        self._fired = False
        self._timer = threading.Timer(seconds, self._fire)
        self._timer.daemon = True

    def start(self) -> None:
        self._timer.start()

    def disarm(self) -> None:
        """After this no exception is pending and none will come; one that is pending is raised here."""
        self._timer.cancel()
        with self._lock:
            self._armed = False
        if self._fired:
            # It is raised in this loop if it was not before. To withdraw it instead leaves the interpreter
            # looking for it for ever: slower up to Python 3.12 at least, and without end under sys.settrace.
            for _ in range(100):
                pass

    def _fire(self) -> None:
        with self._lock:
            if self._armed:
                self._fired = True
                exception = ctypes.py_object(DeadlineExceeded)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), exception)


class _LimitedCodeGenerator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        # Jinja compiles `a ~ b` to a plain join, the one operator that a sandbox cannot intercept.
        self.write("environment.concat_values((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _GenerationBlock(Extension):
    """`{% generation %}`: marks the assistant's tokens for training; here its body is simply shown."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The environment chat templates are written for (that of transformers), with limits on memory.

    Whitespace as in transformers (`trim_blocks`, `lstrip_blocks`), `break` and `continue`, `raise_exception`,
    `strftime_now`, `tojson` that keeps non-ASCII and does not escape HTML. A refused operation raises
    `SecurityError`.
    """

    code_generator_class = _LimitedCodeGenerator
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.filters = {name: _limit_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = _to_json
        self.globals = {
            "range": self.globals["range"],  # the sandbox's own, at most 100 000 long
            "namespace": _TemplateNamespace,
            "dict": _make_dict,
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins the output of a macro or of a `{% set %}` block."""
        texts = list(parts)
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def concat_values(self, values: Iterable[Any]) -> str:
        """The `~` operator."""
        return self.concat(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _check_size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_text_method(__obj.__name__, owner, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's safe stand-in for a string's `format` and `format_map`; None for any other value."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            named = args[0].values() if value.__name__ == "format_map" else kwargs.values()
            _check_format(value.__self__, (*args, *named))
            return wrapped(*args, **kwargs)

        return limited


def _check_size(length: int) -> None:
    if length > MAX_VALUE_CHARS:
        raise SecurityError(f"a value of {length} characters or items is over the limit of {MAX_VALUE_CHARS}")


def _check_product(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, Sized) and isinstance(times, int):
            _check_size(len(value) * max(times, 0))
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int):
        _check_bits(base.bit_length() * max(exponent, 0))


def _check_bits(bits: int) -> None:
    if bits > MAX_NUMBER_BITS:
        raise SecurityError(f"a number of {bits} bits is over the limit of {MAX_NUMBER_BITS}")


def _check_numbers(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_ARGUMENT for value in values):
        raise SecurityError(f"a number over the limit of {MAX_ARGUMENT}")


def _check_format(form: str, values: Iterable[Any]) -> None:
    """A width may be written in the format itself, or (as `*` or `{:{}}`) be one of the values."""
    if _LONG_NUMBER.search(form):
        raise SecurityError(f"a format width over the limit of {MAX_ARGUMENT}")
    if "*" in form or "{:" in form or "{" in form.partition(":")[2]:
        _check_numbers(values)


def _check_text_method(name: str, owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    values = (*args, *kwargs.values())
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        _check_numbers(values)
    elif name == "replace" and len(args) >= 2:
        _check_replace(owner, *args[:2])
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        _check_size(sum(len(item) + len(owner) for item in args[0] if isinstance(item, str)))


def _check_replace(text: Any, old: Any, new: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    _check_size(len(text) + text.count(old) * len(new))


def _limit_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, refusing what would make a huge value. Jinja's markers on `function` are kept."""
    passes_environment = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        values = args[1:] if passes_environment else args
        if name == "replace" and len(values) >= 3:
            _check_replace(*values[:3])
        elif name == "join" and values and isinstance(values[0], (list, tuple)):
            separator = str(values[1] if len(values) > 1 else kwargs.get("d", ""))
            _check_size(sum(len(str(item)) + len(separator) for item in values[0]))
        elif name == "format" and values:
            _check_format(str(values[0]), (*values[1:], *kwargs.values()))
        elif name in ("center", "indent", "wordwrap", "truncate", "batch", "slice", "round"):
            _check_numbers((*values[1:], *kwargs.values()))
        return function(*args, **kwargs)

    return limited


class _TemplateNamespace(Namespace):
    """`namespace()` without underscore names, which Python itself would look up on the object."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named parameter, so that `namespace(self=1)` works.
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the name {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict()` as a function: the class itself would offer `dict.update` on the template's inputs."""
    return dict(*args, **kwargs)


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 1000 or re.search(r"\d{3,}", form):
        raise SecurityError("the format of strftime_now is too long")
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' `tojson`, which differs from Jinja's: no HTML escapes, non-ASCII kept."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > 64:
        raise SecurityError("the indent of tojson is over the limit of 64")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
