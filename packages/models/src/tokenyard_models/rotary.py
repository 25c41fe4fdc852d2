"""Rotary positions (Su et al. 2021, RoPE, arXiv 2104.09864), rotated by halves, and how they are stretched."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of rotations to more positions than a model was first trained on (arXiv 2407.21783).

    A frequency that turns less than `low_freq_factor` times over those positions is divided by `factor`, one that turns
    more than `high_freq_factor` times is kept, and between them is a straight line.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # how many positions those were

    def stretched(self, frequencies: Tensor) -> Tensor:
        """Return frequencies [head_dim / 2], in radians a position, stretched."""
        turns = frequencies * (self.original_max_position_embeddings / (2 * math.pi))
        kept = (
            (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        ).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotate(
    x: Tensor, positions: Tensor, theta: float, scaling: RopeScaling | None = None
) -> Tensor:
    """Rotate x [B, H, S, head_dim] by its positions [S]; angles in float32 at least."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    if scaling is not None:
        frequencies = scaling.stretched(frequencies)
    angles = positions.to(wide).unsqueeze(1) * frequencies  # [S, head_dim / 2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
