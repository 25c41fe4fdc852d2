"""``python -m tokenyard`` prints the installed backends and says which of them can be used here."""

from __future__ import annotations

import sys

from tokenyard.errors import TokenyardError
from tokenyard.registry import default_registry
from tokenyard.table import render, sample_workload


def main() -> int:
    """Print the table; return 0, or 2 with one sentence on stderr if the plugins contradict each other."""
    try:
        print(render(default_registry(), sample_workload()))
    except TokenyardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
