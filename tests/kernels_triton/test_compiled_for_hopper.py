"""What is shipped compiles for sm_90 by the GPU machine's Triton, without spilling and onto the matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

VERSION = "3.6.0"
PRODUCTS = ("up_and_activate", "times_weight", "weight_gradient")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> list[dict]:
    """Compile in a process that does not interpret, with a Triton fetched for it if another is installed."""
    path = os.environ.get("PYTHONPATH", "")
    if triton.__version__ != VERSION:
        folder = tmp_path_factory.mktemp("triton")
        fetch = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(folder),
        ]
        subprocess.run([*fetch, f"triton=={VERSION}"], check=True, timeout=400)
        path = os.pathsep.join((str(folder), path))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    program = [sys.executable, str(Path(__file__).with_name("compile_for_hopper.py"))]
    text = subprocess.run(
        program, check=True, timeout=400, env=environment, capture_output=True, text=True
    ).stdout
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def records(output) -> list[dict]:
    return output[:-1]


def test_what_is_prepared_is_all_that_a_layer_launches(output):
    assert output[-1] == {"not prepared": []}


def of(records: list[dict], **wanted) -> list[dict]:
    return [
        record for record in records if all(record[key] == value for key, value in wanted.items())
    ]


def test_every_kernel_of_a_layer_was_compiled(records):
    for kernels in ("GluonExperts", "TritonExperts"):
        assert {record["kernel"] for record in of(records, kernels=kernels)} >= set(PRODUCTS)
    plan = {"count_blocks", "add_up_blocks", "place_slots", "list_tiles"}
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
    """Of the three that multiply rows by weights; all else is what the table of the H200 gives."""
    assert [record["kernel"] for record in of(records, case="widest on an H100")] == [
        "times_weight"
    ]


def test_nothing_spills(records):
    """Odd widths, whose rows begin at odd addresses, may a little, and so may the error function of `geglu`."""
    spilling = [record for record in records if record["spilled"]]
    assert not [r for r in spilling if r["case"] != "odd" and r["activation"] != "geglu"]
    assert not [r for r in spilling if r["spilled"] > 96]


def test_narrow_products_use_the_matrix_units(records):
    """wgmma in every product in bfloat16 and float16, and never the slower mma of Ampere."""
    narrow = [r for r in records if r["kernel"] in PRODUCTS and r["dtype"] != "float32"]
    assert narrow
    assert not [r for r in narrow if not r["wgmma"] or r["mma"]]


def test_gluon_products_use_the_copy_engine(records):
    """And 256 columns an instruction, and no more shared memory than there is."""
    products = [r for r in of(records, kernels="GluonExperts") if r["kernel"] in PRODUCTS]
    assert {tuple(r["wgmma"]) for r in products} == {("m64n256k16",)}
    assert all(r["tma"] and r["shared"] <= 232448 for r in products)


def test_narrow_experts_collect_their_rows(records):
    """By asynchronous copies of 16 bytes in the products whose rows are tokens; wide ones have them copied first."""
    products = [r for r in of(records, kernels="GluonExperts") if r["kernel"] in PRODUCTS]
    assert {r["kernel"] for r in products if r["collects"]} == set(PRODUCTS)
    assert {r["case"] for r in products if r["collects"]} == {"narrow"}


def test_other_token_counts_compile_nothing(records):
    """Odd ones, and a single token, after an even one."""
    assert not of(records, case="more tokens") + of(records, case="one token")
