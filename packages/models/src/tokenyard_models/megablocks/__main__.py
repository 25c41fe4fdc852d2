"""Run a script that imports MegaBlocks: ``python -m tokenyard_models.megablocks script.py``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tokenyard import ConfigError
from tokenyard_models.megablocks import install


def main() -> None:
    """Run the script of the command line with its arguments."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tokenyard_models.megablocks script.py [arguments]")
    if not Path(sys.argv[1]).is_file():
        sys.exit(f"{sys.argv[1]} is no file; give the path of a Python script")
    try:
        install()
    except ConfigError as error:
        sys.exit(str(error))
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
