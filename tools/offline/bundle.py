"""Collect wheels and tests in one folder, for a GPU machine without a network; see the README beside this."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TEST_NEEDS = ("pytest", "pytest-timeout", "hypothesis", "expecttest")
THEIRS = frozenset(("torch", "triton", "setuptools", "pip"))  # what a GPU machine brings itself


def main() -> None:
    """Build and fetch wheels, and copy what runs there."""
    options = _options()
    folder = options.out
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    members = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
    _pip("wheel", "--no-deps", "-w", str(wheels), *map(str, members))
    own = [wheel.name.split("-")[0].replace("_", "-") for wheel in wheels.iterdir()]
    left_out = THEIRS | {canonicalize_name(name) for name in options.without}
    needed = needs([*own, *TEST_NEEDS, *options.also], left_out | set(own), options.python)
    _fetch(needed, wheels, options)
    _copy(folder)
    size = sum(wheel.stat().st_size for wheel in wheels.iterdir()) / 2**20
    print(
        f"{folder}: {len(list(wheels.iterdir()))} wheels, {size:.0f} MiB; there: python3 {folder.name}/run.py"
    )


def needs(names: Iterable[str], left_out: set[str] | frozenset[str], python: str) -> dict[str, str]:
    """Return name -> version of what these distributions need, all the way down, as it is installed here."""
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    found: dict[str, str] = {}
    waiting = [Requirement(name) for name in names]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            sys.exit(
                f"error: {name} is not installed here, and the bundle needs it; run this by `hatch run bundle`"
            )
        if name not in left_out:
            found[name] = dist.version
        elif name in THEIRS:
            continue
        below = [Requirement(text) for text in dist.requires or []]
        waiting += [r for r in below if _applies(r, environment, extras)]
    return found


def _applies(requirement: Requirement, environment: dict[str, str], extras: frozenset[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(
        requirement.marker.evaluate(environment | {"extra": extra}) for extra in ("", *extras)
    )


def _fetch(needed: dict[str, str], wheels: Path, options: argparse.Namespace) -> None:
    if not needed:
        return
    pinned = [f"{name}=={version}" for name, version in sorted(needed.items())]
    target = ["--python-version", options.python, "--implementation", "cp", "--only-binary=:all:"]
    for platform in options.platform:
        target += ["--platform", platform]
    _pip("download", "--no-deps", "-d", str(wheels), *target, *pinned)


def _copy(folder: Path) -> None:
    shutil.copy(Path(__file__).with_name("run.py"), folder)
    shutil.copy(ROOT / "pyproject.toml", folder)  # pytest's settings
    unwanted = shutil.ignore_patterns("__pycache__", "docs")  # the tests of pages need the pages
    for name in ("tests", "examples", "packages"):  # some tests read the sources
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: pip {arguments[0]} failed; its message stands above")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--python",
        default=f"3.{sys.version_info.minor}",
        help="the GPU machine's Python, such as 3.12",
    )
    platforms = ["manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64"]
    parser.add_argument(
        "--platform", nargs="+", default=platforms, help="the tags its wheels may have"
    )
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="NAME", help="what the GPU machine has already"
    )
    parser.add_argument(
        "--also",
        nargs="*",
        default=[],
        metavar="NAME",
        help="what to carry besides, such as transformers",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "offline")
    return parser.parse_args()


if __name__ == "__main__":
    main()
