"""The site builds without a warning and documents every name, hook and key."""

import dataclasses
import re
import tomllib
import zlib

import pytest

pytest.importorskip("mkdocs")

import config_reference
from blocks import ROOT

import tokenyard
import tokenyard_models
from tokenyard import hookspecs, testing
from tokenyard_models.ffn_config import FfnConfig
from tokenyard_train.config.schema import TrainConfig


def documented(site):
    """Return every name in the inventory of the reference (objects.inv)."""
    lines = (site / "objects.inv").read_bytes().split(b"\n", 4)
    return {line.split(" ")[0] for line in zlib.decompress(lines[4]).decode().splitlines()}


@pytest.mark.parametrize(
    "module", [tokenyard, tokenyard_models, testing], ids=lambda module: module.__name__
)
def test_every_public_name_is_in_the_reference(site, module):
    names = {f"{module.__name__}.{name}" for name in module.__all__ if not name.startswith("__")}
    assert names <= documented(site)


def test_the_fields_of_types_are_in_the_reference_with_their_comments(site):
    types = ("Routing", "Plan", "ExpertWeights", "Balance", "Output", "Workload", "RoutingRule")
    fields = {
        f"tokenyard.{name}.{field}" for name in types for field in _fields(getattr(tokenyard, name))
    }
    assert fields <= documented(site)
    page = (site / "reference" / "core" / "index.html").read_text()
    assert "<code>[E + 1]</code> int32" in page


def _fields(cls):
    """Return the names of the fields of a NamedTuple or a dataclass."""
    return getattr(cls, "_fields", None) or [field.name for field in dataclasses.fields(cls)]


def test_every_hook_is_in_the_reference(site):
    hooks = {
        f"tokenyard.hookspecs.{name}" for name in vars(hookspecs) if name.startswith("tokenyard_")
    }
    assert hooks
    assert hooks <= documented(site)


def keys_page(site):
    """Return the page of keys, without the places where a phone may break them."""
    return (site / "configuration" / "index.html").read_text().replace("<wbr>", "")


def test_every_key_is_in_the_reference(site):
    page = keys_page(site)
    for key in config_reference.keys(TrainConfig, ""):
        assert f"<code>{key.rpartition('.')[2]}</code>" in page, key


def test_the_header_has_version_and_licence(site):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    release = f"v{project['version']} · {project['license']}"
    for page in site.rglob("index.html"):
        assert release in page.read_text(), page


def test_social_cards_show_a_picture(site):
    page = (site / "quickstart" / "index.html").read_text()
    image = re.search(r'property="og:image" content="([^"]+)"', page)[1]
    assert (site / "quickstart" / image).resolve().is_file()


def test_patterns_in_the_reference_keep_their_asterisks(site):
    page = keys_page(site)
    for pattern in ("blocks.*.ffn.experts.*", "attention.*", "*norm*"):
        assert f"<code>{pattern}</code>" in page, pattern


def test_every_key_has_a_meaning():
    """A key has a comment in its field statement. A section has a docstring."""
    for section in (TrainConfig, FfnConfig):
        for name, meaning in config_reference.meanings(section):
            assert meaning, f"{name} has no comment in {section.__module__}"


def test_no_page_loads_anything_from_elsewhere(site):
    """The site works without a network."""
    for page in site.rglob("*.html"):
        assert not re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css)"', page.read_text()), page
