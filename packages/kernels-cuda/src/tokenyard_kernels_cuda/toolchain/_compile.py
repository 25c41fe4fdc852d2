"""Compilation with NVRTC, which needs no GPU, no nvcc and no C++ compiler."""

from __future__ import annotations

import re
from typing import Any

from tokenyard import TokenyardError
from tokenyard_kernels_cuda.toolchain._source import Source, headers

_FAMILIES = {8: "sm_80", 9: "sm_90a", 10: "sm_100", 12: "sm_120"}
"""Architecture by major compute capability; a cubin runs on all later GPUs of its family."""
_ERROR = re.compile(r"^(?P<file>[\w.]+)\((?P<line>\d+)\): (?:catastrophic )?error", re.MULTILINE)


class CompileError(TokenyardError):
    """NVRTC rejected a source. The message has the compiler log and the line of the first error."""


def architecture_of(capability: tuple[int, int]) -> str:
    """Return the architecture to compile for, for a GPU of a compute capability."""
    major, minor = capability
    return _FAMILIES.get(major, f"sm_{major}{minor}")


def options_for(source: Source, architecture: str) -> list[str]:
    """Return all compiler options of a source."""
    return [
        f"--gpu-architecture={architecture}",
        "-std=c++17",
        "--generate-line-info",
        *source.options(),
    ]


def compiler_version() -> str:
    """Return NVRTC's version. Raises CompileError if NVRTC is not installed."""
    from cuda.bindings import nvrtc

    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # cuda.bindings loads the library on the first call
        raise CompileError(f"NVRTC is not found ({error}); pip install nvidia-cuda-nvrtc") from None
    return f"{major}.{minor}"


def compile_cubin(source: Source, architecture: str) -> bytes:
    """Compile a source for an architecture, for example sm_90a. Raises CompileError."""
    from cuda.bindings import nvrtc

    names = [name.encode() for name in headers()]
    texts = [text.encode() for text in headers().values()]
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
    """Return the value of an NVRTC call. Raises CompileError if it failed."""
    result, *values = returned
    if int(result):
        raise CompileError(f"NVRTC failed: {result.name}")
    return values[0] if values else None


def _log(nvrtc: Any, program: Any) -> str:
    log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    return log.rstrip(b"\0\n").decode(errors="replace")


def _message(source: Source, architecture: str, result: str, log: str) -> str:
    """Return the message of a failed compilation, with the source line of the first error."""
    title = f"{source} does not compile for {architecture} by NVRTC {compiler_version()}"
    message = f"{title}:\n{log or result}"
    error = _ERROR.search(log)
    if error is None:
        return message
    texts = {source.name: source.text()} | headers()
    text = texts.get(error["file"])
    if text is None:
        return message
    number = int(error["line"])
    lines = text.splitlines() + [""] * number  # an error at the end of a file may be past its lines
    return f"{message}\nline {number} of {error['file']}: {lines[number - 1].strip()}"
