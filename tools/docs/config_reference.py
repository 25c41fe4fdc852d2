"""The reference of all config keys, as Markdown, from the models that read them.

What a key means is the comment beside it in the source, and what a section is for its docstring: there is no second
place to forget.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tokenyard import default_registry
from tokenyard_models.strict_config import Strict
from tokenyard_train.config.duration import Span
from tokenyard_train.config.schema import TrainConfig


def training_reference() -> str:
    """Return the keys of a training config, section by section."""
    return "\n".join(_section(TrainConfig, "", 2))


def model_reference() -> str:
    """Return the keys of each model's `model:` section."""
    lines: list[str] = []
    for offer in sorted(default_registry().offers("model"), key=lambda offer: offer.backend.name):
        definition: Any = offer.backend.load()
        lines += [f"## `model.name: {offer.backend.name}`", ""]
        lines += _section(definition.schema, "model", 3, titled=False)
    return "\n".join(lines)


def keys(section: type[Strict], where: str) -> Iterator[str]:
    """Give every key by its path."""
    for name, field in section.model_fields.items():
        path = f"{where}.{name}" if where else name
        yield path
        for below in _sections(field.annotation):
            yield from keys(below, path)


def meanings(section: type[Strict], where: str = "") -> Iterator[tuple[str, str]]:
    """Give every key by its path with what it means; of a key that is a section, what that is for."""
    own = _meanings(section)
    for name, field in section.model_fields.items():
        path = f"{where}.{name}" if where else name
        below = _sections(field.annotation)
        yield path, own.get(name) or " ".join(inspect.getdoc(inner) or "" for inner in below)
        for inner in below:
            yield from meanings(inner, path)


def _section(section: type[Strict], where: str, level: int, titled: bool = True) -> Iterator[str]:
    if titled and where:
        yield from (f"{'#' * level} {_title(section, where)}", "")
    yield from (
        inspect.getdoc(section) or "",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    )
    own = _meanings(section)
    below: dict[type[Strict], str] = {}
    for name, field in section.model_fields.items():
        path = f"{where}.{name}" if where else name
        inner = _sections(field.annotation)
        shown = [
            below[other] for other in inner if other in below
        ]  # the same sections under another key
        meaning = own.get(name) or (f"as `{shown[0]}`" if shown else "see below" if inner else "")
        yield f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_escaped(meaning)} |"
        below |= {other: path for other in inner if other not in below}
    yield ""
    for inner, path in below.items():
        yield from _section(inner, path, level)


def _title(section: type[Strict], where: str) -> str:
    """Return a heading: the path, and of sections that are told apart by their name, that."""
    name = section.model_fields.get("name")
    variant = (
        get_args(name.annotation)
        if name is not None and get_origin(name.annotation) is Literal
        else ()
    )
    return f"`{where}`, `name: {variant[0]}`" if len(variant) == 1 else f"`{where}`"


def _meanings(section: type[Strict]) -> dict[str, str]:
    """Return the comment beside each key of a section and of the sections that it extends."""
    meanings: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if issubclass(cls, Strict) and cls is not Strict:
            for name, comment in _field_comments(cls).items():
                meanings[name] = comment or meanings.get(name, "")
    return meanings


def _field_comments(cls: type[Strict]) -> dict[str, str]:
    """Return each field of a class with the comments within its statement, of one line or of several."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(
            comments[line]
            for line in range(field.lineno, (field.end_lineno or field.lineno) + 1)
            if line in comments
        )
        for field in definition.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def _sections(annotation: Any) -> list[type[Strict]]:
    if inspect.isclass(annotation) and issubclass(annotation, Strict):
        return [annotation]
    return [inner for part in get_args(annotation) for inner in _sections(part)]


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(
            dict.fromkeys(_type(part) for part in get_args(annotation) if part is not type(None))
        )
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if _sections(annotation):
        return "section" if inspect.isclass(annotation) else "sections by name"
    if get_origin(annotation) in (list, tuple, dict):
        return {list: "list of ", tuple: "list of ", dict: "mapping to "}[
            get_origin(annotation)
        ] + _type(get_args(annotation)[-1])
    return {
        Span: "duration",
        str: "text",
        int: "integer",
        float: "number",
        bool: "true, false",
    }.get(annotation, "anything")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "none"
    if isinstance(value, Strict):
        return "its own"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
