"""Draw the speed of one MoE layer beside other libraries as an SVG that a phone can show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SHAPES = {
    "qwen3-30b": "Qwen3-30B-A3B: 128 experts, top 8",
    "dbrx": "DBRX: 16 experts, top 4",
}
_OURS = "tokenyard"
_BASE = "transformers"  # its speed is 1
_WIDTH = 420  # about a phone's, so that text of 13 units is readable there
_LEFT = 112  # where bars start
_UNIT = 98  # width of a bar of speed 1
_ROW = 26  # height of a bar and the gap below it
_OURS_COLOUR = "#d9762b"
_PEER_COLOUR = "#8a8f98"
_STYLE = """<style>
    .speedups { color: #20242c }
    @media (prefers-color-scheme: dark) { .speedups { color: #dde1e8 } }
  </style>"""


def speedups(content: dict[str, Any], path: Path) -> None:
    """Draw the speed of each library, as a multiple of transformers', and save it."""
    lines = [
        '<text x="0" y="16">Speed of one MoE layer, transformers = 1. Higher is better.</text>'
    ]
    y = 50
    for shape, title in _SHAPES.items():
        speeds = relative_speeds(content["records"], shape)
        lines.append(f'<text x="0" y="{y}" font-weight="700">{title}</text>')
        lines += _bars(speeds, y + 12)
        y += 12 + _ROW * len(speeds) + 30
    path.write_text(_document(lines, y - 32), encoding="utf-8")


def relative_speeds(records: list[dict[str, Any]], shape: str) -> dict[str, float]:
    """Return each library's speed as a multiple of transformers', fastest first.

    A time is divided by that of the dense matmuls of its own run, since the clock rate of a GPU
    differs between runs. If a library is in several runs, its last one counts.
    """
    latest = {r["contestant"]: r for r in records if r["shape"] == shape}
    efficiency = {name: r["dense_ms"] / r["step_ms"] for name, r in latest.items()}
    return {
        name: efficiency[name] / efficiency[_BASE]
        for name in sorted(efficiency, key=efficiency.__getitem__, reverse=True)
    }


def _bars(speeds: dict[str, float], y: float) -> Iterator[str]:
    for name, speed in speeds.items():
        ours = name == _OURS
        width = round(_UNIT * speed, 1)
        colour = _OURS_COLOUR if ours else _PEER_COLOUR
        weight = ' font-weight="700"' if ours else ""
        yield f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end"{weight}>{name}</text>'
        yield f'<rect x="{_LEFT}" y="{y}" width="{width}" height="20" rx="3" fill="{colour}"/>'
        yield f'<text x="{_LEFT + width + 6}" y="{y + 15}"{weight}>{speed:.2f}x</text>'
        y += _ROW


def _document(lines: list[str], height: int) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="speedups" role="img" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="13" '
        'fill="currentColor" aria-label="Speed of one MoE layer on an H200 beside other libraries">'
    )
    return "\n  ".join([head, _STYLE, *lines]) + "\n</svg>\n"
