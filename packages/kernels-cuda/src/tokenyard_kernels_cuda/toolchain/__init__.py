"""Compile, cache and launch kernels: source -> cubin (NVRTC or disk) -> library -> kernel."""

from tokenyard_kernels_cuda.toolchain._cache import cubin_folder, cubin_of
from tokenyard_kernels_cuda.toolchain._compile import CompileError, architecture_of, compile_cubin
from tokenyard_kernels_cuda.toolchain._driver import DriverError
from tokenyard_kernels_cuda.toolchain._kernel import (
    Array,
    Float,
    Int,
    Kernel,
    Parameters,
    compile_kernels,
)
from tokenyard_kernels_cuda.toolchain._source import Source

__all__ = [
    "Array",
    "CompileError",
    "DriverError",
    "Float",
    "Int",
    "Kernel",
    "Parameters",
    "Source",
    "architecture_of",
    "compile_cubin",
    "compile_kernels",
    "cubin_folder",
    "cubin_of",
]
