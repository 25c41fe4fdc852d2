"""Find the fastest tiles for a layer on this GPU and store them.

Run ``python -m tokenyard_kernels_triton T,D,F,E,K``, such as ``32768,2048,768,128,8``.
"""

from __future__ import annotations

import sys

import torch

from tokenyard import Workload
from tokenyard.errors import ConfigError
from tokenyard_kernels_triton._device import current_device
from tokenyard_kernels_triton._plugin import no_gluon

_USAGE = (
    "usage: python -m tokenyard_kernels_triton T,D,F,E,K   "
    "(tokens, width, expert width, experts, experts a token)"
)


def main(arguments: list[str]) -> int:
    """Tune for a layer's sizes. Returns 0, or 2 after one sentence on stderr."""
    try:
        tokens, dim, ffn_dim, num_experts, top_k = _sizes(arguments)
        workload = _workload(dim, ffn_dim, num_experts, top_k)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if (reason := no_gluon(workload)) is not None:
        print(f"nothing to tune: {reason}", file=sys.stderr)
        return 2
    _tune_and_store(tokens, dim, ffn_dim, num_experts, top_k)
    return 0


def _sizes(arguments: list[str]) -> list[int]:
    try:
        sizes = [int(number) for number in arguments[0].split(",")]
    except (IndexError, ValueError):
        raise ConfigError(_USAGE) from None
    if len(arguments) != 1 or len(sizes) != 5 or min(sizes) < 1:
        raise ConfigError(
            f"{' '.join(arguments)!r} is not five whole numbers above 0, "
            "such as 32768,2048,768,128,8"
        )
    return sizes


def _workload(dim: int, ffn_dim: int, num_experts: int, top_k: int) -> Workload:
    return Workload(dim, ffn_dim, num_experts, top_k, dtype=torch.bfloat16, device=current_device())


def _tune_and_store(tokens: int, dim: int, ffn_dim: int, num_experts: int, top_k: int) -> None:
    from tokenyard_kernels_triton.gluon_tiling import gpu_key, keep_tuned
    from tokenyard_kernels_triton.tune import tune

    results = tune(tokens, dim, ffn_dim, num_experts, top_k)
    for result in results:
        times = f"{result.shipped_ms:8.3f} ms -> {result.best_ms:8.3f} ms"
        print(f"{result.matmul:20} {times}  {result.best}")
    tiles = {result.bucket: result.best for result in results}
    path = keep_tuned(gpu_key(current_device()), tiles)
    print(f"kept in {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
