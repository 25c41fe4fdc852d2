"""The menu has every page, under the title that the page has."""

import re

import pytest
from blocks import ROOT

pytest.importorskip("mkdocs")

from mkdocs.config import load_config

DOCS = ROOT / "docs"


def entries(nav):
    """Yield (title, file) of each page of a menu."""
    for item in nav:
        for title, content in item.items():
            if isinstance(content, str):
                yield title, content
            else:
                yield from entries(content)


MENU = dict(entries(load_config(str(ROOT / "mkdocs.yml")).nav))


def heading(path):
    """Return the first heading of a page, or of the file that it shows."""
    text = path.read_text(encoding="utf-8")
    shown = re.match(r"<!-- fill: file (\S+) -->", text)
    if shown:
        text = (ROOT / shown[1]).read_text(encoding="utf-8")
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1]


def test_every_page_is_in_the_menu():
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} == {*MENU.values()}


@pytest.mark.parametrize("title", [title for title in MENU if title != "Home"])
def test_a_page_has_the_title_of_the_menu(title):
    assert heading(DOCS / MENU[title]) == title
