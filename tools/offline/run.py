"""Install the wheels beside this into a folder, run GPU tests and benchmarks, and print a short table.

Nothing is fetched: run it with the Python that has torch, on the machine with the GPU. Only the standard library is
needed to begin with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
SITE = HERE / "site"


def main() -> int:
    """Install, test, measure, tell; return the tests' exit status, or the benchmark's if those passed."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    _install()
    rows: list[tuple[str, str]] = []
    tests = _tests(options, rows) if options.tests else 0
    bench = _bench(options, rows) if options.bench else 0
    width = max(len(name) for name, _ in rows) if rows else 0
    print("\n".join(f"{name.ljust(width)}  {told}" for name, told in rows))
    return tests or bench


def _install() -> None:
    """Install our wheels, and of the others those that this Python lacks or has older."""
    ours, others = [], []
    for wheel in sorted((HERE / "wheels").glob("*.whl")):
        name = wheel.name.split("-")[0].replace("_", "-")
        (ours if name.startswith("tokenyard") else others).append((name, wheel))
    missing = [
        wheel for name, wheel in others if _installed(name) < _numbers(wheel.name.split("-")[1])
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--upgrade",
        "--target",
        str(SITE),
    ]
    wheels = [str(wheel) for wheel in [*missing, *(wheel for _, wheel in ours)]]
    subprocess.run(
        [*command, "--disable-pip-version-check", "--no-warn-conflicts", *wheels], check=True
    )
    print(
        f"installed {len(wheels)} wheels into {SITE}; {len(others) - len(missing)} were there already",
        flush=True,
    )


def _installed(name: str) -> tuple[int, ...]:
    try:
        return _numbers(version(name))
    except PackageNotFoundError:
        return ()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _tests(options: argparse.Namespace, rows: list[tuple[str, str]]) -> int:
    arguments = ["tests", "-q", "-p", "no:cacheprovider", *shlex.split(options.tests)]
    status, log, seconds = _logged("pytest", ["-m", "pytest", *arguments], options.out)
    summary = re.findall(r"^=*\s*(\d+ \w+.*?|no tests ran.*?)\s*=*$", log, re.M)
    rows.append(
        (
            "pytest " + options.tests,
            f"{summary[-1] if summary else 'no summary'} (exit {status}, {seconds:.0f} s)",
        )
    )
    rows += [("", line) for line in re.findall(r"^(?:FAILED|ERROR) .*", log, re.M)[:20]]
    return status


def _bench(options: argparse.Namespace, rows: list[tuple[str, str]]) -> int:
    command = ["-m", "tokenyard_bench", "layer", "--out", str(options.out)]
    arguments = [*command, *shlex.split(options.bench)]
    status, _, seconds = _logged("bench", arguments, options.out)
    rows.append(("bench layer " + options.bench, f"exit {status}, {seconds:.0f} s"))
    results = options.out / "layer.json"
    if status or not results.exists():
        return status
    for record in json.loads(results.read_text())["records"]:
        case = f"{record['shape']['name']} {record['dtype']} {record['routing']} {record['contestant']}"
        rows.append(
            (
                case,
                record["note"]
                or f"{record['step_ms']['median']:.3f} ms, efficiency {record['efficiency']:.3f}",
            )
        )
    return status


def _logged(name: str, arguments: list[str], out: Path) -> tuple[int, str, float]:
    """Run this Python on arguments; what it prints goes into ``out/name.log`` and is returned."""
    began = time.monotonic()
    path = out / f"{name}.log"
    environment = os.environ | {"PYTHONPATH": str(SITE)}
    with path.open("w", encoding="utf-8") as log:
        command = [sys.executable, *arguments]
        status = subprocess.run(
            command, cwd=HERE, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    return (
        status.returncode,
        path.read_text(encoding="utf-8", errors="replace"),
        time.monotonic() - began,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"), help="for logs, JSON and plot")
    parser.add_argument("--tests", default="-m gpu", help="options for pytest; empty: no tests")
    parser.add_argument(
        "--bench", default="--shape all", help="options for tokenyard bench layer; empty: none"
    )
    options = parser.parse_args()
    options.out = options.out.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
