"""`bench layer` on a GPU."""

import pytest
import torch
from rich.console import Console

from tokenyard_bench.layer import LayerBench, bench_layer
from tokenyard_bench.shapes import Shape

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    return torch.device("cuda")


def test_a_layer_of_bfloat16(device):
    shape = Shape("small", 1024, 256, 256, 8, 2)
    routings = ["natural", "zipf", "uniform"]
    bench = LayerBench(
        [shape], routings, ["bf16"], device, "torch,cpu", "grouped_mm", repetitions=3
    )
    records = [record for found in bench_layer(bench, Console(quiet=True)) for record in found]
    notes = {r["contestant"]: r["note"] for r in records}
    assert notes == {"dense": None, "torch": None, "grouped_mm": None, "cpu": notes["cpu"]}
    assert "the device is 'cuda'" in notes["cpu"]
    assert all(r["launches"] > 10 for r in records if "launches" in r)
