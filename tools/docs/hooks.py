"""Replace ``<!-- fill: NAME ... -->`` in pages by references and files of the repository."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from config_reference import model_reference, training_reference

ROOT = Path(__file__).parents[2]
# The line "See ..." or the picture after a fill is for readers on GitHub. The site drops it.
_FILL = re.compile(r"^<!-- fill: (\S+)(?: (\S+))? -->(?:\n(?:See |!\[).*)?$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")
_CELL_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
_ROW = re.compile(r"<tr>.*?</tr>", re.DOTALL)
_OPTION = re.compile(r'(?<=<span class="w"> </span>)--\w[\w-]*')
_ERROR = re.compile(r"language-text(?= highlight\"><pre><span></span><code>error:)")
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
}
"""The page that shows a file or folder of the repository outside docs/."""


def on_config(config: Any) -> None:
    """Take the version and the licence for the header from pyproject.toml (an mkdocs hook)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.extra |= {"version": project["version"], "license": project["license"]}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every fill comment of a page (an mkdocs hook)."""
    return _FILL.sub(lambda match: _FILLS[match[1]](*filter(None, match.groups()[1:])), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Say where a phone may break lines (an mkdocs hook). Wider screens ignore it.

    Names in cells of tables break after punctuation, options of commands do not, and errors wrap.
    """
    html = _ROW.sub(lambda row: _CELL_CODE.sub(_breakable, row[0]), html)
    html = _OPTION.sub(r'<span class="option">\g<0></span>', html)
    return _ERROR.sub("language-text sentence", html)


def _breakable(name: re.Match[str]) -> str:
    return re.sub(r"([_./,=:-])(?=\w)", r"\1<wbr>", name[0])


def _file(name: str) -> str:
    """Return a Markdown file of the repository with its links rewritten to pages.

    A link to a file that has no page becomes plain text.
    """
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    return _LINK.sub(lambda match: _page_link(match[1], match[2], path), text)


def _page_link(text: str, link: str, path: Path) -> str:
    target, _, anchor = link.partition("#")
    file = (path.parent / target).resolve().relative_to(ROOT).as_posix()
    if file.startswith("docs/") and file.endswith(".md"):
        page = file.removeprefix("docs/")
    elif file in _PAGES:
        page = _PAGES[file]
    else:
        return text
    return f"[{text}]({page}{'#' + anchor if anchor else ''})"


def _drawing(name: str) -> str:
    """Return an SVG as inline markup, so that it inherits the page's colours.

    Its style sheet has the colours of a file shown alone, as on GitHub, and is left out.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\s*\n\s*", " ", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))


def _changelogs() -> str:
    changelogs = []
    for path in sorted(ROOT.glob("packages/*/CHANGELOG.md")):
        text = path.read_text(encoding="utf-8").replace("# Changelog of ", "# ", 1)
        changelogs.append(re.sub(r"^#", "##", text, flags=re.MULTILINE))
    return "\n".join(changelogs)


_FILLS: dict[str, Callable[..., str]] = {
    "file": _file,
    "svg": _drawing,
    "module": "::: {}".format,
    "changelogs": _changelogs,
    "training-config": training_reference,
    "model-keys": model_reference,
}
