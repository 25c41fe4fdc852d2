"""Show the comments of fields in the reference, as their docstrings (a griffe extension)."""

from __future__ import annotations

import io
import re
import tokenize
from typing import Any

import griffe

_SHAPE = re.compile(r"\[[A-Z0-9+* ,]*\]")


class FieldComments(griffe.Extension):
    """Turn the comment behind or above a public field of a class into its docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Set the docstring of an attribute that has none."""
        if attr.docstring is None and attr.is_public and attr.parent is not None:
            comment = field_comment(attr) if attr.parent.is_class else ""
            if comment:
                attr.docstring = griffe.Docstring(comment, lineno=attr.lineno, parent=attr)


def field_comment(attr: griffe.Attribute) -> str:
    """Return the comment of a field as Markdown, with shapes as code, or ""."""
    lines = attr.lines_collection[attr.filepath]
    first = (attr.lineno or 1) - 1
    start = first
    while start and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    above = [line.strip() for line in lines[start:first]]
    comments = [*above, *_comments_in("\n".join(lines[first : attr.endlineno]))]
    text = " ".join(comment.removeprefix("#").strip() for comment in comments)
    return _SHAPE.sub(r"`\g<0>`", text)


def _comments_in(statement: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(statement.strip()).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]
