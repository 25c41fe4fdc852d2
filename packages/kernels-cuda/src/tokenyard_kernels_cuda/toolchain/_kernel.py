"""Kernels as typed functions: a wrong argument raises TypeError instead of a wrong result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenyard.cuda_driver import argument_layout
from tokenyard_kernels_cuda.toolchain import _driver
from tokenyard_kernels_cuda.toolchain._source import Source

_MOST_BLOCKS = (("x", (1 << 31) - 1), ("y", (1 << 16) - 1))  # CUDA's limits of the grid


class Parameter(Protocol):
    """The type of one kernel parameter."""

    code: str  # of the module struct

    def value(self, argument: Any) -> Any:
        """Convert an argument for the launch. Raises TypeError with a message like "is ..."."""
        ...


Parameters = dict[str, Parameter]
"""Parameters by name, in order."""


@dataclass(frozen=True)
class Array:
    """A contiguous tensor of one dtype, passed by address; None, if `optional`, becomes null."""

    dtype: torch.dtype
    optional: bool = False
    code = "P"

    def value(self, argument: Any) -> int:
        """Return the address of a tensor."""
        if argument is None and self.optional:
            return 0
        if not isinstance(argument, Tensor) or argument.dtype != self.dtype:
            kind = argument.dtype if isinstance(argument, Tensor) else type(argument).__name__
            raise TypeError(f"is {kind}, and must be a tensor of {self.dtype}")
        if not argument.is_contiguous():
            raise TypeError(f"has strides {argument.stride()} and must be contiguous")
        return argument.data_ptr()


@dataclass(frozen=True)
class Int:
    """A 32-bit integer."""

    code = "i"

    def value(self, argument: Any) -> int:
        """Return the integer."""
        if not isinstance(argument, int) or not -(1 << 31) <= argument < 1 << 31:
            raise TypeError(f"is {argument!r}, and must be an integer of 32 bits")
        return argument


@dataclass(frozen=True)
class Float:
    """A 32-bit float."""

    code = "f"

    def value(self, argument: Any) -> float:
        """Return the number as a float."""
        if not isinstance(argument, (int, float)):
            raise TypeError(f"is {argument!r}, and must be a number")
        return float(argument)


class Kernel:
    """A kernel of a source and its parameters, by name and in order. Call it to launch it."""

    def __init__(self, source: Source, name: str, **parameters: Parameter):
        self.source = source
        self.name = name
        self.parameters = parameters
        self._types = tuple(parameters.values())
        self._layout = argument_layout(parameter.code for parameter in self._types)

    def __call__(
        self, grid: tuple[int, int], threads: int, *arguments: Any, shared: int = 0
    ) -> None:
        """Launch on the current stream of the arguments' GPU.

        `grid` is the number of blocks (x, y); `threads` and `shared` are threads and bytes of
        shared memory per block. Raises TypeError for wrong arguments, ValueError for a grid that
        CUDA does not allow, CompileError and DriverError.
        """
        values, device = self._values(arguments)
        for (dimension, most), blocks in zip(_MOST_BLOCKS, grid):
            if not 0 < blocks <= most:
                raise ValueError(
                    f"{self.name}: {blocks} blocks along {dimension}; there may be 1 to {most}"
                )
        _driver.launch(
            self.source, self.name, device, (*grid, 1), threads, shared, (values, self._layout)
        )

    def _values(self, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], int]:
        """Return the arguments for the launch, and the index of their GPU."""
        if len(arguments) != len(self._types):
            expected = len(self._types)
            raise TypeError(
                f"{self.name} takes {expected} arguments, and {len(arguments)} were given"
            )
        devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
        if len(devices) != 1:
            raise TypeError(
                f"{self.name}: tensors are on {len(devices)} devices; they must be on one"
            )
        values: list[Any] = []
        try:
            for parameter, argument in zip(self._types, arguments):
                values.append(parameter.value(argument))
        except TypeError as fault:
            name = tuple(self.parameters)[len(values)]
            raise TypeError(f"{self.name}: {name} {fault}") from None
        return tuple(values), devices.pop().index


def compile_kernels(kernels: Iterable[Kernel], device: torch.device) -> None:
    """Compile kernels in parallel, unless cached, and load them on a GPU.

    Raises CompileError and DriverError.
    """
    _driver.load(dict.fromkeys(kernel.source for kernel in kernels), device.index)
