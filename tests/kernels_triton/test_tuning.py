"""Tiles on Hopper GPUs: the shipped table, the file of tuned ones, and the command."""

import json

import pytest
import torch

from tokenyard_kernels_triton import gluon_tiling as tiles
from tokenyard_kernels_triton.__main__ import main
from tokenyard_kernels_triton.gluon_tiling import (
    MATMULS,
    GluonTiling,
    bucket,
    gluon_tiling,
    keep_tuned,
)

CPU = torch.device("cpu")
TOO_LARGE = {"stages": 9, "chunk": 64, "buffers": 1, "columns": 256, "depth": 64, "group": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for tuned tiles."""
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path))
    tiles._tuned.cache_clear()
    yield tmp_path
    tiles._tuned.cache_clear()


@pytest.mark.parametrize("ffn_dim", [256, 768, 14336])
@pytest.mark.parametrize("matmul", MATMULS)
def test_shipped_tiles_fit_into_shared_memory(matmul, ffn_dim):
    assert gluon_tiling(matmul, 2048, ffn_dim, CPU).fits(matmul)


@pytest.mark.parametrize("matmul", MATMULS)
def test_an_h100_has_tiles_of_its_own_for_wide_experts(matmul, monkeypatch):
    """For one matmul; its tiles fit into shared memory."""
    usual = gluon_tiling(matmul, 2048, 14336, CPU)
    fine = gluon_tiling(matmul, 2048, 768, CPU)
    monkeypatch.setattr(tiles, "gpu_key", lambda device: "NVIDIA H100 80GB HBM3, Triton 3.6.0")
    on_h100 = gluon_tiling(matmul, 2048, 14336, CPU)
    assert on_h100.fits(matmul)
    assert (on_h100 == usual) == (matmul != "input_gradient")
    assert gluon_tiling(matmul, 2048, 768, CPU) == fine


def test_tuned_tiles_apply_to_their_bucket_only(cache):
    tuned = GluonTiling(3, 32, 1, group=7)
    path = keep_tuned(tiles.gpu_key(CPU), {bucket("down", 2048, 768): tuned})
    assert path.parent == cache
    assert gluon_tiling("down", 1500, 1000, CPU) == tuned  # both widths round up to the same
    assert gluon_tiling("down", 2048, 1025, CPU) != tuned
    assert gluon_tiling("up", 2048, 768, CPU) != tuned


def test_storing_tiles_keeps_the_others():
    one = GluonTiling(3, 32, 1)
    two = GluonTiling(4, 32, 1)
    keep_tuned(tiles.gpu_key(CPU), {bucket("down", 64, 64): one})
    keep_tuned("another GPU", {bucket("down", 64, 64): two})
    keep_tuned(tiles.gpu_key(CPU), {bucket("up", 64, 64): two})
    assert gluon_tiling("down", 64, 64, CPU) == one
    assert gluon_tiling("up", 64, 64, CPU) == two


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"a GPU": 3}'])
def test_a_broken_file_is_ignored(cache, text, caplog):
    (cache / "triton_tiles.json").write_text(text)
    assert gluon_tiling("down", 64, 768, CPU).stages == 3
    assert ("triton_tiles.json" in caplog.text) == (text == "{")


@pytest.mark.parametrize("entry", [{"stages": 3}, {"stages": -1}, TOO_LARGE, "fast", None])
def test_a_broken_entry_is_ignored(cache, entry):
    known = {tiles.gpu_key(CPU): {bucket("down", 64, 64): entry}}
    (cache / "triton_tiles.json").write_text(json.dumps(known))
    assert gluon_tiling("down", 64, 64, CPU) == gluon_tiling("down", 32, 64, CPU)


def test_tuning_selects_the_fastest_tile():
    """The clock runs nothing and prefers 4 stages, small chunks and groups of 16."""
    from tokenyard_kernels_triton.tune import candidates, tune

    tried: list[GluonTiling] = []

    def clock(call):
        (tiling,) = call.__defaults__ or (None,)
        if tiling is None:
            return 9.0
        tried.append(tiling)
        return 5 - tiling.stages + tiling.chunk / 100 + abs(tiling.group - 16) + tiling.buffers / 10

    results = tune(64, 64, 64, 4, 2, clock)
    assert [r.matmul for r in results] == list(MATMULS)
    assert {r.best for r in results} == {GluonTiling(4, 32, 1, group=16)}
    assert all(r.shipped_ms == 9 and r.best_ms == pytest.approx(1.42) for r in results)
    assert len(tried) == sum(len(candidates(matmul)) for matmul in MATMULS)
    assert all(tiling.fits("up") for tiling in candidates("up"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "usage:"),
        (["1,2,3"], "'1,2,3' is not five whole numbers above 0"),
        (["64,64,64,4,8"], "top_k is 8 but num_experts is 4"),
        (["64,64,64,4,2"], "nothing to tune: 'gluon'"),
    ],
)
def test_the_command_declines_in_one_sentence(arguments, sentence, capsys):
    if torch.cuda.is_available() and sentence.startswith("nothing"):
        pytest.skip("a GPU may be tuned")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence), said
    assert said.count("\n") == 1


@pytest.mark.gpu
def test_tuned_tiles_are_stored(cache, monkeypatch, capsys):
    """Few candidates, because each one is compiled."""
    from tokenyard_kernels_triton import tune

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper")
    few = [GluonTiling(3, 64, 1), GluonTiling(4, 32, 1)]
    monkeypatch.setattr(tune, "candidates", lambda matmul: few)
    assert main(["512,512,512,8,2"]) == 0
    (kept,) = json.loads((cache / "triton_tiles.json").read_text()).values()
    assert len(kept) == len(MATMULS)
    assert "kept in" in capsys.readouterr().out
