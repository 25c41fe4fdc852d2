"""Install the bundle's wheels into a folder, run GPU tests and benchmarks, and print a table.

Run it on the machine with the GPU, with the Python that has torch. It downloads nothing and
imports only the standard library.
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
from typing import Any

HERE = Path(__file__).resolve().parent
SITE = HERE / "site"


def main() -> int:
    """Install, test and measure.

    Return the exit status of the tests, or of the benchmark if the tests passed.
    """
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    _install()
    rows: list[tuple[str, str]] = []
    tests = _tests(options, rows) if options.tests else 0
    bench = _bench(options, rows) if options.bench else 0
    width = max(len(name) for name, _ in rows) if rows else 0
    print("\n".join(f"{name.ljust(width)}  {result}" for name, result in rows))
    return tests or bench


def _install() -> None:
    """Install our wheels, and the wheels that this Python lacks or has in an older version."""
    ours = []
    others = []
    for wheel in sorted((HERE / "wheels").glob("*.whl")):
        name = wheel.name.split("-")[0].replace("_", "-")
        (ours if name.startswith("tokenyard") else others).append((name, wheel))
    missing = [
        wheel for name, wheel in others if _installed(name) < _numbers(wheel.name.split("-")[1])
    ]
    wheels = [str(wheel) for wheel in [*missing, *(wheel for _, wheel in ours)]]
    options = shlex.split(
        "--quiet --no-index --no-deps --upgrade --disable-pip-version-check --no-warn-conflicts"
    )
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(SITE), *wheels]
    subprocess.run(command, check=True)
    present = len(others) - len(missing)
    print(
        f"installed {len(wheels)} wheels into {SITE}; {present} were already installed", flush=True
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
    summaries = re.findall(r"^=*\s*(\d+ \w+.*?|no tests ran.*?)\s*=*$", log, re.M)
    summary = summaries[-1] if summaries else "no summary"
    rows.append(("pytest " + options.tests, f"{summary} (exit {status}, {seconds:.0f} s)"))
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
        rows.append(_bench_row(record))
    return status


def _bench_row(record: dict[str, Any]) -> tuple[str, str]:
    """Return the case and the result of a record of `layer.json`; a skipped case has a note."""
    keys = ("dtype", "routing", "contestant")
    case = " ".join([record["shape"]["name"], *(record[key] for key in keys)])
    if record["note"]:
        return case, record["note"]
    return case, f"{record['step_ms']['median']:.3f} ms, efficiency {record['efficiency']:.3f}"


def _logged(name: str, arguments: list[str], out: Path) -> tuple[int, str, float]:
    """Run Python with arguments and log into ``out/name.log``.

    Return the exit status, the log and the seconds.
    """
    began = time.monotonic()
    path = out / f"{name}.log"
    environment = os.environ | {"PYTHONPATH": str(SITE)}
    with path.open("w", encoding="utf-8") as log:
        command = [sys.executable, *arguments]
        status = subprocess.run(
            command, cwd=HERE, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    seconds = time.monotonic() - began
    return status.returncode, path.read_text(encoding="utf-8", errors="replace"), seconds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of logs, JSON and plot"
    )
    parser.add_argument("--tests", default="-m gpu", help="pytest options (empty: no tests)")
    parser.add_argument(
        "--bench",
        default="--shape all",
        help="options of tokenyard bench layer (empty: no benchmark)",
    )
    options = parser.parse_args()
    options.out = options.out.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
