"""Gives a command the flags of dataclasses: Typer's options derive from the `Flag` of each field."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from microvllm.runtime.options.flag import OBJECT, Flag, flags_of, json_object

Command = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Fields:
    """Selects fields of a dataclass as flags of a command: `Annotated[EngineArgs, Fields(only=...)]`."""

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return name not in self.without and (not self.only or name in self.only)


def with_options(command: Command) -> Command:
    """Give Typer a flag for each field in place of the parameters that are dataclasses.

    The command is called with instances of these, made of the flags that were given. A field without a
    default is None where its flag is missing.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, dict[str, str]]] = {}  # parameter -> class, and its fields' Typer names
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        cls: type
        cls, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if dataclasses.is_dataclass(cls):
            fields = next((mark for mark in marks if isinstance(mark, Fields)), Fields())
            options = {field: option for field, option in _options(cls).items() if field in fields}
            parameters.extend(options.values())
            groups[parameter.name] = cls, {field: option.name for field, option in options.items()}
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        made = {}
        for name, (made_of, fields) in groups.items():
            given = {field: values.pop(option) for field, option in fields.items()}
            made[name] = _make(made_of, given)
        command(**made, **values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@functools.cache
def _options(cls: Any) -> dict[str, inspect.Parameter]:
    """Map each field to the parameter that Typer makes an option of."""
    hints = get_type_hints(cls)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    return {name: _option(flag, hints[name], defaults[name]) for name, flag in flags_of(cls).items()}


def _option(flag: Flag, hint: Any, default: Any) -> inspect.Parameter:
    kinds = {get_origin(each) for each in (hint, *get_args(hint))}
    read, metavar = flag.read, flag.metavar
    if read is None and kinds & {dict, Mapping}:
        read, metavar = json_object, OBJECT
    if not isinstance(default, (str, int, float)):
        default = None  # the field's own is taken where the flag is missing
    if read is not None or tuple in kinds:
        metavar = metavar or "<str>"  # Typer would show the types below
    if read is not None:
        hint = Any
    elif tuple in kinds:
        hint = list[str] | None
    elif default is None:
        hint = hint | None
    bounded = flag.above is None and read is None  # Typer has no open bounds, and none for texts
    option = typer.Option(
        *flag.spelled,
        parser=read and _parser(read),
        metavar=metavar,
        min=flag.low if bounded else None,
        max=flag.high if bounded else None,
        envvar=flag.env[0] if len(flag.env) == 1 else list(flag.env) or None,  # errors name one as it is
        show_envvar=bool(flag.env),
        help=flag.help,
        rich_help_panel=flag.section,
    )
    return inspect.Parameter(
        flag.name.replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[hint, option],
    )


def _parser(read: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(read)
    def parse(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parse


def _make(cls: Any, values: Mapping[str, Any]) -> Any:
    required = {field.name for field in dataclasses.fields(cls) if _is_required(field)}
    return cls(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value is not None or name in required
        }
    )


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
