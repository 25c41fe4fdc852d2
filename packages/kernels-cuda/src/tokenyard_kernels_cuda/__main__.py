"""Compile every kernel ahead of time: ``python -m tokenyard_kernels_cuda [ARCHITECTURE]``."""

from __future__ import annotations

import sys
import time

import torch

from tokenyard import TokenyardError
from tokenyard_kernels_cuda.sources import sources
from tokenyard_kernels_cuda.toolchain import architecture_of, cubin_folder, cubin_of

_USAGE = (
    "usage: python -m tokenyard_kernels_cuda [ARCHITECTURE]"
    "   (for example sm_90a; default: the architecture of this GPU)"
)


def main(arguments: list[str]) -> int:
    """Compile for an architecture, by default this GPU's, and print the time of each source.

    Returns the exit code: 0, or 2 after an error message on stderr.
    """
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(_USAGE, file=sys.stderr)
        return 2
    if not arguments and not torch.cuda.is_available():
        print(
            "there is no GPU here to compile for; give an architecture, such as sm_90a",
            file=sys.stderr,
        )
        return 2
    architecture = (
        arguments[0] if arguments else architecture_of(torch.cuda.get_device_capability())
    )
    try:
        _compile_all(architecture)
    except TokenyardError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _compile_all(architecture: str) -> None:
    start = time.perf_counter()
    for source in sources():
        source_start = time.perf_counter()
        size = len(cubin_of(source, architecture))
        milliseconds = 1000 * (time.perf_counter() - source_start)
        print(f"{source!s:40} {architecture} {size:8,} bytes {milliseconds:7.1f} ms")
    print(f"{time.perf_counter() - start:.2f} s; kept in {cubin_folder()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
