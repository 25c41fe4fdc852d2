"""Every recipe passes `tokenyard check` over its GPUs; the page has the memory that it prints."""

import io
import re

import pytest
from blocks import ROOT
from rich.console import Console

from tokenyard import default_registry
from tokenyard_train.commands.check import check, maybe_fake_world
from tokenyard_train.config import load_config

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\S+\.yaml)` \| (\d+) \| ([\d,]+) \| ([\d.]+) \|", PAGE, re.MULTILINE)


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    """Choose backends as for GPUs, although the tests run Triton's interpreter on a CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    default_registry.cache_clear()
    yield
    default_registry.cache_clear()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of some samples, which is read faster than Python's library."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Recipes are checked on any text. " * 2000)
    return path


def test_the_page_has_every_recipe():
    assert {name for name, *_ in ROWS} == {path.name for path in RECIPES}
    assert all(f"{gpus}gpu" in name for name, gpus, *_ in ROWS)


@pytest.mark.parametrize(("name", "gpus", "tokens", "memory"), ROWS, ids=[row[0] for row in ROWS])
def test_a_recipe_passes_check(name, gpus, tokens, memory, text):
    printed = io.StringIO()
    data = f"train_loader={{name: text, dataset: {{path: {text}}}}}"
    with maybe_fake_world(int(gpus) if gpus != "1" else None):
        path = ROOT / "examples" / "recipes" / name
        config = load_config(path, [data, "device=cuda"], planned=True)
        check(config, Console(file=printed, width=120))
    assert f" {tokens} tokens:" in printed.getvalue()
    assert re.search(rf"sum +{re.escape(memory)} GiB", printed.getvalue())
