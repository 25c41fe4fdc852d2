"""``hatch run release``: build every wheel, install them into a bare environment and train there.

It publishes nothing. It needs hatch and a package index for torch and the other requirements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
CONFIG = {
    "model": {"name": "mixtral", "size": "tiny"},
    "train_loader": {"name": "python_stdlib"},
    "max_seq_len": 64,
    "global_train_batch_size": 8,
    "max_duration": "3ba",
    "device": "cpu",
}


def main() -> None:
    """Rehearse a release; exit with the status of a failed step."""
    wheels = build()
    with tempfile.TemporaryDirectory() as folder:
        programs = install(wheels, Path(folder))
        smoke(programs, Path(folder))
    print("built, installed and tried:", *(f"  {wheel.name}" for wheel in wheels), sep="\n")


def build() -> list[Path]:
    """Build all wheels and return them.

    They require each other by version, not by folders of this clone.
    """
    for old in DIST.glob("*.whl"):
        old.unlink()
    environment = os.environ | {"TOKENYARD_PIN": f">={earliest()}"}
    subprocess.run(
        ["hatch", "build", "--all", "-t", "wheel"], cwd=ROOT, env=environment, check=True
    )
    return sorted(DIST.glob("*.whl"))


def earliest() -> Version:
    """Return the earliest version of all packages.

    `tokenyard` requires at least this version of every package. Each package bounds the versions
    of core and of the other packages that it works with.
    """
    paths = ROOT.glob("packages/*/src/*/__about__.py")
    texts = (path.read_text(encoding="utf-8") for path in paths)
    return min(Version(text.split('__version__ = "')[1].split('"')[0]) for text in texts)


def install(wheels: list[Path], folder: Path) -> Path:
    """Create an environment with the wheels and this environment's version of torch.

    Return the folder of its programs.
    """
    venv.create(folder / "bare", with_pip=True)
    programs = folder / "bare" / ("Scripts" if os.name == "nt" else "bin")
    torch = f"torch=={version('torch').partition('+')[0]}"
    targets = [
        f"{wheel}[all]" if wheel.name.startswith("tokenyard-") else str(wheel) for wheel in wheels
    ]
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, torch, *targets], check=True)
    return programs


def smoke(programs: Path, folder: Path) -> None:
    """Run the main commands: benchmark, check, three training steps, convert and generate."""
    (folder / "config.yaml").write_text(json.dumps(CONFIG))  # JSON is valid YAML
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    for arguments in (
        ["--help"],
        ["--version"],
        ["backends"],
        ["bench", "layer", "--shape", "64,16,24,4,2", "--dtype", "fp32", "--device", "cpu"],
        ["check", "config.yaml"],
        ["train", "config.yaml"],
        ["convert", "runs/run", "folder"],
        ["generate", "runs/run", "--prompt", "def ", "--max-new-tokens", "8"],
    ):
        print("$ tokenyard", *arguments, flush=True)
        command = [str(programs / "tokenyard"), *arguments]
        subprocess.run(command, cwd=folder, env=environment, check=True, timeout=600)


if __name__ == "__main__":
    sys.exit(main())
