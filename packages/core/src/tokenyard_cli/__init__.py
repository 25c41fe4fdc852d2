"""The frame of the `tokenyard` command.

A package beside `tokenyard`, because importing `tokenyard` imports torch and `--help` should not.
"""

from tokenyard_cli.main import app, main
from tokenyard_cli.options import dataclass_options

__all__ = ["app", "dataclass_options", "main"]
