"""Run the CUDA kernels on a CPU: compile the same sources with g++ against ``emulator.h``."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from itertools import count
from pathlib import Path

from tokenyard import Backend, Workload
from tokenyard.registry import Registry
from tokenyard.registry._discover import Plugin
from tokenyard_kernels_cuda import _plugin
from tokenyard_kernels_cuda.toolchain import Source
from tokenyard_kernels_cuda.toolchain._source import headers

COMPILER = shutil.which("g++")
_FAULTS = {1: "has a deadlock", 2: "writes past its shared memory"}
_INSTRUCTION = re.compile(r'asm\("(\S+) %0, %1;" : "=\w"\((.+?)\) : "\w"\((.+?)\)\);')
_SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
_seeds = count(1)
_CTYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float}


def launch(source, name, device, grid, threads, shared, arguments):
    """Run a kernel; replaces the driver's launch."""
    values, layout = arguments
    codes = re.sub(r"@|\d+x", "", layout.format)
    values = [_CTYPES[code](value) for value, code in zip(values, codes, strict=True)]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    code = getattr(_library(source), f"run_{name}")(
        *grid[:2], threads, shared, next(_seeds), pointers
    )
    assert not code, f"{name} of {source} {_FAULTS[code]}"


@cache
def _library(source: Source) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="tokenyard-emulated-"))
    for name, text in (headers() | {source.name: source.text()}).items():
        (folder / name).write_text(_in_cpp(text))
    kernels = re.findall(r"__global__ void (\w+)\(", source.text())
    glue = "\n".join(f"RUN({name})" for name in kernels)
    (folder / "all.cc").write_text(f'#include "emulator.h"\n#include "{source.name}"\n{glue}\n')
    _compile(folder, "all.so", "all.cc", "-shared", f"-I{_emulator()}", *source.options())
    return ctypes.CDLL(str(folder / "all.so"))


@cache
def _emulator() -> Path:
    """Return a folder with the emulator as a precompiled header, the slowest part to compile."""
    folder = Path(tempfile.mkdtemp(prefix="tokenyard-emulator-"))
    shutil.copy(Path(__file__).with_name("emulator.h"), folder)
    _compile(folder, "emulator.h.gch", "emulator.h", "-x", "c++-header")
    return folder


def _compile(folder: Path, output: str, source: str, *options: str) -> None:
    command = [COMPILER, "-std=c++17", "-O1", "-w", "-fPIC", *options, "-o", output, source]
    subprocess.run(command, cwd=folder, check=True, timeout=120)


def _in_cpp(text: str) -> str:
    """Replace CUDA syntax that a C++ compiler rejects: shared memory and asm statements."""
    text = _SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(emulator::shared_memory());", text)
    return _INSTRUCTION.sub(lambda m: f"emulator::{m[1].replace('.', '_')}({m[2]}, {m[3]});", text)


def _usable(reason):
    """Return the backend's `unusable` as it would answer on a GPU."""

    def unusable(workload: Workload) -> str | None:
        options = {
            name: getattr(workload, name) for name in ("num_experts", "top_k", "router", "dtype")
        }
        gpu = Workload(workload.dim, workload.ffn_dim, device="cuda", capability=(9, 0), **options)
        return reason(gpu)

    return unusable


class _Offers:
    @staticmethod
    @_plugin.hookimpl
    def tokenyard_routers():
        return [
            Backend(
                "cuda", "tokenyard_kernels_cuda.router:CudaRouter", 0, _usable(_plugin.no_router)
            )
        ]

    @staticmethod
    @_plugin.hookimpl
    def tokenyard_permutations():
        path = "tokenyard_kernels_cuda.permutation:CudaPermutation"
        return [Backend("cuda", path, 0, _usable(_plugin.no_permutation))]


def registry() -> Registry:
    """Return a registry whose CUDA backends run on a CPU."""
    return Registry([Plugin(_Offers, "tokenyard-kernels-cuda", "emulated")])
