"""Imports between packages: only core is imported by others, and core imports little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"
CORE = "tokenyard"
OURS = {
    folder.name: min(p.name for p in (folder / "src").iterdir() if p.is_dir())
    for folder in PACKAGES.iterdir()
    if (folder / "src").is_dir()
}
FREE = {"train"}  # may import any of ours


def imports(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = ast.walk(ast.parse(path.read_text()))
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("folder", sorted(set(OURS) - FREE))
def test_packages_import_core_and_never_each_other(folder):
    others = set(OURS.values()) - {OURS[folder], CORE}
    breaches = {
        path.name: imports(path) & others for path in (PACKAGES / folder / "src").rglob("*.py")
    }
    assert not {name: modules for name, modules in breaches.items() if modules}


@pytest.mark.parametrize(
    ("package", "libraries"),
    [
        (CORE, {"torch", "pluggy", "packaging", "pytest"}),  # pytest: the kit only
        ("tokenyard_cli", {CORE, "typer", "rich", "matplotlib"}),  # matplotlib: figures only
    ],
)
def test_core_imports_only_what_it_declares(package, libraries):
    allowed = set(sys.stdlib_module_names) | {package} | libraries
    undeclared = {
        path.name: imports(path) - allowed
        for path in (PACKAGES / "core" / "src" / package).rglob("*.py")
    }
    assert not {name: modules for name, modules in undeclared.items() if modules}


def test_only_the_kit_imports_pytest():
    kit = PACKAGES / "core" / "src" / CORE / "testing"
    users = {
        path
        for path in (PACKAGES / "core" / "src" / CORE).rglob("*.py")
        if "pytest" in imports(path)
    }
    assert all(path.is_relative_to(kit) for path in users)


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_core_and_building_a_layer_loads_neither_triton_nor_another_package():
    others = ", ".join(repr(name) for name in {*OURS.values(), "triton", "pydantic"} - {CORE})
    run(
        "import sys, tokenyard\n"
        f"loaded = {{{others}}} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )


def test_the_pytest_plugin_does_not_import_torch():
    run(
        "import sys; from importlib.metadata import entry_points\n"
        "entry_points(group='pytest11', name='tokenyard')['tokenyard'].load()\n"
        "assert 'torch' not in sys.modules"
    )
