"""Each package is drawn from its imports as rooms (its folders and modules) and arrows; no arrow closes a circle."""

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
    """Yield what a module imports of a package, imports for type checkers included, without the package's name."""
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
    """Return each room of a package, and the rooms that it imports; what stands in ``__init__`` is no room."""
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
            arrows[room] |= {
                name.split(".")[0] for name in imports(path, dotted(package))
            } & names - {room}
    return arrows


def dotted(folder: Path) -> str:
    """Return the name by which a folder of a package is imported."""
    parts = folder.parts
    return ".".join(parts[parts.index("src") + 1 :]) if "src" in parts else folder.name


@pytest.mark.parametrize("folder", FOLDERS, ids=dotted)
def test_no_circle_and_no_arrow_up(folder):
    """Where there is no circle, floors can be counted so that every arrow points down."""
    try:
        list(TopologicalSorter(rooms(folder)).static_order())
    except CycleError as error:
        pytest.fail(f"{dotted(folder)} has a circle: {' -> '.join(error.args[1])}")


def test_the_trainer_fits_on_one_page():
    drawn = rooms(next(path for path in PACKAGES if path.name == "tokenyard_train"))
    assert len(drawn) <= MOST_ROOMS, sorted(drawn)


def test_a_circle_is_seen(tmp_path):
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
    with pytest.raises(
        pytest.fail.Exception, match=r"house has a circle: (hall -> attic|attic -> hall)"
    ):
        test_no_circle_and_no_arrow_up(package)
