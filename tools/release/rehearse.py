"""``hatch run release``: build every wheel, install them into a bare environment, and train with them there.

Nothing is published. What it needs besides hatch is an index of packages, for torch and the rest.
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
    """Rehearse a release; exit with what failed."""
    wheels = build()
    with tempfile.TemporaryDirectory() as folder:
        bin = install(wheels, Path(folder))
        smoke(bin, Path(folder))
    print("built, installed and tried:", *(f"  {wheel.name}" for wheel in wheels), sep="\n")


def build() -> list[Path]:
    """Build the wheels anew, and return them; they ask for each other by version, not for folders of this clone."""
    for old in DIST.glob("*.whl"):
        old.unlink()
    environment = os.environ | {"TOKENYARD_PIN": f">={earliest()}"}
    subprocess.run(
        ["hatch", "build", "--all", "-t", "wheel"], cwd=ROOT, env=environment, check=True
    )
    return sorted(DIST.glob("*.whl"))


def earliest() -> Version:
    """Return the earliest version among the packages, each of which has its own.

    `tokenyard` asks for that or a later one of all of them. What goes with what, they say themselves: each bounds the
    core, and the packages, that it was written for.
    """
    abouts = (
        path.read_text(encoding="utf-8") for path in ROOT.glob("packages/*/src/*/__about__.py")
    )
    return min(Version(text.split('__version__ = "')[1].split('"')[0]) for text in abouts)


def install(wheels: list[Path], folder: Path) -> Path:
    """Install them beside this environment's version of torch into a new environment; return its programs' folder."""
    venv.create(folder / "bare", with_pip=True)
    bin = folder / "bare" / ("Scripts" if os.name == "nt" else "bin")
    torch = f"torch=={version('torch').partition('+')[0]}"
    extras = [
        f"{wheel}[all]" if wheel.name.startswith("tokenyard-") else str(wheel) for wheel in wheels
    ]
    subprocess.run(
        [str(bin / "python"), "-m", "pip", "install", "--quiet", torch, *extras], check=True
    )
    return bin


def smoke(bin: Path, folder: Path) -> None:
    """Ask what there is, train three steps, write the model in Hugging Face's form, and continue a text by that."""
    (folder / "config.yaml").write_text(json.dumps(CONFIG))  # JSON is YAML, too
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    for words in (
        ["--help"],
        ["--version"],
        ["backends"],
        ["bench", "layer", "--shape", "64,16,24,4,2", "--dtype", "fp32", "--device", "cpu"],
        ["check", "config.yaml"],
        ["train", "config.yaml"],
        ["convert", "runs/run", "folder"],
        ["generate", "runs/run", "--prompt", "def ", "--max-new-tokens", "8"],
    ):
        print("$ tokenyard", *words, flush=True)
        subprocess.run(
            [str(bin / "tokenyard"), *words], cwd=folder, env=environment, check=True, timeout=600
        )


if __name__ == "__main__":
    sys.exit(main())
