"""Compiling, keeping, and launching with types; on a machine without a GPU, since NVRTC needs none."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc")

from tokenyard_kernels_cuda import __main__ as command
from tokenyard_kernels_cuda.sources import kernels, sources
from tokenyard_kernels_cuda.toolchain import (
    Array,
    CompileError,
    Float,
    Int,
    Kernel,
    Source,
    _cache,
    _compile,
    architecture_of,
    compile_cubin,
    cubin_of,
)

SPLIT = next(source for source in sources() if source.name == "split.cu")  # the quickest to compile


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Keep what is compiled in a folder of the test's own."""
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cubins"


@dataclass(frozen=True)
class Given(Source):
    """A source that a test writes."""

    content: str = ""

    def text(self):
        return self.content


class TestCompiling:
    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
    def test_every_kernel_for_every_architecture(self, architecture):
        def compiled(source):
            cubin = compile_cubin(source, architecture)
            wanted = [kernel.name for kernel in kernels() if kernel.source == source]
            return cubin.startswith(b"\x7fELF") and all(f".text.{name}\0".encode() in cubin for name in wanted)

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(compiled, sources()))

    def test_every_file_is_a_source(self):
        files = {file.name for file in _compile_folder().iterdir() if file.name.endswith(".cu")}
        assert files == {source.name for source in sources()}

    def test_every_kernel_of_a_file_has_its_parameters(self):
        """As many, in this order, by these names, and pointers where an array is."""
        for kernel in kernels():
            text = kernel.source.text().partition(f"void {kernel.name}(")[2].partition(")")[0]
            declared = {part.split()[-1]: "*" in part for part in text.split(",")}
            assert list(declared) == list(kernel.parameters), kernel.name
            for name, parameter in kernel.parameters.items():
                assert declared[name] == isinstance(parameter, Array), (kernel.name, name)

    def test_the_fault_is_shown_with_its_line(self):
        source = Given("wrong.cu", content='// one\nextern "C" __global__ void f() {\n  int x = y;\n}\n')
        with pytest.raises(CompileError) as caught:
            compile_cubin(source, "sm_80")
        lines = str(caught.value).splitlines()
        assert lines[0].startswith("wrong.cu does not compile for sm_80 by NVRTC 1")
        assert 'wrong.cu(3): error: identifier "y" is undefined' in lines
        assert lines[-1] == "line 3 of wrong.cu: int x = y;"

    def test_a_fault_in_a_header_is_shown_there(self, monkeypatch):
        monkeypatch.setattr(_compile, "headers", lambda: {"own.cuh": "// one\n#error here\n"})
        with pytest.raises(CompileError, match=r"line 2 of own.cuh: #error here"):
            compile_cubin(Given("uses.cu", content='#include "own.cuh"\n'), "sm_80")

    def test_an_architecture_that_does_not_exist(self):
        with pytest.raises(CompileError, match=r"does not compile for sm_7[\s\S]*invalid value for --gpu-architecture"):
            compile_cubin(SPLIT, "sm_7")

    @pytest.mark.parametrize(
        ("capability", "architecture"),
        [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 3), "sm_100"), ((12, 1), "sm_120")],
    )
    def test_what_to_compile_for(self, capability, architecture):
        assert architecture_of(capability) == architecture

    def test_without_nvrtc_it_says_so(self, monkeypatch):
        def missing():
            raise RuntimeError("libnvrtc.so: not found")

        monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcVersion", missing)
        with pytest.raises(CompileError, match=r"NVRTC is not found .*; pip install nvidia-cuda-nvrtc"):
            cubin_of(SPLIT, "sm_80")


def _compile_folder():
    from tokenyard_kernels_cuda.toolchain import _source

    return _source._FOLDER


