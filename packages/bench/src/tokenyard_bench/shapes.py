"""Built-in layer sizes, and the values of `--shape`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean


class Shape(NamedTuple):
    """Size of one MoE layer and of its input."""

    name: str
    tokens: int  # T
    dim: int  # D
    ffn_dim: int  # F
    num_experts: int  # E
    top_k: int  # K

    @property
    def slots(self) -> int:
        """Number of (token, expert) pairs, T*K."""
        return self.tokens * self.top_k


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("mixtral", 8192, 4096, 14336, 8, 2),
        Shape("dbrx", 8192, 6144, 10752, 16, 4),
        Shape("olmoe", 32768, 2048, 1024, 64, 8),
        Shape("qwen3-30b", 32768, 2048, 768, 128, 8),
        Shape("sonic-30b", 32768, 4096, 1024, 128, 8),
        Shape("sonic-7b", 24576, 1536, 256, 128, 8),
        Shape("cpu", 2048, 512, 1024, 16, 4),
    )
}
"""Layers of published models, and one for CPUs. The sonic shapes are from arXiv 2512.14080."""

GPU_SHAPES = tuple(name for name in SHAPES if name != "cpu")
"""The shapes that `--shape all` means on a GPU."""


def parse_shape(text: str) -> Shape:
    """Return the shape with a built-in name, or of ``T,D,F,E,K``. Raises ConfigError."""
    if text in SHAPES:
        return SHAPES[text]
    numbers = text.split(",")
    if len(numbers) == 1:
        known = ", ".join(SHAPES)
        raise ConfigError(
            f"--shape {text!r} is unknown{did_you_mean(text, SHAPES)}; "
            f"give T,D,F,E,K or one of: {known}, all"
        )
    try:
        tokens, dim, ffn_dim, num_experts, top_k = (int(number) for number in numbers)
    except ValueError:
        raise ConfigError(
            f"--shape {text!r} is not five whole numbers T,D,F,E,K, such as 2048,512,1024,16,4"
        ) from None
    if tokens < 1:
        raise ConfigError(f"--shape {text!r} has T = {tokens}; it must be at least 1")
    return Shape(text.replace(" ", ""), tokens, dim, ffn_dim, num_experts, top_k)


def parse_shapes(texts: list[str], gpu: bool, tokens: Sequence[int] = ()) -> list[Shape]:
    """Return the requested shapes. "all" means every built-in one for a GPU or a CPU.

    Each comes once for every number in `tokens`, if there is any, in place of its own.
    """
    every = GPU_SHAPES if gpu else ("cpu",)
    names = [name for text in texts for name in (every if text == "all" else (text,))]
    shapes = [parse_shape(name) for name in dict.fromkeys(names)]
    if not tokens:
        return shapes
    return [shape._replace(tokens=count) for shape in shapes for count in dict.fromkeys(tokens)]
