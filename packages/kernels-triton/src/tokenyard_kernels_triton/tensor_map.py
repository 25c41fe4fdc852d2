"""TMA descriptors as the CUDA driver encodes them, one for each address of a matrix.

Triton's launcher encodes the descriptors of a launch each time. Here those of an address are
encoded once.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

BYTES = 128  # of a descriptor, which is a CUtensorMap

_ALIGNMENT = 64  # bytes
_TYPES = {0: 0, 6: 6, 7: 7, 10: 9}
"""CUtensorMapDataType of the types that kernels name: 8 bits, float16, float32, bfloat16."""

_FILLS = {"zero": 0, "nan": 1}  # CUtensorMapFloatOOBfill
_PROMOTION = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B, which is Triton's
_MOST = 256  # addresses that are remembered: those of many layers


class TensorMap:
    """The descriptor of a matrix of one shape, for any address."""

    def __init__(self, descriptor: Any, box: Mapping[str, Any]):
        """Take what Triton's launcher takes: a descriptor, and what its kernel says of the box."""
        # cuTensorMapEncodeTiled takes the last dimension first, without its stride
        shape = descriptor.shape[::-1]
        strides = [stride * box["elem_size"] for stride in descriptor.strides[-2::-1]]
        rank = len(shape)
        self._kind = (_TYPES[box["elem_type"]], rank)
        self._sizes = (
            (ctypes.c_uint64 * rank)(*shape),
            (ctypes.c_uint64 * (rank - 1))(*strides),
            (ctypes.c_uint32 * rank)(*box["block_size"][::-1]),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,  # CU_TENSOR_MAP_INTERLEAVE_NONE
            box["swizzle"],
            _PROMOTION,
            _FILLS[descriptor.padding],
        )
        self._encoded: dict[int, bytes] = {}

    def at(self, address: int) -> bytes | None:
        """Return the bytes of the descriptor of a matrix at an address; None if CUDA refuses it."""
        known = self._encoded.get(address)
        if known is not None:
            return known
        space = ctypes.create_string_buffer(BYTES + _ALIGNMENT)
        first = ctypes.addressof(space)
        skipped = -first % _ALIGNMENT
        result = _encode_function()(
            ctypes.c_void_p(first + skipped), *self._kind, ctypes.c_void_p(address), *self._sizes
        )
        if result != 0:
            return None
        if len(self._encoded) >= _MOST:
            self._encoded.clear()
        encoded = space.raw[skipped : skipped + BYTES]
        self._encoded[address] = encoded
        return encoded


def tensor_map(descriptor: Any, box: Mapping[str, Any]) -> TensorMap | None:
    """Return the descriptor of a launch for any address; None if only Triton can encode it."""
    plain = (
        box["elem_type"] in _TYPES
        and not box.get("fp4_padded")
        and not box.get("is_im2col")
        and not getattr(descriptor, "round_f32_to_tf32", False)
        and len(descriptor.shape) == len(box["block_size"])
        and _encode_function() is not None
    )
    return TensorMap(descriptor, box) if plain else None


@functools.cache
def _encode_function() -> Any:
    """Return the driver's function; None if there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (AttributeError, OSError):
        return None
