"""Groups of command-line options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

Command = Callable[..., None]


def takes(*groups: Callable[..., Any]) -> Callable[[Command], Command]:
    """Gives a command for Typer the options of `groups`, before its own.

    A group is a function with options for parameters; what it returns becomes the command's next positional
    argument. The command is called with those first and its own options as keywords.
    """

    def decorate(command: Command) -> Command:
        # What a group returns is imported when it is called and not before; Typer never sees that argument.
        results = {str(group.__annotations__["return"]): Any for group in groups}
        taken = [list(inspect.signature(group).parameters.values()) for group in groups]
        own = list(inspect.signature(command).parameters.values())[len(groups) :]
        parameters = []
        for function, found in zip((*groups, command), (*taken, own), strict=True):
            hints = get_type_hints(function, localns=results, include_extras=True)
            for parameter in found:
                parameters.append(
                    parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
                )

        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = [
                group(**{parameter.name: values.pop(parameter.name) for parameter in found})
                for group, found in zip(groups, taken, strict=True)
            ]
            command(*made, **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
