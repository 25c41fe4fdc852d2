"""Plain torch code in place of the Gluon matmuls, which Triton's interpreter cannot run.

It replaces the launches of ``ops._gluon_fp8`` and the weight gradients of ``ops._gluon``. All else
of the FP8 layer then runs on a CPU: quantization, both layouts of the weights, copies, the gradient
of the activation, and what is saved.
"""

import torch

from tokenyard.activations import activate
from tokenyard.experts._grouped_matmuls import add_bias, rows_times
from tokenyard.fp8 import Quantized, dequantize, quantize_rows
from tokenyard_kernels_triton.ops import _gluon, _gluon_fp8, _portable
from tokenyard_kernels_triton.ops._gluon_operands import TokenRows


def numbers(rows):
    """Return quantized rows [R, W] in float32."""
    if not isinstance(rows.values, TokenRows):
        return dequantize(Quantized(rows.values, rows.scales))
    tokens = rows.values.order // rows.values.top_k
    return dequantize(Quantized(rows.values.tokens, rows.scales))[tokens]


def up_and_activate(x, up, bias, row_tiles, activation, save, dtype, keep_a=True):
    weight = dequantize(Quantized(up.values, up.scales))
    z = add_bias(rows_times(numbers(x), weight.mT, row_tiles.offsets), bias, row_tiles.offsets)
    a = quantize_rows(activate(z, activation))
    if save == "fp8":
        values, scales = quantize_rows(z)
        return (values.view(torch.uint8), scales), a
    rows = z[:0] if save == "recompute" else z
    return (rows.to(dtype), z.new_empty(0, dtype=dtype)), a


def times_weight(rows, weight, bias, row_tiles, transposed, dtype):
    if transposed:
        matrices = dequantize(Quantized(weight.values, weight.scales)).mT
    else:
        matrices = dequantize(Quantized(weight.transposed, weight.scales.mT)).mT
    out = rows_times(numbers(rows), matrices, row_tiles.offsets)
    return add_bias(out, bias, row_tiles.offsets).to(dtype)


def install(monkeypatch):
    """Replace the matmuls until the end of a test."""
    monkeypatch.setattr(_gluon_fp8, "up_and_activate", up_and_activate)
    monkeypatch.setattr(_gluon_fp8, "times_weight", times_weight)
    monkeypatch.setattr(_gluon, "rows_of", _portable.rows_of)
    monkeypatch.setattr(_gluon, "weight_gradient", _portable.weight_gradient)
