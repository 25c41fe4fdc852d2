"""Code blocks of the site's pages and the READMEs: language, text and the reason not to run."""

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
    why_not: str | None  # the reason in "<!-- not run: REASON -->", None if the block runs


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(b["language"], b["text"], text[: b.start("text")].count("\n") + 1, b["why"])
        for b in _BLOCK.finditer(text)
    ]


def named(page: Path) -> str:
    """Return the path of a page in the repository, as a test's id."""
    return page.relative_to(ROOT).as_posix()
