"""Launch kernels by the CUDA driver, with arguments that are written into one buffer.

To convert each argument of a launch takes longer than the launch.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Any

from tokenyard.errors import TokenyardError

NO_DRIVER = (
    "kernels are launched by cuLaunchKernelEx of libcuda.so.1, which the CUDA driver has for Linux "
    "from version 11.8 on, and it is not here; update the driver"
)
"""The sentence for a machine without such a driver."""

_CONFIG = Struct("@7IPPI")  # CUlaunchConfig: grid, block, shared memory, stream, attributes
_ATTRIBUTE = Struct("@IiQ56x")  # CUlaunchAttribute: id, padding, and 64 bytes of a value
_CHAINED = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_STRIDE = 128  # bytes from one argument to the next: the longest one is a TMA descriptor

MOST_ARGUMENTS = 128
"""How many arguments a launch can have here."""


class _Thread(threading.local):
    """The memory that a thread's launches write their arguments to."""

    def __init__(self) -> None:
        self.arguments = ctypes.create_string_buffer(MOST_ARGUMENTS * _STRIDE)
        first = ctypes.addressof(self.arguments)
        starts = range(first, first + len(self.arguments), _STRIDE)
        self.addresses = (ctypes.c_void_p * MOST_ARGUMENTS)(*starts)
        self.config = ctypes.create_string_buffer(_CONFIG.size)
        self.attribute = ctypes.create_string_buffer(_ATTRIBUTE.pack(_CHAINED, 0, 1))
        self.attribute_address = ctypes.addressof(self.attribute)


_thread = _Thread()


def argument_layout(codes: Iterable[str]) -> Struct:
    """Return where `launch_kernel` reads arguments of these types, codes of the module struct.

    Each begins 128 bytes after the one before it. The driver knows where a kernel expects them,
    which C's rules do not say: a TMA descriptor is aligned in the memory that holds the arguments
    on the GPU.
    """
    return Struct("@" + "".join(f"{code}{_STRIDE - Struct(code).size}x" for code in codes))


def launch_kernel(
    function: ctypes.c_void_p,
    sizes: Sequence[int],
    stream: int,
    layout: Struct,
    arguments: Sequence[Any],
    chained: bool = False,
) -> int:
    """Launch a kernel; return the driver's result, which is 0 if there is no error.

    - `function`: the driver's handle (CUfunction) of the current GPU.
    - `sizes`: the grid (x, y, z), the threads of a block (x, y, z), and its bytes of shared memory.
    - `layout`: the `argument_layout` of all parameters of the kernel.
    - `arguments`: numbers and addresses, and bytes of structs that are passed by value.
    - `chained`: begin before the launch before it has ended (programmatic dependent launch, from
      compute capability 9.0 on). Each thread of the kernel must wait (``griddepcontrol.wait``)
      before it reads or writes.

    A GPU must have a context in this thread. Raises TokenyardError without a driver (`has_driver`).
    """
    thread = _thread
    layout.pack_into(thread.arguments, 0, *arguments)
    _CONFIG.pack_into(thread.config, 0, *sizes, stream, thread.attribute_address, chained)
    result: int = _launch_function()(thread.config, function, thread.addresses, None)
    return result


def has_driver() -> bool:
    """Return whether a CUDA driver that can launch kernels so is installed."""
    try:
        _launch_function()
    except TokenyardError:
        return False
    return True


@functools.cache
def _launch_function() -> Any:
    """Return the driver's function. Raises TokenyardError if there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (AttributeError, OSError) as error:
        raise TokenyardError(f"{NO_DRIVER} ({error})") from None
