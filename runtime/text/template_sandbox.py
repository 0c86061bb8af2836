"""Compiles and renders chat templates in Jinja's immutable sandbox, with the environment of transformers.

The sandbox keeps a template away from Python's internals and from changing its inputs. It bounds neither
time nor memory: `template_process` runs it in a process that can be killed. Torch-free.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.text.content_format import detect_content_format

MAX_ERROR_CHARS = 300
COMPILED_TEMPLATES = 8
# What the environment offers to templates besides the variables of a request.
TEMPLATE_FUNCTIONS = frozenset(
    ("range", "namespace", "dict", "cycler", "joiner", "raise_exception", "strftime_now")
)


class Sandbox:
    """Renders chat templates in this process. A text longer than `max_chars` is refused."""

    def __init__(self, max_chars: int = 8_000_000) -> None:
        self._max_chars = max_chars
        self._environment = SandboxEnvironment()
        self._compile = functools.lru_cache(COMPILED_TEMPLATES)(self._environment.from_string)

    def content_format(self, source: str) -> str:
        """Returns the form of contents that a template was written for, see `detect_content_format`.

        Raises `InvalidRequestError` for a template that does not compile.
        """
        try:
            self._compile(source)
            return detect_content_format(self._environment.parse(source))
        except MemoryError:
            raise
        except jinja2.TemplateSyntaxError as error:
            problem = f"is not valid (line {error.lineno}: {shortened(error.message)})"
        except Exception as error:  # nesting too deep for the compiler, a number too long, ...
            problem = f"does not compile ({type(error).__name__}: {shortened(error)})"
        raise InvalidRequestError(f"The model's chat template {problem}.")

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Returns the text. Raises `InvalidRequestError` if the template refuses the request or fails."""
        chunks, size = [], 0
        try:
            for chunk in self._compile(source).generate(variables):
                size += len(chunk)
                if size > self._max_chars:
                    break
                chunks.append(chunk)
        except MemoryError:
            raise
        except TemplateRefusal as error:
            raise InvalidRequestError(f"The chat template refused the request: {shortened(error)}") from error
        except Exception as error:  # a template can fail in any way Python can
            raise InvalidRequestError(
                f"The chat template failed ({type(error).__name__}: {shortened(error)})."
            ) from error
        if size > self._max_chars:
            raise InvalidRequestError(f"The chat template produced more than {self._max_chars} characters.")
        return "".join(chunks)


def shortened(value: object) -> str:
    """Returns the text of a value on one line, at most `MAX_ERROR_CHARS` of it."""
    text = " ".join(str(value).split())
    return text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + "..."


class TemplateRefusal(TemplateError):
    """The template called `raise_exception`: it says what is wrong with the conversation."""


class SandboxEnvironment(ImmutableSandboxedEnvironment):
    """The environment chat templates are written for (that of transformers).

    Whitespace as in transformers (`trim_blocks`, `lstrip_blocks`), `break` and `continue`, `raise_exception`,
    `strftime_now`, `tojson` that keeps non-ASCII and does not escape HTML.
    """

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.filters["tojson"] = _to_json
        functions = {
            **self.globals,  # its range is at most 100,000 long
            "namespace": _TemplateNamespace,
            "dict": _make_dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.globals = {name: functions[name] for name in TEMPLATE_FUNCTIONS}


class _GenerationBlock(Extension):
    """`{% generation %}`: marks the assistant's tokens for training; here its body is simply shown."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


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
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' `tojson`, which differs from Jinja's: no HTML escapes, non-ASCII kept."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
