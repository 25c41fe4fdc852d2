"""Rotary positions by halves (Su et al. 2021, RoPE, arXiv 2104.09864)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard_models.config import TransformerConfig


class Rotation(NamedTuple):
    """What `rotate` multiplies heads by: [S, head_dim], or [B, 1, S, head_dim] in documents."""

    cos: Tensor  # the cosines of both halves
    sin: Tensor  # minus the sines for the first half, and the sines for the second


def rotation_of(
    positions: Tensor, config: TransformerConfig, dtype: torch.dtype
) -> Rotation | None:
    """Return the rotation of positions [S] or [B, S]; None if the config has no rotary positions.

    All blocks use it, so that none computes a cosine for each number of its heads. Angles are in
    `dtype`, at least float32.
    """
    if config.rope_theta is None:
        return None
    half = config.head_dim // 2
    wide = torch.promote_types(dtype, torch.float32)
    exponents = -torch.arange(half, device=positions.device, dtype=wide) / half
    frequencies = config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = config.rope_scaling.scaled(frequencies)
    angles = positions.to(wide).unsqueeze(-1) * frequencies
    if positions.dim() > 1:
        angles = angles.unsqueeze(1)
    cos = angles.cos()
    sin = angles.sin()
    return Rotation(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate heads x [B, H, S, head_dim], in the dtype of the rotation."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * rotation.cos, swapped, rotation.sin).to(x.dtype)
