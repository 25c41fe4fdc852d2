"""Divisors of a number, for errors that list the valid values."""

from __future__ import annotations

import math


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]
