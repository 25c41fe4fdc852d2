"""The cache of cubins: entries are reused, and recompiled if corrupt."""

import logging
import subprocess
import sys

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from example_sources import SPLIT, TextSource

from tokenyard_kernels_cuda.toolchain import Source, _cache, cubin_of


def test_cached_cubin_is_not_compiled_again(cubins, monkeypatch):
    first = cubin_of(SPLIT, "sm_90a")
    assert len(list(cubins.iterdir())) == 1
    monkeypatch.setattr(_cache, "compile_cubin", None)
    assert cubin_of(SPLIT, "sm_90a") == first


def test_key_covers_all_inputs(monkeypatch):
    """Architecture, macros, text, headers, the compiler's version."""
    other = TextSource("split.cu", SPLIT.macros, "// other\n")
    names = [
        _cache._key(SPLIT, "sm_80"),
        _cache._key(SPLIT, "sm_90a"),
        _cache._key(Source("split.cu"), "sm_80"),
    ]
    names.append(_cache._key(other, "sm_80"))
    with monkeypatch.context() as patch:
        patch.setattr(_cache, "headers", lambda: {"warp.cuh": "//"})
        names.append(_cache._key(SPLIT, "sm_80"))
    with monkeypatch.context() as patch:
        patch.setattr(_cache, "compiler_version", lambda: "99.9")
        names.append(_cache._key(SPLIT, "sm_80"))
    assert len(set(names)) == 6
    assert _cache._key(SPLIT, "sm_80") == names[0]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:99] + b"?" + b[100:]]
)
def test_corrupt_entry_is_recompiled(cubins, damage):
    cubin = cubin_of(SPLIT, "sm_90a")
    (path,) = cubins.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert cubin_of(SPLIT, "sm_90a") == cubin
    assert path.read_bytes() == whole


def test_unwritable_folder_warns_once(cubins, caplog):
    cubins.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert cubin_of(SPLIT, "sm_90a") == cubin_of(SPLIT, "sm_90a")
    (record,) = caplog.records
    assert f"compiled kernels cannot be kept in {cubins}" in record.getMessage()


def test_failed_write_leaves_no_file(cubins, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(_cache.os, "replace", full)
    cubin_of(SPLIT, "sm_90a")
    assert list(cubins.iterdir()) == []


def test_processes_can_compile_at_the_same_time(cubins):
    code = (
        "from tokenyard_kernels_cuda.sources import sources;"
        "from tokenyard_kernels_cuda.toolchain import cubin_of;"
        "print(hash(bytes(cubin_of(sources()[0], 'sm_90a'))))"
    )
    environment = {"PYTHONHASHSEED": "1", "TOKENYARD_CACHE": str(cubins.parent), "PATH": ""}
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert len(set(outputs)) == 1
    assert outputs[0].strip()
    assert len(list(cubins.iterdir())) == 1
