"""`bench layer`: which entrants are checked and timed, and what a record holds."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_post_hook

from tokenyard import BackendError, ConfigError
from tokenyard.experts import TorchExperts
from tokenyard.measure.timing import Spread, run_stages
from tokenyard_bench import entrants
from tokenyard_bench import layer as module
from tokenyard_bench.case import ROUTINGS, busiest, make_case
from tokenyard_bench.entrant import Entrant
from tokenyard_bench.entrants import backend_entrants, build_moe, peer_entrants
from tokenyard_bench.layer import bench_layer
from tokenyard_bench.oracle import Verdict, judge
from tokenyard_bench.shapes import Shape
from tokenyard_bench.sweep import Sweep
from tokenyard_bench.tables.layer import print_layers

SMALL = Shape("96,32,48,6,2", 96, 32, 48, 6, 2)
SWEEP = Sweep([SMALL], ["fp32"], ["natural"], torch.device("cpu"), repetitions=3)


def case(routing="natural", dtype=torch.float32, shape=SMALL):
    return make_case(shape, routing, dtype, torch.device("cpu"))


def run(sweep=SWEEP, backends="cpu,torch", peers="none", **more):
    cases = bench_layer(sweep, backends, peers, Console(quiet=True), more)
    return {record["contestant"]: record for records in cases for record in records}


def test_backends_are_timed_beside_dense_products():
    records = run()
    assert set(records) == {"dense", "cpu", "torch"}
    assert records["dense"]["efficiency"] == records["dense"]["forward_efficiency"] == 1
    for name in ("cpu", "torch"):
        record = records[name]
        assert 0 < record["forward_ms"]["median"] < record["step_ms"]["median"]
        assert record["step_ms"]["repetitions"] == 3
        assert record["efficiency"] == pytest.approx(
            records["dense"]["step_ms"]["median"] / record["step_ms"]["median"], abs=1e-4
        )
        assert record["error"] <= record["allowed"]
        assert record["shape"] == SMALL._asdict()


def scaled(case, factor):
    """A layer whose output is right but for a factor; so are its gradients."""
    moe = build_moe(case)

    def layer():
        y, routing = moe(case.x)
        return y * factor, routing

    return Entrant("bent", "backend", layer)


def stale_gradient(case):
    """A layer with the right output, and an input gradient that misses the router's part."""
    moe = build_moe(case)

    def layer():
        routing = moe.router(case.x.detach())
        return moe.experts(case.x, routing), routing

    return Entrant("bent", "backend", layer)


@pytest.mark.parametrize(
    ("bent", "said"), [(lambda c: scaled(c, 1.001), "is off by"), (stale_gradient, "d x is off by")]
)
def test_a_wrong_backend_is_reported_and_not_timed(monkeypatch, bent, said):
    monkeypatch.setattr(module, "backend_entrants", lambda case, names: [bent(case)])
    record = run()["bent"]
    assert record["note"].startswith("wrong: ")
    assert said in record["note"]
    assert "step_ms" not in record


def test_only_fp8_may_be_coarse(monkeypatch):
    """As what is multiplied, or as what is saved: about 8 times the error of bfloat16."""
    monkeypatch.setattr(entrants, "build_moe", lambda case, name: None)
    monkeypatch.setattr(entrants, "check_options", lambda chosen, offers: None)
    errors = {"torch": 1.0, "torch:save=fp8": 8.0, "torch:precision=fp8": 8.0}
    for entrant in backend_entrants(case(), ",".join(errors)):
        largest = errors[entrant.name] * 1e-3
        assert module._wrong(entrant, Verdict(0.99 * largest, 1e-3, "y")) is None
        assert "y is off by" in module._wrong(entrant, Verdict(1.01 * largest, 1e-3, "y"))


def test_a_failing_entrant_gets_a_note_and_the_others_are_timed(monkeypatch):
    def failing():
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(
        module,
        "backend_entrants",
        lambda case, names: [Entrant("sad", "backend", failing), *backend_entrants(case, "cpu")],
    )
    records = run()
    assert records["sad"]["note"] == "failed: RuntimeError: no such kernel"
    assert records["cpu"]["note"] is None


def test_an_unusable_peer_gives_its_reason():
    sweep = replace(SWEEP, activation="geglu")
    records = run(sweep, backends="cpu", peers="grouped_mm,grouped_mm-compiled")
    assert records["grouped_mm"]["note"] == "computes swiglu, not geglu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_entrant_computes_the_same_layer(routing, dtype):
    torch.manual_seed(3)
    tried = case(routing, dtype, Shape("", 160, 32, 64, 8, 3))
    entries = [
        *backend_entrants(tried, "cpu,torch"),
        *peer_entrants(tried, "grouped_mm,transformers-eager,transformers-grouped_mm"),
    ]
    present = [entry for entry in entries if isinstance(entry, Entrant)]
    assert [entry.name for entry in present[:3]] == ["cpu", "torch", "grouped_mm"]
    for entry in present:
        verdict = judge(tried, entry)
        assert verdict.error <= verdict.allowed * (1 if entry.group == "backend" else 8), (
            entry.name,
            verdict,
        )


