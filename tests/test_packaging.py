"""Each package declares what it needs, brings nothing else, and builds and installs alone."""

import os
import re
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tokenyard import default_registry
from tokenyard.backend import KINDS
from tokenyard.registry._extras import GROUP
from tokenyard_cli.commands import GROUP as COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
IMPORT = {
    path.name: min(p.name for p in (path / "src").iterdir() if p.is_dir()) for path in PACKAGES
}
BUILD = [
    sys.executable,
    "-m",
    "pip",
    "wheel",
    "--quiet",
    "--no-deps",
    "--no-build-isolation",
    "--wheel-dir",
]

BLOCK = """
import importlib, pkgutil, sys

class Without:
    # a finder to which some libraries are not installed

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for module in pkgutil.walk_packages(importlib.import_module({package!r}).__path__, {package!r} + "."):
    if not module.name.endswith("__main__") and ".testing" not in module.name:
        importlib.import_module(module.name)
"""


def project(path: Path) -> dict:
    return tomllib.loads((path / "pyproject.toml").read_text())["project"]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(name: str) -> list[str]:
    """Return what a distribution requires; of a package here by its file, since an installed copy may be older."""
    folder = ROOT / "packages" / name.removeprefix("tokenyard-")
    if folder in PACKAGES:
        return project(folder)["dependencies"]
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # not needed on this platform
        return []


def closure(name: str, extra: str = "") -> set[str]:
    """Return a distribution and all that its requirements bring."""
    found, todo = set(), [normalized(name)]
    while todo:
        current = todo.pop()
        if current in found:
            continue
        found.add(current)
        wanted = (Requirement(text) for text in requirements(current))
        todo += [
            normalized(r.name)
            for r in wanted
            if r.marker is None or r.marker.evaluate({"extra": extra})
        ]
    return found


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.name)
def test_every_module_imports_with_the_declared_requirements_alone(path):
    allowed = closure(project(path)["name"])
    owners = metadata.packages_distributions()
    blocked = {
        module
        for module, names in owners.items()
        if not {normalized(name) for name in names} & allowed
    }
    code = BLOCK.format(blocked=blocked, package=IMPORT[path.name])
    compiled = os.environ | {
        "TRITON_INTERPRET": "0"
    }  # Triton's interpreter needs numpy, which no user does
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=compiled)


def test_core_needs_five_libraries():
    needs = {Requirement(text).name for text in project(ROOT / "packages" / "core")["dependencies"]}
    assert needs == {"torch", "pluggy", "packaging", "typer", "rich"}


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.name)
def test_no_upper_bound_on_others(path):
    for text in project(path)["dependencies"]:
        requirement = Requirement(text)
        if not requirement.name.startswith("tokenyard"):
            assert {s.operator for s in requirement.specifier} <= {">="}, text


def extra(name: str) -> str:
    """Return the extra that brings the package of a folder."""
    return name.removeprefix("kernels-")


def ours(name: str) -> set[str]:
    """Return a package of ours, and those of ours that it requires besides core."""
    needs = {Requirement(text).name for text in project(ROOT / "packages" / name)["dependencies"]}
    return {f"tokenyard-{name}"} | {need for need in needs if need.startswith("tokenyard-")} - {
        "tokenyard-core"
    }


def test_one_extra_for_each_package_and_one_for_all():
    """From a clone, no index has our packages: an extra names every one that it needs."""
    extras = project(ROOT)["optional-dependencies"]
    named = {extra: {text.split("{")[0] for text in texts} for extra, texts in extras.items()}
    others = {path.name for path in PACKAGES} - {"core"}
    assert named == {extra(name): ours(name) for name in others} | {
        "all": {f"tokenyard-{name}" for name in others}
    }


def test_the_root_says_which_extra_provides_a_backend():
    """Every backend and command of the other packages, and no other; core names none of them."""
    offers = [offer for kind in KINDS for offer in default_registry().offers(kind)]
    owners = {f"{o.kind}.{o.backend.name}": o.distribution for o in offers}
    for path in PACKAGES:
        for name in project(path)["entry-points"].get(COMMANDS, {}):
            owners[f"command.{name}"] = f"tokenyard-{path.name}"
    provided = {
        name: extra(owner.removeprefix("tokenyard-"))
        for name, owner in owners.items()
        if owner.startswith("tokenyard-") and owner != "tokenyard-core"
    }
    assert project(ROOT)["entry-points"][GROUP] == provided


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.name)
def test_package_is_complete(path):
    declared = project(path)
    assert (path / "README.md").read_text().startswith(f"# {declared['name']}\n")
    assert (path / "CHANGELOG.md").exists()
    assert (path / "src" / IMPORT[path.name] / "py.typed").exists()
    version = re.search(
        r'__version__ = "(.+)"', (path / "src" / IMPORT[path.name] / "__about__.py").read_text()
    )[1]
    headings = re.findall(r"^## (.+)$", (path / "CHANGELOG.md").read_text(), re.M)
    assert headings[headings[0] == "Unreleased"] == version  # the newest that was released


def test_wheels_build_and_hold_what_they_should(tmp_path):
    environment = os.environ | {"TOKENYARD_PIN": ">=0.1"}
    subprocess.run(
        [*BUILD, str(tmp_path), str(ROOT), *map(str, PACKAGES)],
        check=True,
        timeout=300,
        env=environment,
    )
    wheels = {wheel.name.split("-")[0]: wheel for wheel in tmp_path.glob("*.whl")}
    assert set(wheels) == {
        "tokenyard",
        *(f"tokenyard_{path.name.replace('-', '_')}" for path in PACKAGES),
    }
    for path in PACKAGES:
        wheel = wheels[f"tokenyard_{path.name.replace('-', '_')}"]
        (found,) = metadata.Distribution.discover(name=f"tokenyard-{path.name}", path=[str(wheel)])
        files = {str(file) for file in found.files}
        assert f"{IMPORT[path.name]}/py.typed" in files
        assert [file for file in files if file.endswith("/LICENSE")]
        assert not [file for file in files if "test_" in file]


@pytest.mark.full
def test_each_extra_installs_alone_into_a_bare_environment(tmp_path):
    """Slow: every environment gets its own torch. What an extra does not name must not come."""
    environment = os.environ | {"PIP_CONSTRAINT": (ROOT / "constraints.txt").as_uri()}
    for name in (path.name for path in PACKAGES if path.name != "core"):
        home = tmp_path / name
        venv.create(home, with_pip=True)
        python = str(home / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", f"tokenyard[{name}] @ {ROOT.as_uri()}"]
        subprocess.run(pip, check=True, timeout=900, env=environment)
        listed = subprocess.run(
            [python, "-m", "pip", "list", "--format=freeze"],
            check=True,
            capture_output=True,
            text=True,
        )
        ours = {
            line.split("==")[0]
            for line in listed.stdout.splitlines()
            if line.startswith("tokenyard")
        }
        assert ours == {n for n in closure(f"tokenyard-{name}") if n.startswith("tokenyard")} | {
            "tokenyard"
        }
        subprocess.run([python, "-c", f"import {IMPORT[name]}"], check=True, timeout=120)
