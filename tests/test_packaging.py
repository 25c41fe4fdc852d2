"""Each package declares its requirements, builds and installs without the others."""

import json
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
PIP_WHEEL = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]

# Imports torch once. Forks a process per package, hides the libraries that are not requirements
# of the package, and imports all its modules. Writes the traceback of an error into a file.
IMPORT_ALL = """
import importlib, json, os, pkgutil, sys, traceback
from pathlib import Path
import torch

class Without:
    # a finder that hides some libraries

    def __init__(self, finder, blocked):
        self.finder = finder
        self.blocked = blocked

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            return None
        return self.finder.find_spec(name, path, target)

def import_all(package, blocked):
    for name in list(sys.modules):
        if name.split(".")[0] in blocked:
            del sys.modules[name]
    sys.meta_path[:] = [Without(finder, blocked) for finder in sys.meta_path]
    path = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages(path, package + "."):
        if not module.name.endswith("__main__") and ".testing" not in module.name:
            importlib.import_module(module.name)

for package, blocked in json.load(sys.stdin).items():
    process = os.fork()
    if process == 0:
        error = ""
        try:
            import_all(package, set(blocked))
        except BaseException:
            error = traceback.format_exc()
        Path(sys.argv[1], package).write_text(error)
        os._exit(0)
    os.waitpid(process, 0)
"""


def project(path: Path) -> dict:
    return tomllib.loads((path / "pyproject.toml").read_text())["project"]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(name: str) -> list[str]:
    """Return the requirements of a distribution.

    For a package of this repository, read its pyproject.toml: an installed copy may be older.
    """
    folder = ROOT / "packages" / name.removeprefix("tokenyard-")
    if folder in PACKAGES:
        return project(folder)["dependencies"]
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # unused on this platform
        return []


def closure(name: str, extra: str = "") -> set[str]:
    """Return a distribution and its transitive requirements."""
    names = set()
    pending = [normalized(name)]
    while pending:
        current = pending.pop()
        if current in names:
            continue
        names.add(current)
        needed = (Requirement(text) for text in requirements(current))
        pending += [
            normalized(r.name)
            for r in needed
            if r.marker is None or r.marker.evaluate({"extra": extra})
        ]
    return names


def undeclared(path: Path) -> list[str]:
    """Return the installed modules that a package may not import."""
    allowed = closure(project(path)["name"])
    owners = metadata.packages_distributions()
    return [
        module
        for module, names in owners.items()
        if not {normalized(name) for name in names} & allowed
    ]


@pytest.fixture(scope="module")
def import_errors(tmp_path_factory):
    """A folder with a file per package: the traceback of its imports, empty for success."""
    folder = tmp_path_factory.mktemp("errors")
    blocked = {IMPORT[path.name]: undeclared(path) for path in PACKAGES}
    # Triton's interpreter needs numpy. Users compile kernels and do not need it.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", IMPORT_ALL, str(folder)]
    text = json.dumps(blocked)
    subprocess.run(command, check=True, timeout=300, env=environment, input=text, text=True)
    return folder


@pytest.mark.parametrize("package", sorted(IMPORT.values()))
def test_every_module_imports_with_the_declared_requirements_alone(import_errors, package):
    assert (import_errors / package).read_text() == ""


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
    """Return the extra that installs the package of a folder."""
    return name.removeprefix("kernels-")


def ours(name: str) -> set[str]:
    """Return a package of ours and the packages of ours that it requires, except core."""
    needs = {Requirement(text).name for text in project(ROOT / "packages" / name)["dependencies"]}
    packages = {need for need in needs if need.startswith("tokenyard-")}
    return {f"tokenyard-{name}"} | packages - {"tokenyard-core"}


def test_one_extra_for_each_package_and_one_for_all():
    """An extra lists all its packages of ours, because no index has them for a clone."""
    extras = project(ROOT)["optional-dependencies"]
    declared = {extra: {text.split("{")[0] for text in texts} for extra, texts in extras.items()}
    others = {path.name for path in PACKAGES} - {"core"}
    want = {extra(name): ours(name) for name in others}
    assert declared == want | {"all": {f"tokenyard-{name}" for name in others}}


def test_each_backend_and_command_is_mapped_to_its_extra():
    """The root maps backends. Core maps commands: it may be installed without the root."""
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
    commands = {name: extra for name, extra in provided.items() if name.startswith("command.")}
    assert project(ROOT / "packages" / "core")["entry-points"][GROUP] == commands
    assert project(ROOT)["entry-points"][GROUP] == {
        name: extra for name, extra in provided.items() if name not in commands
    }


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.name)
def test_package_is_complete(path):
    declared = project(path)
    assert (path / "README.md").read_text().startswith(f"# {declared['name']}\n")
    assert (path / "CHANGELOG.md").exists()
    assert (path / "src" / IMPORT[path.name] / "py.typed").exists()
    about = (path / "src" / IMPORT[path.name] / "__about__.py").read_text()
    version = re.search(r'__version__ = "(.+)"', about)[1]
    headings = re.findall(r"^## (.+)$", (path / "CHANGELOG.md").read_text(), re.M)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert released[0] == version


def test_wheels_have_types_a_licence_and_no_tests(tmp_path):
    environment = os.environ | {"TOKENYARD_PIN": ">=0.1"}
    command = [*PIP_WHEEL, "--wheel-dir", str(tmp_path), str(ROOT), *map(str, PACKAGES)]
    subprocess.run(command, check=True, timeout=300, env=environment)
    wheels = {wheel.name.split("-")[0]: wheel for wheel in tmp_path.glob("*.whl")}
    names = {path: f"tokenyard_{path.name.replace('-', '_')}" for path in PACKAGES}
    assert set(wheels) == {"tokenyard", *names.values()}
    for path in PACKAGES:
        paths = [str(wheels[names[path]])]
        (wheel,) = metadata.Distribution.discover(name=f"tokenyard-{path.name}", path=paths)
        files = {str(file) for file in wheel.files}
        assert f"{IMPORT[path.name]}/py.typed" in files
        assert [file for file in files if file.endswith("/LICENSE")]
        assert not [file for file in files if "test_" in file]


@pytest.mark.full
def test_each_extra_installs_alone_into_a_bare_environment(tmp_path):
    """An extra installs its own packages and no others. Slow: each environment installs torch."""
    environment = os.environ | {"PIP_CONSTRAINT": (ROOT / "constraints.txt").as_uri()}
    for name in (path.name for path in PACKAGES if path.name != "core"):
        home = tmp_path / name
        venv.create(home, with_pip=True)
        python = str(home / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", f"tokenyard[{name}] @ {ROOT.as_uri()}"]
        subprocess.run(pip, check=True, timeout=900, env=environment)
        freeze = [python, "-m", "pip", "list", "--format=freeze"]
        listed = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
        names = {line.split("==")[0] for line in listed.splitlines()}
        installed = {name for name in names if name.startswith("tokenyard")}
        want = {n for n in closure(f"tokenyard-{name}") if n.startswith("tokenyard")}
        assert installed == want | {"tokenyard"}
        subprocess.run([python, "-c", f"import {IMPORT[name]}"], check=True, timeout=120)
