"""Compilation with NVRTC, which needs no GPU."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from example_sources import SPLIT, TextSource

from tokenyard_kernels_cuda.sources import kernels, sources
from tokenyard_kernels_cuda.toolchain import (
    Array,
    CompileError,
    _compile,
    _source,
    architecture_of,
    compile_cubin,
    cubin_of,
)

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")


def compiled(source, architecture):
    """Compile a source; return whether the cubin holds its kernels."""
    cubin = compile_cubin(source, architecture)
    sections = [f".text.{kernel.name}\0" for kernel in kernels() if kernel.source == source]
    return cubin.startswith(b"\x7fELF") and all(s.encode() in cubin for s in sections)


@pytest.mark.parametrize("number", range(len(ARCHITECTURES)), ids=ARCHITECTURES)
def test_kernels_compile(number):
    """Every kernel for one architecture: those of a file differ in dtype and architecture."""
    step = len(ARCHITECTURES)
    assert all(compiled(source, ARCHITECTURES[number]) for source in sources()[number::step])


@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_for_every_architecture(architecture):
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda source: compiled(source, architecture), sources()))


def test_every_file_is_listed_as_a_source():
    files = {file.name for file in _source._FOLDER.iterdir() if file.name.endswith(".cu")}
    assert files == {source.name for source in sources()}


def test_python_parameters_match_the_kernel_s_signature():
    """The same names in the same order; arrays are pointers."""
    for kernel in kernels():
        code = re.sub("//.*", "", kernel.source.text())
        text = code.partition(f"void {kernel.name}(")[2].partition(")")[0]
        declared = {part.split()[-1]: "*" in part for part in text.split(",")}
        assert list(declared) == list(kernel.parameters), kernel.name
        for name, parameter in kernel.parameters.items():
            assert declared[name] == isinstance(parameter, Array), (kernel.name, name)


def test_every_kernel_first_waits_for_the_launch_before():
    """Launches are chained, so a kernel that does not wait reads what is not written yet."""
    for kernel in kernels():
        _, _, body = kernel.source.text().partition(f"void {kernel.name}(")
        _, _, body = body.partition("{")
        assert body.strip().startswith("wait_for_launch_before();"), kernel.name


def test_compile_error_shows_the_source_line():
    source = TextSource(
        "wrong.cu", content='// one\nextern "C" __global__ void f() {\n  int x = y;\n}\n'
    )
    with pytest.raises(CompileError) as caught:
        compile_cubin(source, "sm_80")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("wrong.cu does not compile for sm_80 by NVRTC 1")
    assert 'wrong.cu(3): error: identifier "y" is undefined' in lines
    assert lines[-1] == "line 3 of wrong.cu: int x = y;"


def test_compile_error_in_a_header_shows_the_header_s_line(monkeypatch):
    monkeypatch.setattr(_compile, "headers", lambda: {"own.cuh": "// one\n#error here\n"})
    with pytest.raises(CompileError, match=r"line 2 of own.cuh: #error here"):
        compile_cubin(TextSource("uses.cu", content='#include "own.cuh"\n'), "sm_80")


def test_unknown_architecture_is_a_compile_error():
    with pytest.raises(
        CompileError, match=r"does not compile for sm_7[\s\S]*invalid value for --gpu-architecture"
    ):
        compile_cubin(SPLIT, "sm_7")


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90a"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
    ],
)
def test_architecture_of_a_compute_capability(capability, architecture):
    assert architecture_of(capability) == architecture


def test_missing_nvrtc_names_the_package_to_install(monkeypatch):
    def missing():
        raise RuntimeError("libnvrtc.so: not found")

    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcVersion", missing)
    with pytest.raises(CompileError, match=r"NVRTC is not found .*; pip install nvidia-cuda-nvrtc"):
        cubin_of(SPLIT, "sm_80")
