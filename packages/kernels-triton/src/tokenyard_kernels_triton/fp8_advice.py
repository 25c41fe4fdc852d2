"""What experts in FP8 would gain and save, for `tokenyard check`."""

from __future__ import annotations

from tokenyard.activations import up_rows
from tokenyard.fp8 import why_no_fp8
from tokenyard.workload import Workload
from tokenyard_kernels_triton.ops._save import saved_bytes

_FASTER = {256: 1.13, 768: 1.20, 1024: 1.22, 10752: 1.33, 14336: 1.30}
"""By F: a layer in bfloat16 over one in FP8, on one H200 (docs/benchmarks/h200/layer-fp8.json)."""


def fp8_advice(workload: Workload, saved_per_row: int, keeps_copies: bool) -> str | None:
    """Return a sentence on what `precision: fp8` would change; None where it cannot be used.

    `saved_per_row` are the bytes that a row saves without it. Where weights are sharded or cast,
    their copies are not kept.
    """
    if why_no_fp8(workload.dim, workload.ffn_dim) is not None:
        return None
    columns = up_rows(workload.activation, workload.ffn_dim)
    fewer = workload.top_k * (saved_per_row - saved_bytes(columns, "fp8", 1))
    width = min(_FASTER, key=lambda measured: abs(measured - workload.ffn_dim))
    saves = f"saves {fewer:,} bytes fewer a token and layer, " if fewer > 0 else ""
    copies = "takes 2 bytes a weight for copies" if keeps_copies else "rounds weights in each pass"
    return (
        f"precision: fp8 {saves}{copies}, and made a layer of F {width:,} "
        f"{_FASTER[width]:.2f} times as fast on one H200"
    )