def test_routings_are_as_skewed_as_they_say():
    shape = Shape("", 4000, 64, 16, 32, 4)
    skew = {}
    for routing in ROUTINGS:
        made = case(routing, shape=shape)
        skew[routing] = busiest(build_moe(made).router(made.x, made.topk_ids).topk_ids, 32)
    assert skew["uniform"] == 1
    assert 1 < skew["natural"] < 3
    # Popularity 1/r: the first of 32 gets a quarter of all draws, which is 8 times the mean.
    assert skew["zipf"] > 5


def test_all_leaves_out_oracles_but_they_can_be_named():
    assert "loop" not in [entry.name for entry in backend_entrants(case(), "all")]
    assert [entry.name for entry in backend_entrants(case(), "loop")] == ["loop"]


class Counting(TorchExperts):
    """Counts the versions of the weights that its forward passes see."""

    weights_have_versions = False

    def __init__(self, workload, permutation):
        super().__init__(workload, permutation)
        self.versions = []

    def __call__(self, x, plan, topk_weights, weights):
        assert self.weights_have_versions
        self.versions.append(weights.up._version)
        return super().__call__(x, plan, topk_weights, weights)


def test_weights_change_once_in_several_microbatches():
    """So a backend that keeps copies of the weights makes them once."""
    small = case()
    moe = build_moe(small, "torch")
    moe.experts.kernel = kernel = Counting(small.workload, None)
    kernel.weights_have_versions = True
    entrant = Entrant("counting", "backend", lambda: moe(small.x))
    for microbatches in (3, 1):
        kernel.versions.clear()
        run_stages(entrant.stages(small, microbatches))
        run_stages(entrant.stages(small, microbatches))
        assert len(kernel.versions) == 2 * microbatches
        assert len(set(kernel.versions)) == 2


def test_the_peak_counts_copies_of_weights_that_a_backend_keeps():
    """They exist since the check, until an optimizer's step drops them."""
    kept = []
    hook = register_optimizer_step_post_hook(lambda *_: kept.clear())
    small = case()
    moe = build_moe(small, "torch")

    def layer():
        if not kept:
            kept.append(torch.zeros(10_000_000))
        return moe(small.x)

    try:
        record = module._check(small, Entrant("keeps", "backend", layer))
    finally:
        hook.remove()
    assert record["note"] is None
    assert record["peak_bytes"] > 40_000_000 > 10 * record["saved_bytes"]


def test_the_time_of_a_step_is_that_of_one_microbatch():
    step = Spread(8.0, 6.0, 10.0, 5)
    alone = Spread(2.0, 1.5, 2.5, 5)
    assert step.of_one(4) == alone
    spreads = {module.DENSE: [alone, alone], "ours": [alone, step]}
    _, record = module._timed({"ours": {}}, spreads, 4)
    assert record["forward_ms"] == record["step_ms"] == alone._asdict()
    assert record["efficiency"] == 1


def test_names_and_options_of_backends_are_checked():
    with pytest.raises(BackendError, match="'cpu' has no such option"):
        run(backends="torch,cpu:chunk=3")
    with pytest.raises(ConfigError, match="'cpu:chunk' has the option 'chunk', which has no value"):
        run(backends="cpu:chunk")
    with pytest.raises(ConfigError, match="--backends 'cqu' is unknown"):
        run(backends="cqu:chunk=3")


def test_a_backend_with_options_is_compared_with_itself_without():
    """What FP8 gains and saves stands under the table."""
    ours = run()
    changed = {"step_ms": {"median": 2.0}, "saved_bytes": 3 << 20, "peak_bytes": 9 << 20}
    base = {"step_ms": {"median": 3.0}, "saved_bytes": 5 << 20, "peak_bytes": 4 << 20}
    plain = ours["torch"] | base
    other = ours["torch"] | changed | {"contestant": "torch:precision=fp8"}
    alone = ours["cpu"] | {"contestant": "cpu:chunk=3"}
    console = Console(record=True, width=140, file=io.StringIO())
    print_layers([plain, other, alone], console)
    text = console.export_text()
    line = (
        "torch:precision=fp8: 1.50 times as fast as torch, 2.00 MiB less saved, "
        "5.00 MiB more peak memory"
    )
    assert line in text
    assert text.count("times as fast") == 1
