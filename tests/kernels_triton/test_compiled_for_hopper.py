"""The kernels compile for sm_90 by the GPU machine's Triton: tensor cores, no spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

VERSION = "3.6.0"
MATMULS = ("up_and_activate", "times_weight", "weight_gradient")
GLUON_MATMULS = (*MATMULS, "differentiate_down")
LOW_RANK = (
    "to_low_rank",
    "add_low_rank",
    "add_low_rank_and_activate",
    "low_rank_gradient",
)
FEW_ROWS = (
    "up_and_activate_few",
    "times_weight_few",
    "differentiate_down_few",
    "weight_gradient_few",
)
BLOCK_SPARSE = ("dense_times_dense", "sparse_times_dense")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> list[dict]:
    """Compile in a process without the interpreter, by a Triton that is fetched if needed."""
    path = os.environ.get("PYTHONPATH", "")
    if triton.__version__ != VERSION:
        folder = tmp_path_factory.mktemp("triton")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run(
            [*pip, "--target", str(folder), f"triton=={VERSION}"], check=True, timeout=400
        )
        path = os.pathsep.join((str(folder), path))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    program = [sys.executable, str(Path(__file__).with_name("compile_for_hopper.py"))]
    text = subprocess.run(
        program, check=True, timeout=900, env=environment, capture_output=True, text=True
    ).stdout
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def records(output) -> list[dict]:
    return output[:-1]


def test_prepare_compiles_all_kernels_of_a_layer(output):
    assert output[-1] == {"not prepared": []}


def of(records: list[dict], **wanted) -> list[dict]:
    return [
        record for record in records if all(record[key] == value for key, value in wanted.items())
    ]


def test_every_kernel_of_a_layer_was_compiled(records):
    for kernels, matmuls in (("GluonExperts", GLUON_MATMULS), ("TritonExperts", MATMULS)):
        assert {record["kernel"] for record in of(records, kernels=kernels)} >= set(matmuls)
    plan = {"plan_at_once", "count_blocks", "add_up_blocks", "place_slots", "list_tiles"}
    router = {"select_experts", "weigh_experts", "weigh_experts_backward", "split_in_two"}
    rest = {
        "copy_to_rows",
        "sum_to_tokens",
        "differentiate",
        "sum_dots",
        "sum_rows",
        "quantize_rows",
        "dequantize_rows",
    }
    moves = {"clear_tail", "weigh_to_rows", "dot_with_rows"}
    assert {record["kernel"] for record in records} >= plan | router | rest | moves


def test_an_h100_has_a_kernel_of_its_own(records):
    """Only times_weight has one; all else comes from the H200's table."""
    assert [record["kernel"] for record in of(records, case="widest on an H100")] == [
        "times_weight"
    ]


def test_a_repeated_launch_passes_the_parameters_of_the_binary(records):
    """No kernel is left to Triton's launcher. TMA descriptors are structs of 128 bytes."""
    assert [r["passed"] for r in records] == [r["parameters"] for r in records]
    assert any(128 in r["passed"] for r in of(records, kernels="GluonExperts"))


def test_nothing_spills(records):
    """Two may spill a little, outside of their main loops.

    They are odd widths, whose rows are not aligned, and matmuls in FP8 that gather: these load up
    to four registers again once a tile.
    """
    spilling = [record for record in records if record["spilled"]]
    in_fp8 = [r for r in spilling if r["kernels"] == "GluonExperts in FP8"]
    assert all(r["gathers"] and r["spilled"] <= 16 for r in in_fp8)
    others = [r for r in spilling if r not in in_fp8]
    assert not [r for r in others if r["case"] != "odd"]
    assert not [r for r in spilling if r["spilled"] > 96]


def test_16_bit_matmuls_use_the_tensor_cores(records):
    """Every matmul in bfloat16 and float16 has wgmma, and none the slower mma of Ampere."""
    matmuls = (*GLUON_MATMULS, *BLOCK_SPARSE)
    half = [r for r in records if r["kernel"] in matmuls and r["dtype"] != "float32"]
    assert half
    assert not [r for r in half if not r["wgmma"] or r["mma"]]


def test_gluon_matmuls_use_tma(records):
    """They also multiply 256 columns an instruction and fit into shared memory.

    The up matmul of a gelu without a gate has 128 columns, so that its epilogue spills nothing.
    """
    matmuls = [r for r in of(records, kernels="GluonExperts") if r["kernel"] in GLUON_MATMULS]
    sparse = of(records, kernels="block_sparse in Gluon")
    assert {r["kernel"] for r in sparse} == set(BLOCK_SPARSE)
    matmuls += sparse
    half = {(r["kernel"], r["activation"]) for r in matmuls if r["wgmma"] == ["m64n128k16"]}
    assert half == {("up_and_activate", "gelu"), ("up_and_activate", "gelu_tanh")}
    assert {tuple(r["wgmma"]) for r in matmuls} == {("m64n128k16",), ("m64n256k16",)}
    assert all(r["tma"] and r["shared"] <= 232448 for r in matmuls)


