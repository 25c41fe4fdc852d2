"""Collect wheels and tests in one folder, for a GPU machine without a network.

See README.md in this folder.
"""

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
PREINSTALLED = frozenset(("torch", "triton", "setuptools", "pip"))  # on the GPU machine


def main() -> None:
    """Build and fetch wheels, and copy the tests and the script that runs them."""
    options = _options()
    folder = options.out
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    members = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
    _pip("wheel", "--no-deps", "-w", str(wheels), *map(str, members))
    members = [wheel.name.split("-")[0].replace("_", "-") for wheel in wheels.iterdir()]
    excluded = PREINSTALLED | {canonicalize_name(name) for name in options.without} | set(members)
    _fetch(needs([*members, *TEST_NEEDS, *options.also], excluded, options.python), wheels, options)
    _copy(folder)
    sizes = [wheel.stat().st_size for wheel in wheels.iterdir()]
    print(
        f"{folder}: {len(sizes)} wheels, {sum(sizes) / 2**20:.0f} MiB; "
        f"on the GPU machine: python3 {folder.name}/run.py"
    )


def needs(names: Iterable[str], excluded: set[str] | frozenset[str], python: str) -> dict[str, str]:
    """Return name -> installed version of the transitive requirements of some distributions.

    The names in `excluded` are not returned. The requirements of an excluded name are, unless the
    name is in `PREINSTALLED`. Exits with an error if a requirement is not installed.
    """
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    versions: dict[str, str] = {}
    pending = [Requirement(name) for name in names]
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        extras = frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            sys.exit(
                f"error: {name} is not installed here, and the bundle needs it; "
                "run this by `hatch run bundle`"
            )
        if name not in excluded:
            versions[name] = dist.version
        elif name in PREINSTALLED:
            continue
        requirements = [Requirement(text) for text in dist.requires or []]
        pending += [r for r in requirements if _applies(r, environment, extras)]
    return versions


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
    # The tests of the pages need the pages, which the bundle lacks. Some tests read the sources.
    ignore = shutil.ignore_patterns("__pycache__", "docs")
    for name in ("tests", "examples", "packages"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: pip {arguments[0]} failed; see its message above")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--python",
        default=f"3.{sys.version_info.minor}",
        help="Python version of the GPU machine, such as 3.12",
    )
    platforms = ["manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64"]
    parser.add_argument(
        "--platform",
        nargs="+",
        default=platforms,
        help="platform tags of wheels that the GPU machine accepts",
    )
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        metavar="NAME",
        help="distributions that the GPU machine already has",
    )
    parser.add_argument(
        "--also",
        nargs="*",
        default=[],
        metavar="NAME",
        help="distributions to add, such as transformers",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dist" / "offline", help="output folder; replaced"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
