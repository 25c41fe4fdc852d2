"""Take the options of a command as one frozen dataclass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

Result = TypeVar("Result")


def dataclass_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a typer command one parameter for each field of the dataclasses that it takes.

    A field is annotated like a parameter of a typer command, and its default is the option's
    default. Parameters of other types stay as they are::

        @dataclass(frozen=True)
        class PackOptions:
            out: Annotated[Path, typer.Argument(help="Output folder.")]
            workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1

        @app.command()
        @dataclass_options
        def pack(options: PackOptions) -> None:
            \"""Pack text into token files.\"""

    Raises TypeError if no parameter is a dataclass, or if two parameters have the same name.
    """
    hints = get_type_hints(function, include_extras=True)
    classes: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = list(_expand(inspect.signature(function), hints, classes))
    _check(function, classes, parameters)

    @functools.wraps(function)
    def command(**values: Any) -> Result:
        for name, cls in classes.items():
            options = {field.name: values.pop(field.name) for field in _init_fields(cls)}
            values[name] = cls(**options)
        return function(**values)

    # typer reads both: the signature for defaults, the annotations for types.
    annotations = {parameter.name: parameter.annotation for parameter in parameters}
    command.__annotations__ = annotations | {"return": hints.get("return", None)}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _check(
    function: Callable[..., Any],
    classes: Mapping[str, Any],
    parameters: Sequence[inspect.Parameter],
) -> None:
    """Raise TypeError for a function whose options cannot be derived."""
    if not classes:
        raise TypeError(f"{function.__qualname__} takes no dataclass")
    names = [parameter.name for parameter in parameters]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise TypeError(f"{function.__qualname__} has two parameters named {', '.join(repeated)}")


def _expand(
    signature: inspect.Signature, hints: Mapping[str, Any], classes: Mapping[str, Any]
) -> Iterator[inspect.Parameter]:
    """Yield a command's parameters, with each dataclass replaced by its fields.

    All are keyword-only, because a field without default may follow one with a default.
    """
    for name, parameter in signature.parameters.items():
        if name not in classes:
            yield parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints.get(name, Any)
            )
            continue
        types = get_type_hints(classes[name], include_extras=True)
        for field in _init_fields(classes[name]):
            yield inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(field),
                annotation=types[field.name],
            )


def _init_fields(cls: Any) -> list[Field[Any]]:
    return [field for field in fields(cls) if field.init]


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default