def test_fp8_matmuls_add_slices_of_128_apart(records):
    """They multiply e4m3, a quarter of a tile an instruction: m64n64k32.

    A gathered operand is copied 16 bytes at a time, as in 16 bits.
    """
    compiled = of(records, kernels="GluonExperts in FP8")
    names = ("up_and_activate_fp8", "times_weight_fp8")
    matmuls = [r for r in compiled if r["kernel"] in (*names, "weight_gradient_fp8")]
    others = {"quantize_weights", "differentiate_fp8", "pack_row", "unpack_row"}
    others |= {"weight_gradient_fp8", "transpose_rows"}
    assert {r["kernel"] for r in compiled} >= {*names, *others}
    assert {tuple(r["wgmma"]) for r in matmuls} == {("m64n64k32",)}
    assert all(r["tma"] and r["shared"] <= 232448 for r in matmuls)
    assert {r["kernel"] for r in matmuls if r["gathers"]} == set(names)
    assert {r["case"] for r in matmuls if r["gathers"]} == {"narrow"}


def test_narrow_experts_gather_their_rows(records):
    """Matmuls over tokens use asynchronous copies of 16 bytes; wide experts copy rows first."""
    matmuls = [r for r in of(records, kernels="GluonExperts") if r["kernel"] in GLUON_MATMULS]
    over_tokens = {"up_and_activate", "differentiate_down", "weight_gradient"}
    assert {r["kernel"] for r in matmuls if r["gathers"]} == over_tokens
    wide = {"wide", "widest", "widest on an H100"}
    assert not wide & {r["case"] for r in matmuls if r["gathers"]}


def test_sums_and_muon_are_compiled(records):
    """Weight gradients are added by TMA, with the registers and tiles of those that are stored."""
    added = of(records, kernels="sums of GluonExperts", kernel="weight_gradient")
    stored = of(records, kernels="GluonExperts", kernel="weight_gradient")
    assert {r["registers"] for r in added} == {r["registers"] for r in stored}
    assert all(r["tma"] and r["shared"] <= 232448 for r in added)
    assert of(records, kernels="sums of TritonExperts", kernel="weight_gradient")
    compiled = of(records, kernels="muon")
    names = {"nesterov", "scale_matrices", "symmetric_product", "descend"}
    assert {r["kernel"] for r in compiled} == names
    products = of(compiled, kernel="symmetric_product")
    assert {tuple(r["wgmma"]) for r in products} == {("m64n128k16",)}
    assert all(r["tma"] and r["shared"] <= 232448 for r in products)


def test_adapters_compile_for_every_kernel_set_and_dtype(records):
    """With 16-bit matmuls on the tensor cores, and frozen matmuls that gather their rows."""
    for kernels in ("GluonExperts", "TritonExperts"):
        compiled = of(records, kernels=f"adapters of {kernels}")
        assert {r["kernel"] for r in compiled} >= set(LOW_RANK)
        low_rank = [r for r in compiled if r["kernel"] in LOW_RANK and r["dtype"] != "float32"]
        assert all(r["wgmma"] and not r["mma"] for r in low_rank)
    gluon = of(records, kernels="adapters of GluonExperts", kernel="times_weight")
    assert any(r["gathers"] and r["tma"] for r in gluon)


def test_block_sparse_matmuls_load_16_bytes_ahead(records):
    """All operands of aligned matmuls, transposed or not, by asynchronous copies."""
    matmuls = [r for r in of(records, kernels="block_sparse") if r["case"] != "odd"]
    assert {r["kernel"] for r in matmuls} == set(BLOCK_SPARSE)
    assert all(r["gathers"] for r in matmuls)


def test_matmuls_of_few_rows_load_weights_ahead(records):
    """Weights are the 64 rows of an instruction, and the rows of an expert its columns."""
    matmuls = [r for r in records if r["kernel"] in FEW_ROWS]
    assert {r["kernel"] for r in matmuls} == set(FEW_ROWS)
    assert all(r["wgmma"] and not r["mma"] and r["gathers"] for r in matmuls)
    swapped = [r for r in matmuls if r["kernel"] != "weight_gradient_few"]
    assert {size for r in swapped for size in r["wgmma"]} == {
        f"m64n{rows}k16" for rows in (16, 32, 64)
    }


def test_other_token_counts_compile_nothing(records):
    """An odd count and a single token compile nothing after an even count."""
    assert not of(records, case="more tokens") + of(records, case="one token")
