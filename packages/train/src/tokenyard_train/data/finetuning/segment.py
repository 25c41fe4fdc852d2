"""Pieces of a document's text."""

from __future__ import annotations

from typing import NamedTuple


class Segment(NamedTuple):
    """A piece of a document's text, which is tokenized on its own."""

    text: str
    answer: bool  # what the model should say, and not a prompt
    ended: bool = False  # the end-of-document id follows
