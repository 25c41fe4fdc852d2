"""Optimizers in few passes over memory: AdamW, and the parts of Muon."""

from tokenyard_kernels_triton.optimizer._adamw import (
    AdamWSettings,
    AdamWTensors,
    FusedAdamW,
    supports,
)

__all__ = ["AdamWSettings", "AdamWTensors", "FusedAdamW", "supports"]
