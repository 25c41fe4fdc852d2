"""``python -m tokenyard_bench`` is `tokenyard bench`."""

from tokenyard_bench.cli import app
from tokenyard_cli.exit import run_and_exit

if __name__ == "__main__":
    run_and_exit(app)
