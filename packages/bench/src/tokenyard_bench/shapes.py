"""The layer sizes that are measured, by name."""

from __future__ import annotations

from typing import NamedTuple

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean


class Shape(NamedTuple):
    """The size of one MoE layer and of its input."""

    name: str
    tokens: int  # T
    dim: int  # D
    ffn_dim: int  # F
    num_experts: int  # E
    top_k: int  # K

    @property
    def slots(self) -> int:
        """T*K."""
        return self.tokens * self.top_k

    def flops(self, gated: bool = True) -> tuple[int, int]:
        """Return the floating-point operations of the products in a forward pass, and in one with its backward."""
        forward = 2 * self.slots * self.dim * self.ffn_dim * (3 if gated else 2)
        return forward, 3 * forward


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
"""Layers of models that people train, and one for processors. The sonic shapes are those of arXiv 2512.14080."""

GPU_SHAPES = tuple(name for name in SHAPES if name != "cpu")
"""What `--shape all` measures on a GPU."""


def parse_shape(text: str) -> Shape:
    """Return the shape of a name, or of ``T,D,F,E,K``. Raises ConfigError."""
    if text in SHAPES:
        return SHAPES[text]
    numbers = text.split(",")
    if len(numbers) == 1:
        known = ", ".join(SHAPES)
        raise ConfigError(
            f"--shape {text!r} is unknown{did_you_mean(text, SHAPES)}; give T,D,F,E,K or one of: {known}, all"
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


def parse_shapes(texts: list[str], gpu: bool) -> list[Shape]:
    """Return the shapes that are asked for; "all" stands for every built-in one that suits the machine."""
    names = [
        name
        for text in texts
        for name in ((GPU_SHAPES if gpu else ("cpu",)) if text == "all" else (text,))
    ]
    return [parse_shape(name) for name in dict.fromkeys(names)]
