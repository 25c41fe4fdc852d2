"""Tiles on Hopper: the shipped table, the file of tuned ones, and the command that fills it."""

import json

import pytest
import torch

from tokenyard_kernels_triton import gluon_tiling as tiles
from tokenyard_kernels_triton.__main__ import main
from tokenyard_kernels_triton.gluon_tiling import (
    PRODUCTS,
    GluonTiling,
    bucket,
    gluon_tiling,
    keep_tuned,
)

CPU = torch.device("cpu")
TOO_LARGE = {"stages": 9, "chunk": 64, "buffers": 1, "columns": 256, "depth": 64, "group": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder for tuned tiles that is this test's alone."""
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path))
    tiles._tuned.cache_clear()
    yield tmp_path
    tiles._tuned.cache_clear()


@pytest.mark.parametrize("ffn_dim", [768, 14336])
@pytest.mark.parametrize("product", PRODUCTS)
def test_shipped_tiles_fit_into_shared_memory(product, ffn_dim):
    assert gluon_tiling(product, 2048, ffn_dim, CPU).fits(product)


@pytest.mark.parametrize("product", PRODUCTS)
def test_an_h100_has_tiles_of_its_own_for_wide_experts(product, monkeypatch):
    """For one product; they fit, too."""
    usual = gluon_tiling(product, 2048, 14336, CPU)
    fine = gluon_tiling(product, 2048, 768, CPU)
    monkeypatch.setattr(tiles, "gpu_key", lambda device: "NVIDIA H100 80GB HBM3, Triton 3.6.0")
    found = gluon_tiling(product, 2048, 14336, CPU)
    assert found.fits(product)
    assert (found == usual) == (product != "input_gradient")
    assert gluon_tiling(product, 2048, 768, CPU) == fine


def test_tuned_tiles_are_taken_for_their_bucket_only(cache):
    mine = GluonTiling(3, 32, 1, group=7)
    path = keep_tuned(tiles.gpu_key(CPU), {bucket("down", 2048, 768): mine})
    assert path.parent == cache
    assert gluon_tiling("down", 1500, 1000, CPU) == mine  # both widths round up to the same
    assert gluon_tiling("down", 2048, 1025, CPU) != mine
    assert gluon_tiling("up", 2048, 768, CPU) != mine


def test_keeping_more_keeps_what_was_there():
    one, two = GluonTiling(3, 32, 1), GluonTiling(4, 32, 1)
    keep_tuned(tiles.gpu_key(CPU), {bucket("down", 64, 64): one})
    keep_tuned("another GPU", {bucket("down", 64, 64): two})
    keep_tuned(tiles.gpu_key(CPU), {bucket("up", 64, 64): two})
    assert gluon_tiling("down", 64, 64, CPU) == one
    assert gluon_tiling("up", 64, 64, CPU) == two


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"a GPU": 3}'])
def test_a_spoilt_file_is_left_aside(cache, text, caplog):
    (cache / "triton_tiles.json").write_text(text)
    assert gluon_tiling("down", 64, 64, CPU).stages == 3
    assert ("triton_tiles.json" in caplog.text) == (text == "{")


@pytest.mark.parametrize("entry", [{"stages": 3}, {"stages": -1}, TOO_LARGE, "fast", None])
def test_a_spoilt_entry_is_left_aside(cache, entry):
    known = {tiles.gpu_key(CPU): {bucket("down", 64, 64): entry}}
    (cache / "triton_tiles.json").write_text(json.dumps(known))
    assert gluon_tiling("down", 64, 64, CPU) == gluon_tiling("down", 32, 64, CPU)


def test_tuning_takes_the_fastest_of_many_that_fit():
    """With a clock that runs nothing and likes 4 stages, small chunks and groups of 16."""
    from tokenyard_kernels_triton.tune import candidates, tune

    tried: list[GluonTiling] = []

    def clock(call):
        (tiling,) = call.__defaults__ or (None,)
        if tiling is None:
            return 9.0
        tried.append(tiling)
        return 5 - tiling.stages + tiling.chunk / 100 + abs(tiling.group - 16) + tiling.buffers / 10

    results = tune(64, 64, 64, 4, 2, clock)
    assert [r.product for r in results] == list(PRODUCTS)
    assert {r.best for r in results} == {GluonTiling(4, 32, 1, group=16)}
    assert all(r.shipped_ms == 9 and r.best_ms == pytest.approx(1.42) for r in results)
    assert len(tried) == sum(len(candidates(product)) for product in PRODUCTS)
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
def test_tuning_runs_and_is_kept(cache, monkeypatch, capsys):
    """Of few candidates, since each is compiled."""
    from tokenyard_kernels_triton import tune

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper")
    few = [GluonTiling(3, 64, 1), GluonTiling(4, 32, 1)]
    monkeypatch.setattr(tune, "candidates", lambda product: few)
    assert main(["512,512,512,8,2"]) == 0
    (kept,) = json.loads((cache / "triton_tiles.json").read_text()).values()
    assert len(kept) == len(PRODUCTS)
    assert "kept in" in capsys.readouterr().out
