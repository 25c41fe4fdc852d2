"""The exit codes of a training process."""

from __future__ import annotations

MISTAKE = 2
"""A mistake of the config or the machine: another attempt would end alike."""

STOPPED = 75
"""The run stopped because it was asked to: EX_TEMPFAIL, which says to try again."""
