"""Generate the Markdown reference of all config keys from the pydantic models.

The meaning of a key is the comment within its field statement. The meaning of a section is its
docstring. No other file repeats them.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
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

_PATTERN = re.compile(r"(`[^`]*`)|([\w.*]*\w\.\*(?:[\w.*]*[\w*])?|\*\w[\w.*]*)")
"""Code, or a name pattern with asterisks."""


def training_reference() -> str:
    """Return the reference of a training config, one table per section."""
    return "\n".join(_section(TrainConfig, "", 2))


def model_reference() -> str:
    """Return the reference of the `model:` section, one chapter per model."""
    lines: list[str] = []
    for offer in sorted(default_registry().offers("model"), key=lambda offer: offer.backend.name):
        definition: Any = offer.backend.load()
        if not hasattr(definition, "schema"):  # a model of another distribution
            continue
        lines += [f"## `model.name: {offer.backend.name}`", ""]
        lines += _section(definition.schema, "model", 3, titled=False)
    return "\n".join(lines)


def keys(section: type[Strict], prefix: str) -> Iterator[str]:
    """Yield the path of every key, nested sections included."""
    for name, field in section.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        yield path
        for subsection in _sections(field.annotation):
            yield from keys(subsection, path)


def meanings(section: type[Strict], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the meaning of every key, nested sections included.

    A key without a comment has the docstrings of its sections as its meaning.
    """
    comments = _meanings(section)
    for name, field in section.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        subsections = _sections(field.annotation)
        docs = " ".join(inspect.getdoc(subsection) or "" for subsection in subsections)
        yield path, comments.get(name) or docs
        for subsection in subsections:
            yield from meanings(subsection, path)


def _section(section: type[Strict], prefix: str, level: int, titled: bool = True) -> Iterator[str]:
    if titled and prefix:
        yield from (f"{'#' * level} {_title(section, prefix)}", "")
    yield from (
        _escaped(inspect.getdoc(section) or ""),
        "",
        '<div class="keys" markdown>',
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    )
    comments = _meanings(section)
    paths: dict[type[Strict], str] = {}  # subsection -> the first key that has it
    for name, field in section.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        subsections = _sections(field.annotation)
        meaning = comments.get(name) or _pointer(subsections, paths)
        yield f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_escaped(meaning)} |"
        for subsection in subsections:
            paths.setdefault(subsection, path)
    yield from ("", "</div>", "")
    for subsection, path in paths.items():
        yield from _section(subsection, path, level)


def _pointer(subsections: list[type[Strict]], paths: dict[type[Strict], str]) -> str:
    """Return where the table of a key's subsections is; empty for a key without subsections."""
    for subsection in subsections:
        if subsection in paths:
            return f"as `{paths[subsection]}`"
    return "see below" if subsections else ""


def _title(section: type[Strict], prefix: str) -> str:
    """Return the heading of a section: its path, and its `name` if that selects the section."""
    name = section.model_fields.get("name")
    if name is not None and get_origin(name.annotation) is Literal:
        variants = get_args(name.annotation)
        if len(variants) == 1:
            return f"`{prefix}`, `name: {variants[0]}`"
    return f"`{prefix}`"


def _meanings(section: type[Strict]) -> dict[str, str]:
    """Return the comment of each field of a section, inherited fields included."""
    meanings: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if issubclass(cls, Strict) and cls is not Strict:
            for name, comment in _field_comments(cls).items():
                meanings[name] = comment or meanings.get(name, "")
    return meanings


def _field_comments(cls: type[Strict]) -> dict[str, str]:
    """Return the comments within each field statement of a class, joined by spaces."""
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
    """Escape a text for a cell of a table. Name patterns with asterisks become code."""
    text = _PATTERN.sub(lambda match: match[1] or f"`{match[2]}`", text)
    return text.replace("|", "\\|").replace("<", "&lt;")
