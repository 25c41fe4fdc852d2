"""TMA descriptors are encoded as Triton's launcher encodes them."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
import triton

from tokenyard_kernels_triton.tensor_map import tensor_map

ELEMENTS = {torch.uint8: 0, torch.float16: 6, torch.float32: 7, torch.bfloat16: 10}  # of Triton
WRAP = 1 << 34
SHAPES = {  # shape, strides, box
    "ragged": ([0x7FFF0000] * 2 + [1 << 30, 2, 64], [WRAP - 128, 128, 128, 64, 1], [1, 1, 64, 1]),
    "stacked": ([3, 2, 96, 64], [2 * 96 * 64, 96 * 64, 64, 1], [1, 2, 32]),
    "flat": ([777, 1024], [1024, 1], [128]),
}


def by_triton(address, descriptor, box):
    """Return the bytes of the descriptor that Triton's launcher would pass."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    utils = triton.runtime.driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
    encoded = fill(
        address,
        box["swizzle"],
        box["elem_size"],
        TMA_DTYPE_DEVICE_TO_HOST[box["elem_type"]],
        box["block_size"],
        descriptor.shape,
        descriptor.strides,
        1 if descriptor.padding == "nan" else 0,
    )
    return ctypes.string_at(id(encoded) + 128, 128)  # after the head of the object, aligned


@pytest.mark.gpu
@pytest.mark.parametrize("swizzle", [1, 2, 3])  # of 32, 64 and 128 bytes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_bytes_are_triton_s(dtype, shape, swizzle):
    sizes, strides, box = SHAPES[shape]
    memory = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    columns = 16 * 2**swizzle // dtype.itemsize
    for padding in ("zero", "nan") if dtype.is_floating_point else ("zero",):
        descriptor = SimpleNamespace(shape=sizes, strides=strides, padding=padding)
        metadata = {
            "swizzle": swizzle,
            "elem_size": dtype.itemsize,
            "elem_type": ELEMENTS[dtype],
            "block_size": [*box, columns],
            "fp4_padded": False,
        }
        encoded = tensor_map(descriptor, metadata)
        for address in (memory.data_ptr(), memory.data_ptr() + 4096):
            assert encoded.at(address) == by_triton(address, descriptor, metadata)
