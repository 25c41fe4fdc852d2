"""The import graph of every package has no cycle.

A room is a folder or module at the top level of a package. An arrow is an import of one room by
another.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path for path in ROOT.glob("packages/*/src/*") if path.is_dir())
FOLDERS = sorted(path.parent for package in PACKAGES for path in package.rglob("__init__.py"))
MOST_ROOMS = 16


def imports(path: Path, package: str) -> Iterator[str]:
    """Yield the names that a module imports from a package, relative to the package.

    Imports under `TYPE_CHECKING` count too.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (
            name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}.")
        )


def rooms(package: Path) -> dict[str, set[str]]:
    """Return room -> imported rooms of a package; ``__init__`` is no room."""
    names = {
        path.stem
        for path in package.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    names -= {"__init__", "__main__", "__about__"}
    arrows: dict[str, set[str]] = {name: set() for name in names}
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room in names:
            imported = {name.split(".")[0] for name in imports(path, dotted(package))}
            arrows[room] |= imported & names - {room}
    return arrows


def dotted(folder: Path) -> str:
    """Return the import name of a folder of a package."""
    parts = folder.parts
    return ".".join(parts[parts.index("src") + 1 :]) if "src" in parts else folder.name


@pytest.mark.parametrize("folder", FOLDERS, ids=dotted)
def test_imports_have_no_cycle(folder):
    """Without a cycle, the rooms have an order in which every arrow points down."""
    try:
        list(TopologicalSorter(rooms(folder)).static_order())
    except CycleError as error:
        pytest.fail(f"{dotted(folder)} has a cycle: {' -> '.join(error.args[1])}")


def test_the_trainer_has_few_rooms():
    names = rooms(next(path for path in PACKAGES if path.name == "tokenyard_train"))
    assert len(names) <= MOST_ROOMS, sorted(names)


def test_a_cycle_is_found(tmp_path):
    package = tmp_path / "house"
    texts = {
        "hall": "from house.attic import bed",
        "attic": "from house.hall import door",
        "shed": "",
    }
    for name, text in texts.items():
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text(text)
    assert rooms(package) == {"hall": {"attic"}, "attic": {"hall"}, "shed": set()}
    sentence = r"house has a cycle: (hall -> attic|attic -> hall)"
    with pytest.raises(pytest.fail.Exception, match=sentence):
        test_imports_have_no_cycle(package)
