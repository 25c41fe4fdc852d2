"""Rotary positions by halves (Su et al. 2021, RoPE, arXiv 2104.09864), and their scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the frequencies to longer sequences (arXiv 2407.21783).

    A frequency that turns less than `low_freq_factor` times over the original positions is divided
    by `factor`. One that turns more than `high_freq_factor` times is kept. Between the two, the
    share that is kept rises linearly.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # positions that the model was first trained on

    def scaled(self, frequencies: Tensor) -> Tensor:
        """Scale frequencies [head_dim / 2], in radians per position."""
        turns = frequencies * (self.original_max_position_embeddings / (2 * math.pi))
        span = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotate(
    x: Tensor, positions: Tensor, theta: float, scaling: RopeScaling | None = None
) -> Tensor:
    """Rotate x [B, H, S, head_dim] by its positions [S] or [B, S]. Angles are at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    angles = rotation_angles(positions, x.shape[-1], wide, theta, scaling)
    cos = angles.cos()
    sin = angles.sin()
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotation_angles(
    positions: Tensor, head_dim: int, dtype: torch.dtype, theta: float, scaling: RopeScaling | None
) -> Tensor:
    """Return the angles [S, head_dim / 2], or [B, 1, S, head_dim / 2], of positions in `dtype`."""
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(half, device=positions.device, dtype=dtype) / half)
    if scaling is not None:
        frequencies = scaling.scaled(frequencies)
    angles = positions.to(dtype).unsqueeze(-1) * frequencies
    return angles.unsqueeze(1) if positions.dim() > 1 else angles


def rotate_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, S, head_dim], given the cosine of both halves, and -sine and sine."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