class TestKeeping:
    def test_what_was_compiled_is_not_compiled_again(self, folder, monkeypatch):
        first = cubin_of(SPLIT, "sm_90a")
        assert len(list(folder.iterdir())) == 1
        monkeypatch.setattr(_cache, "compile_cubin", None)
        assert cubin_of(SPLIT, "sm_90a") == first

    def test_all_that_decides_is_in_the_name(self, monkeypatch):
        """Architecture, macros, text, headers, the compiler's version."""
        other = Given("split.cu", SPLIT.macros, "// other\n")
        names = [_cache._key(SPLIT, "sm_80"), _cache._key(SPLIT, "sm_90a"), _cache._key(Source("split.cu"), "sm_80")]
        names.append(_cache._key(other, "sm_80"))
        with monkeypatch.context() as patch:
            patch.setattr(_cache, "headers", lambda: {"warp.cuh": "//"})
            names.append(_cache._key(SPLIT, "sm_80"))
        with monkeypatch.context() as patch:
            patch.setattr(_cache, "compiler_version", lambda: "99.9")
            names.append(_cache._key(SPLIT, "sm_80"))
        assert len(set(names)) == 6
        assert _cache._key(SPLIT, "sm_80") == names[0]

    @pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:99] + b"?" + b[100:]])
    def test_a_damaged_entry_is_made_again(self, folder, damage):
        cubin = cubin_of(SPLIT, "sm_90a")
        (path,) = folder.iterdir()
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        assert cubin_of(SPLIT, "sm_90a") == cubin
        assert path.read_bytes() == whole

    def test_where_nothing_can_be_written_a_warning_says_so_once(self, folder, caplog):
        folder.parent.write_text("a file where the folder should be")
        with caplog.at_level(logging.WARNING):
            assert cubin_of(SPLIT, "sm_90a") == cubin_of(SPLIT, "sm_90a")
        (record,) = caplog.records
        assert f"compiled kernels cannot be kept in {folder}" in record.getMessage()

    def test_nothing_half_written_is_left(self, folder, monkeypatch):
        def full(*_):
            raise OSError("no space left")

        monkeypatch.setattr(_cache.os, "replace", full)
        cubin_of(SPLIT, "sm_90a")
        assert list(folder.iterdir()) == []

    def test_processes_may_compile_at_once(self, folder):
        code = (
            "from tokenyard_kernels_cuda.sources import sources; from tokenyard_kernels_cuda.toolchain import cubin_of;"
            "print(hash(bytes(cubin_of(sources()[0], 'sm_90a'))))"
        )
        environment = {"PYTHONHASHSEED": "1", "TOKENYARD_CACHE": str(folder.parent), "PATH": ""}
        command = [sys.executable, "-c", code]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
        said = [process.communicate(timeout=120)[0] for process in started]
        assert len(set(said)) == 1
        assert said[0].strip()
        assert len(list(folder.iterdir())) == 1


class TestLaunching:
    """Arguments are looked at before anything is compiled."""

    kernel = Kernel(SPLIT, "f", x=Array(torch.float32), y=Array(torch.int32, optional=True), n=Int(), a=Float())

    def arguments(self, **changes):
        given = {"x": torch.zeros(4, 4), "y": None, "n": 3, "a": 0.5} | changes
        return tuple(given.values())

    @pytest.fixture
    def launched(self, monkeypatch):
        calls = []
        monkeypatch.setattr("tokenyard_kernels_cuda.toolchain._driver.launch", lambda *args: calls.append(args))
        return calls

    def test_what_is_passed_on(self, launched):
        x, y = torch.zeros(4, 4), torch.zeros(2, dtype=torch.int32)
        self.kernel((5, 2), 64, *self.arguments(x=x, y=y), shared=16)
        self.kernel((5, 2), 64, *self.arguments(x=x))
        (first, second) = launched
        assert first[:2] + first[3:6] == (SPLIT, "f", (5, 2, 1), 64, 16)
        assert first[6][0] == (x.data_ptr(), y.data_ptr(), 3, 0.5)
        assert second[6][0] == (x.data_ptr(), 0, 3, 0.5)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"x": torch.zeros(4).half()}, "f: x is torch.float16, and must be a tensor of torch.float32"),
            ({"x": None}, "f: tensors are on 0 devices; they must be on one"),
            ({"x": 7, "y": torch.zeros(1).int()}, "f: x is int, and must be a tensor of torch.float32"),
            ({"x": torch.zeros(4, 4).t()[:2]}, r"f: x has strides \(1, 4\) and must be contiguous"),
            ({"y": torch.zeros(1, device="meta").int()}, "f: tensors are on 2 devices; they must be on one"),
            ({"n": 1 << 31}, "f: n is 2147483648, and must be an integer of 32 bits"),
            ({"n": 1.5}, "f: n is 1.5, and must be an integer of 32 bits"),
            ({"a": "1"}, "f: a is '1', and must be a number"),
        ],
    )
    def test_what_a_kernel_does_not_take(self, launched, changes, sentence):
        with pytest.raises(TypeError, match=sentence):
            self.kernel((1, 1), 32, *self.arguments(**changes))
        assert not launched

    def test_how_many_arguments(self, launched):
        with pytest.raises(TypeError, match="f takes 4 arguments, and 3 were given"):
            self.kernel((1, 1), 32, *self.arguments()[:3])

    @pytest.mark.parametrize("grid", [(0, 1), (1, 1 << 16), (1 << 31, 1)])
    def test_a_grid_that_cannot_be(self, launched, grid):
        with pytest.raises(ValueError, match=r"f: \d+ blocks along [xy]; there may be 1 to \d+"):
            self.kernel(grid, 32, *self.arguments())


class TestCommand:
    """`python -m tokenyard_kernels_cuda`."""

    def test_it_compiles_all_and_says_where(self, capsys, folder, monkeypatch):
        monkeypatch.setattr(command, "sources", lambda: [SPLIT])
        assert command.main(["sm_90a"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{SPLIT} ")
        assert f"kept in {folder}" in said

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ([], "there is no GPU here to compile for; give an architecture, such as sm_90a"),
            (["sm_80", "sm_90a"], "usage: "),
            (["--help"], "usage: "),
            (["hopper"], "does not compile for hopper"),
        ],
    )
    def test_a_mistake_is_said(self, capsys, monkeypatch, arguments, sentence):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert command.main(arguments) == 2
        assert sentence in capsys.readouterr().err
