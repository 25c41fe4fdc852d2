"""Record what a row holds and its document does not."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

log = logging.getLogger("tokenyard")

_TEXTS = ("content", "reasoning_content", "thinking")


class LeftOut:
    """Collects columns that are not read, and messages that a chat template does not render."""

    def __init__(self) -> None:
        self.columns: set[str] = set()
        self.conversations = 0  # with a text that is left out or changed
        self.example = ""

    def add_columns(self, row: Mapping[str, Any], read: Sequence[str]) -> None:
        """Add the columns of a row that have a value and are not among those read."""
        self.columns |= {str(k) for k, value in row.items() if k not in read and value}

    def add_messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, rendered: str, location: str
    ) -> None:
        """Count a conversation if a text of its messages or a tool is not in what is rendered."""
        for name, text in _texts(messages, tools):
            if text not in rendered and json.dumps(text, ensure_ascii=False)[1:-1] not in rendered:
                self.conversations += 1
                self.example = self.example or f"{name} of {location}"
                return

    def warn(self, key: str) -> None:
        """Log a warning for each kind."""
        if self.columns:
            log.warning("%s: columns that are not read: %s", key, ", ".join(sorted(self.columns)))
        if self.conversations:
            log.warning(
                "%s: the chat template leaves out or changes a text of %d conversations, such as "
                "%s",
                key,
                self.conversations,
                self.example,
            )


def _texts(messages: Sequence[Mapping[str, Any]], tools: Any) -> Iterator[tuple[str, str]]:
    """Yield the texts that a template should render, each with its name."""
    for number, message in enumerate(messages, 1):
        for key in _TEXTS:
            if isinstance(message.get(key), str):
                yield f"{key} of message {number}", message[key].strip()
        for name in _functions(message.get("tool_calls")):
            yield f"a tool call of message {number}", name
    for name in _functions(tools):
        yield "a tool", name


def _functions(listed: Any) -> Iterator[str]:
    """Yield the names of functions, given as OpenAI's objects or by themselves."""
    for each in listed if isinstance(listed, list) else []:
        function = each.get("function", each) if isinstance(each, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            yield name
