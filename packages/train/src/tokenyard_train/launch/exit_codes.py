"""Exit codes of a training process."""

from __future__ import annotations

MISTAKE = 2
"""A mistake in the config or the machine. Another attempt would fail in the same way."""

STOPPED = 75
"""The run stopped on request. EX_TEMPFAIL tells a scheduler to try again."""
