"""Write numbers for people: three digits, and the unit that fits."""

from __future__ import annotations

from collections.abc import Sequence

_BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_ROUNDS_TO_1 = 0.9995


def describe_bytes(count: float) -> str:
    """Return a number of bytes with a binary unit, such as ``19.3 GiB``."""
    scale, unit = _largest(count, _BINARY)
    return f"{count:.0f} bytes" if scale == 1 else f"{_digits(count / scale)} {unit}"


def describe_flop_rate(flops_per_s: float) -> str:
    """Return a rate of floating-point operations, such as ``436 TFLOP/s``."""
    scale, prefix = _largest(flops_per_s, _DECIMAL)
    return f"{_digits(flops_per_s / scale)} {prefix}FLOP/s"


def describe_count(count: float) -> str:
    """Return a large number with a decimal prefix, such as ``30.5 G``; below 1,000 the integer."""
    scale, prefix = _largest(count, _DECIMAL)
    return f"{_digits(count / scale)} {prefix}" if prefix else f"{count:.0f}"


def counted(count: int, one: str, several: str) -> str:
    """Return a count and its noun, such as ``1 batch`` or ``1,000 batches``."""
    return f"{count:,} {one if count == 1 else several}"


def describe_duration(seconds: float) -> str:
    """Return hours, minutes and seconds, such as ``1:02:03``; days before them from 24 hours on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hours}:{minutes:02}:{rest:02}"


def _largest(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """Return the largest unit of which a value is at least one; the smallest for any below it."""
    return next((unit for unit in units if value >= _ROUNDS_TO_1 * unit[0]), units[-1])


def _digits(value: float) -> str:
    """Return a value with three significant digits, and all digits before the point."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
