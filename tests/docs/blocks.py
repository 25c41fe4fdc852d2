"""The code blocks of the site's pages and of the READMEs, each with its language, and why it is not run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("packages/*/README.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tools/offline/README.md")),
]

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>.+?) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block of code in a page."""

    language: str
    text: str
    line: int
    why_not: str | None  # why it is not run


def blocks(page: Path) -> list[Block]:
    """Return a page's blocks."""
    text = page.read_text(encoding="utf-8")
    found = _BLOCK.finditer(text)
    return [
        Block(b["language"], b["text"], text[: b.start("text")].count("\n") + 1, b["why"])
        for b in found
    ]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
