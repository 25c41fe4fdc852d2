"""``python -m tokenyard`` prints the installed backends, with a reason for each unusable one."""

from __future__ import annotations

import sys

from tokenyard.errors import TokenyardError
from tokenyard.registry import default_registry
from tokenyard.table import render, sample_workload


def main() -> int:
    """Print the table. Return 0, or 2 with one sentence on stderr if plugins conflict."""
    try:
        print(render(default_registry(), sample_workload()))
    except TokenyardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
