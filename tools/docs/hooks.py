"""What mkdocs fills in where a page says ``<!-- fill: NAME ... -->``: references, and files of the repository."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from config_reference import model_reference, training_reference

ROOT = Path(__file__).parents[2]
_FILL = re.compile(
    r"^<!-- fill: (\S+)(?: (\S+))? -->(?:\nSee .*)?$", re.MULTILINE
)  # See: for readers of a clone
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")
_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "packages/bench": "bench.md",
    "packages/core": "backends.md",
    "packages/kernels-triton": "kernels-triton.md",
    "packages/kernels-cuda": "kernels-cuda.md",
    "packages/parallel": "parallel.md",
    "packages/models": "models.md",
    "packages/train": "train.md",
    "docs/benchmarks": "benchmarks/README.md",
    "docs/benchmarks/README.md": "benchmarks/README.md",
}
"""The pages that show a file or folder of the repository."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what a page asks for."""
    return _FILL.sub(lambda found: _FILLS[found[1]](*filter(None, found.groups()[1:])), markdown)


def _file(name: str) -> str:
    """Return a Markdown file of the repository, its links led to pages; what has no page is named without a link."""
    path = ROOT / name
    return _LINK.sub(lambda found: _led(found[1], found[2], path), path.read_text(encoding="utf-8"))


def _led(text: str, link: str, path: Path) -> str:
    target, _, anchor = link.partition("#")
    named = (path.parent / target).resolve().relative_to(ROOT).as_posix()
    if named not in _PAGES:
        return text
    return f"[{text}]({_PAGES[named]}{'#' + anchor if anchor else ''})"


def _drawing(name: str) -> str:
    """Return an SVG to stand in the page itself, so that it takes the page's colours."""
    return re.sub(r"\s*\n\s*", " ", (ROOT / name).read_text(encoding="utf-8"))


def _changelogs() -> str:
    found = []
    for path in sorted(ROOT.glob("packages/*/CHANGELOG.md")):
        text = path.read_text(encoding="utf-8").replace("# Changelog of ", "# ", 1)
        found.append(re.sub(r"^#", "##", text, flags=re.MULTILINE))
    return "\n".join(found)


_FILLS: dict[str, Callable[..., str]] = {
    "file": _file,
    "svg": _drawing,
    "changelogs": _changelogs,
    "training-config": training_reference,
    "model-keys": model_reference,
}
