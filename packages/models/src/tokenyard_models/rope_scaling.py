"""The scaling of rotary positions to longer sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
