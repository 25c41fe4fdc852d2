"""`bench layer` on a GPU."""

from functools import partial

import pytest
import torch
from rich.console import Console

from tokenyard_bench.held import held_times
from tokenyard_bench.launch_times import launch_times
from tokenyard_bench.layer import bench_layer
from tokenyard_bench.shapes import Shape
from tokenyard_bench.sweep import Sweep

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    return torch.device("cuda")


def test_a_layer_of_bfloat16(device):
    shape = Shape("small", 1024, 256, 256, 8, 2)
    sweep = Sweep([shape], ["bf16"], ["natural", "zipf", "uniform"], device, repetitions=3)
    cases = bench_layer(sweep, "torch,cpu", "grouped_mm", Console(quiet=True))
    records = [record for records in cases for record in records]
    notes = {r["contestant"]: r["note"] for r in records}
    assert notes == {"dense": None, "torch": None, "grouped_mm": None, "cpu": notes["cpu"]}
    assert "the device is 'cuda'" in notes["cpu"]
    assert all(r["launches"] > 10 for r in records if "launches" in r)


def test_launches_of_few_tokens(device):
    sweep = Sweep([Shape("small", 8, 256, 256, 8, 2)], ["bf16"], ["natural"], device, repetitions=5)
    cases = bench_layer(
        sweep, "triton,torch", "none", Console(quiet=True), {"launches": launch_times}
    )
    records = {r["contestant"]: r for records in cases for r in records if "idle" in r}
    for record in records.values():
        assert 0 < record["host"]["forward"] < record["host"]["step"]
        assert record["idle"]["step"] > 0.5 * record["host"]["step"]
    fast = records["triton"]
    assert 0 < fast["graph"]["forward"] < fast["idle"]["forward"]
    assert fast["graph"]["forward"] < fast["graph"]["step"] < fast["idle"]["step"]


@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_held_multiprocessors_delay_a_layer_by_their_share(device, backend):
    """Not by a second round of programs, which would nearly double its time."""
    if backend == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("gluon is for Hopper GPUs")
    shape = Shape("wide", 16384, 2048, 768, 32, 8)
    sweep = Sweep([shape], ["bf16"], ["natural"], device, repetitions=9)
    share = torch.cuda.get_device_properties(device).multi_processor_count // 8
    more = {"held": partial(held_times, multiprocessors=share)}
    cases = bench_layer(sweep, backend, "none", Console(quiet=True), more)
    [record] = [record for records in cases for record in records if "held" in record]
    assert record["multiprocessors_held"] == share
    assert record["free"]["step"] < record["held"]["step"] < 1.35 * record["free"]["step"]


def test_a_layer_that_waits_for_all_streams_is_not_timed_beside_held_multiprocessors(device):
    x = torch.randn(512, 512, device=device)

    def waits(_):
        torch.cuda.synchronize()

    def multiplies(_):
        return x @ x

    sweep = Sweep([], [], [], device, repetitions=3)
    times = held_times(sweep, {"waits": (waits,) * 2, "multiplies": (multiplies,) * 2}, 8)
    assert list(times) == ["multiplies"]
    assert 0 < times["multiplies"]["held"]["forward"] < times["multiplies"]["held"]["step"]
