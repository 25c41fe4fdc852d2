"""The site builds without a warning, and has all that it should."""

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")

import config_reference

import tokenyard
import tokenyard_models
from tokenyard import hookspecs, testing
from tokenyard_train.config.schema import TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "built"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr, built.stderr
    return folder


def documented(site):
    """Return every name that the reference has, as other sites could link to it."""
    lines = (site / "objects.inv").read_bytes().split(b"\n", 4)
    return {line.split(" ")[0] for line in zlib.decompress(lines[4]).decode().splitlines()}


@pytest.mark.parametrize("module", [tokenyard, tokenyard_models, testing], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(site, module):
    names = {f"{module.__name__}.{name}" for name in module.__all__ if not name.startswith("__")}
    assert names <= documented(site)


def test_every_hook_is_in_the_reference(site):
    hooks = {f"tokenyard.hookspecs.{name}" for name in vars(hookspecs) if name.startswith("tokenyard_")}
    assert hooks
    assert hooks <= documented(site)


def test_every_key_is_in_the_reference(site):
    page = (site / "configuration" / "index.html").read_text()
    for key in config_reference.keys(TrainConfig, ""):
        assert f"<code>{key.rpartition('.')[2]}</code>" in page, key


def test_no_page_loads_anything_from_elsewhere(site):
    """A reader without a network sees it whole."""
    for page in site.rglob("*.html"):
        assert not re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css)"', page.read_text()), page
