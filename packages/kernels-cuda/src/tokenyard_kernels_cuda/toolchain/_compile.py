"""Compiling by NVRTC, which needs no GPU, no nvcc and no C++ compiler."""

from __future__ import annotations

import re
from typing import Any

from tokenyard import TokenyardError
from tokenyard_kernels_cuda.toolchain._source import Source, headers

_FAMILIES = {8: "sm_80", 9: "sm_90a", 10: "sm_100", 12: "sm_120"}
"""A cubin runs on later GPUs of its family; Hopper's own with "a"."""
_PLACE = re.compile(r"^(?P<file>[\w.]+)\((?P<line>\d+)\): (?:catastrophic )?error", re.MULTILINE)


class CompileError(TokenyardError):
    """NVRTC did not take a source; the message has its log, and the line that it points to."""


def architecture_of(capability: tuple[int, int]) -> str:
    """Return what to compile for, for a GPU of a compute capability."""
    major, minor = capability
    return _FAMILIES.get(major, f"sm_{major}{minor}")


def options_for(source: Source, architecture: str) -> list[str]:
    """Return all options that a source is compiled with."""
    return [
        f"--gpu-architecture={architecture}",
        "-std=c++17",
        "--generate-line-info",
        *source.options(),
    ]


def compiler_version() -> str:
    """Return NVRTC's version."""
    from cuda.bindings import nvrtc

    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # cuda.bindings looks for the library when it first needs it
        raise CompileError(f"NVRTC is not found ({error}); pip install nvidia-cuda-nvrtc") from None
    return f"{major}.{minor}"


def compile_cubin(source: Source, architecture: str) -> bytes:
    """Compile a source for an architecture such as sm_90a. Raises CompileError."""
    from cuda.bindings import nvrtc

    included = headers()
    names, texts = (
        [name.encode() for name in included],
        [text.encode() for text in included.values()],
    )
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            source.text().encode(), source.name.encode(), len(names), texts, names
        )
    )
    try:
        options = [option.encode() for option in options_for(source, architecture)]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(_message(source, architecture, str(result), _log(nvrtc, program)))
        cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(returned: tuple[Any, ...]) -> Any:
    result, *values = returned
    if int(result):
        raise CompileError(f"NVRTC failed: {result.name}")
    return values[0] if values else None


def _log(nvrtc: Any, program: Any) -> str:
    log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    return log.rstrip(b"\0\n").decode(errors="replace")


def _message(source: Source, architecture: str, result: str, log: str) -> str:
    said = log or result
    message = f"{source} does not compile for {architecture} by NVRTC {compiler_version()}:\n{said}"
    found = _PLACE.search(log)
    text = None if found is None else ({source.name: source.text()} | headers()).get(found["file"])
    if found is None or text is None:
        return message
    number = int(found["line"])
    line = (text.splitlines() + [""] * number)[number - 1]
    return f"{message}\nline {number} of {found['file']}: {line.strip()}"
