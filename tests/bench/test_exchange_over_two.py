"""`bench exchange`: which entrants are checked and timed over ranks, and what a record holds."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count
from unittest import mock

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tokenyard import ConfigError, TokenyardError, Workload
from tokenyard.measure.timing import CpuClock
from tokenyard.testing import ranks
from tokenyard_bench.case import make_case
from tokenyard_bench.commands import run_exchange
from tokenyard_bench.compare import compare
from tokenyard_bench.exchange import (
    ExchangeSettings,
    World,
    bench_exchange,
    check_ranks,
    join_ranks,
)
from tokenyard_bench.exchange.entrant import Candidate
from tokenyard_bench.exchange.marks import MarkedPermutation, Marks, end_pass, marked_compute
from tokenyard_bench.exchange.measure import CaseMeasurement
from tokenyard_bench.exchange.ours import check_experts, parse_exchanges
from tokenyard_bench.exchange.rank_case import part_of
from tokenyard_bench.exchange.times import Timer
from tokenyard_bench.options import ExchangeOptions
from tokenyard_bench.shapes import Shape
from tokenyard_bench.sweep import Sweep
from tokenyard_cli import app
from tokenyard_cli.results import read_results

SMALL = Shape("small", 40, 16, 24, 8, 2)
THREE = ["all_to_all_tokens", "all_to_all:chunks=2", "symmetric_memory"]


def records(device, dtype, routing, exchanges, shape=SMALL):
    """Measure exchanges. Return the records of one case."""
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"
    world = World(torch.device(device), timeout=60)
    sweep = Sweep([shape], [dtype], [routing], world.device, repetitions=3, ranks=2)
    cases = bench_exchange(sweep, world, ExchangeSettings(exchanges, pause=0), Console(quiet=True))
    return next(cases)


def check(case):
    """Check the records of exchanges, except their errors."""
    notes = {record["contestant"]: record["note"] for record in case}
    assert list(notes)[:2] == ["dense", "dense, busiest rank"]
    assert "not installed" in notes.pop("liger")
    assert set(notes.values()) == {None}
    for record in case[:-1]:
        assert record["forward_ms"]["median"] > 0
        assert record["backward_ms"]["median"] > 0
        assert record["step_tflops"] > 0
    for record in case[2:-1]:
        stages = record["stages"]
        for direction in ("forward", "backward"):
            times = stages[direction]
            assert min(times.values()) >= 0
            assert times["experts"] > 0
            # they add up to the time of one rank, and the slowest one takes as long or longer
            assert sum(times.values()) <= stages[f"{direction}_ms"] + 1e-3
        sorts = record["contestant"] != "symmetric_memory"
        assert (stages["forward"]["plan"] > 0) == sorts
        assert stages["backward"]["plan"] == 0
        assert record["kinds_ms"]["forward"]["matmuls"] > 0


def test_exchanges_are_measured_over_two_ranks():
    mine, other = ranks(2).run(records, "cpu", "fp32", "natural", THREE)
    check(mine)
    assert [record["contestant"] for record in mine[2:-1]] == THREE
    for record in mine[2:-1]:
        assert record["error"] <= record["allowed"]
        assert record["difference"] < 1e-5
        assert record["peak_bytes"] > 0
    # every rank has the times of the slowest one
    assert [r.get("forward_ms") for r in mine] == [r.get("forward_ms") for r in other]


def test_an_exchange_in_fp8_may_be_coarse_and_sends_less_over_two_ranks():
    """A token has 128 numbers, 2 weights and 2 ids; its result has 128 numbers."""
    shape = SMALL._replace(dim=128)
    names = ["all_to_all_tokens", "all_to_all_tokens:precision=fp8"]
    (*_, plain, fp8, _), _ = ranks(2).run(records, "cpu", "fp32", "natural", names, shape)
    assert plain["error"] < 1e-5
    assert 0.02 < fp8["error"] < fp8["allowed"]
    counts = 2 * 4
    for direction, other in (("forward", counts), ("backward", 0)):
        sent = (plain["sent_bytes"][direction] - other) / (4 * 128 + 4 * 4 + 4 * 128)
        ratio = (fp8["sent_bytes"][direction] - other) / (132 + 4 * 4 + 4 * 128)
        assert ratio == pytest.approx(sent, rel=0.1)


def test_the_busiest_rank_of_skewed_routing_over_two_ranks():
    (dense, busiest, ours, _), _ = ranks(2).run(records, "cpu", "fp32", "zipf", ["all_to_all"])
    assert dense["busiest"] > 2
    assert 1 < dense["busiest_rank"] == busiest["busiest_rank"] <= 2
    assert ours["error"] <= ours["allowed"]


@pytest.mark.multigpu
def test_every_exchange_is_measured_over_two_gpus():
    shape = Shape("", 2048, 256, 256, 8, 2)
    case, _ = ranks(2, "cuda").run(records, "cuda", "bf16", "zipf", ["all"], shape)
    check(case)
    for record in case[2:-1]:
        assert record["error"] <= record["allowed"]
        assert record["difference"] < 0.02
        if record["contestant"].startswith("all_to_all"):
            assert record["waits"] >= 1
            assert record["host_wait_ms"] > 0
        else:
            assert record["waits"] == 0  # symmetric_memory reads its counts late


def notes_with_failures(timeout):
    """Measure entrants that fail on rank 1: when built, before a collective, by a wrong result."""
    world = World(torch.device("cpu"), timeout)
    torch.manual_seed(0)
    whole = make_case(
        SMALL._replace(tokens=2 * SMALL.tokens), "natural", torch.float32, world.device
    )
    case = part_of(whole, world.rank, 2)
    (request,) = parse_exchanges(["all_to_all"], case.workload)
    right = request.candidate(case, "auto", world)
    measurement = CaseMeasurement(case, world, Timer(world, CpuClock(), pause=0, repetitions=3))

    forward_passes = Counter()

    def fail():
        raise RuntimeError("out\nof memory")

    def build(place):
        entrant = right.build()
        if world.rank == 1 and place == "build":
            fail()
        if world.rank == 1 and place == "forward":
            return replace(entrant, forward=fail)
        scale = 1.01 if world.rank == 1 and place == "result" else 1

        def forward():
            forward_passes[place] += 1
            return scale * entrant.forward()

        return replace(entrant, forward=forward)

    places = ("build", "forward", "result", "none")
    made = [Candidate(place, "exchange", None, partial(build, place)) for place in places]
    made.append(replace(right, name="here", unusable="no NVLink" if world.rank == 0 else None))
    notes = {candidate.name: measurement.entrant(candidate)["note"] for candidate in made}
    assert forward_passes["result"] == 1  # in a second one, this rank would wait for the other
    return notes


def test_a_failure_on_one_rank_is_a_note_and_no_rank_hangs_over_two_ranks():
    notes, others = ranks(2).run(notes_with_failures, 2.0)
    assert notes == others
    failed = "rank 1: failed: RuntimeError: out of memory"
    assert (notes["build"], notes["forward"], notes["none"]) == (failed, failed, None)
    assert ": wrong: " in notes["result"]  # the gradients of rank 0, too
    assert notes["here"] == "rank 0: no NVLink"


ARGUMENTS = ("--device", "cpu", "--dtype", "fp32", "--shape", "16,8,8,4,2", "--repetitions", "3")
ARGUMENTS += ("--exchange", "all_to_all", "--peers", "none", "--pause", "0")


def printed(folder):
    """Run the command on this rank, as if it were idle; return what it prints."""
    with mock.patch("os.getloadavg", return_value=(0.0, 0.0, 0.0)):
        result = CliRunner().invoke(app, ["bench", "exchange", *ARGUMENTS, "--out", folder])
    if result.exception is not None:
        raise result.exception
    return result.output


def check_output(text, folder):
    assert text.count("T 16, D 8, F 8, E 4, K 2; fp32, natural routing\n2 ranks") == 1
    assert text.count("stages in ms") == 1
    content = json.loads((folder / "exchange.json").read_text())
    assert content["kind"] == "exchange"
    assert [record["contestant"] for record in content["records"]][-1] == "all_to_all"


def test_only_rank_0_prints_and_writes_over_two_ranks(tmp_path):
    mine, other = ranks(2).run(printed, str(tmp_path))
    check_output(re.sub(" +\n", "\n", mine), tmp_path)
    assert other == ""
    times = compare(*[read_results(tmp_path / "exchange.json")] * 2)[0]
    assert [change.what.split(", ")[-1] for change in times[-3:]] == ["forward", "backward", "step"]


@pytest.mark.full
def test_torchrun_starts_it_over_two_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tokenyard_bench", "exchange"]
    command += [*ARGUMENTS, "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=300, env=environment
    )
    check_output(re.sub(" +\n", "\n", done.stdout), tmp_path)


def test_one_rank_is_too_few(tmp_path):
    options = ExchangeOptions(shapes=["cpu"], device="cpu", out=tmp_path)
    with pytest.raises(ConfigError, match=r"needs at least 2 ranks, and 1 was started; run torchr"):
        run_exchange(options, Console(quiet=True))


def test_ranks_do_not_share_a_gpu(tmp_path, monkeypatch):
    options = ExchangeOptions(shapes=["cpu"], device="cuda:0", out=tmp_path)
    with pytest.raises(ConfigError, match="'cuda:0', the same for every rank; give cuda, cpu or"):
        run_exchange(options, Console(quiet=True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match="2 ranks on this machine need as many GPUs, and torch"):
        join_ranks(torch.device("cuda:0"), 60)


def test_ranks_that_do_not_divide_the_experts():
    check_ranks([SMALL], 4)
    said = r"--shape 'small' has 8 experts, which 3 ranks do not divide; .*: 2, 4, 8$"
    with pytest.raises(ConfigError, match=said):
        check_ranks([SMALL], 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("all_to_al", r"--exchange 'all_to_al' is unknown .did you mean 'all_to_all'.*or all"),
        ("all_to_all:2", r"--exchange 'all_to_all:2' has the option '2', .*; give KEY=VALUE"),
        (
            "all_to_all:chunk=2",
            r"backends.exchange.chunk is 2, and 'all_to_all' has no such option "
            r".did you mean 'chunks'.*; leave it out; the options of 'all_to_all': chunks, ",
        ),
    ],
)
def test_a_bad_exchange_is_one_sentence(text, said):
    with pytest.raises(TokenyardError, match=said):
        parse_exchanges([text], Workload(8, 8, 8, 2, expert_parallel=2))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("torhc", "experts backend 'torhc' is unknown .did you mean 'torch'"),
        ("torch:precision=fp8", "'torch' has no such option; name a backend that has it .gluon"),
    ],
)
def test_bad_experts_are_one_sentence(text, said):
    with pytest.raises(TokenyardError, match=said):
        check_experts(text)
    check_experts("auto:precision=fp8")


def test_the_exchanges_of_all_and_their_options():
    workload = Workload(8, 8, 8, 2, expert_parallel=2)
    every = [request.text for request in parse_exchanges(["all"], workload)]
    assert {"all_to_all_tokens", "all_to_all_tokens:chunks=2", "all_to_all"} <= set(every)
    assert "local" not in every
    (request,) = parse_exchanges(["all_to_all:chunks=3:validate=true"], workload)
    assert request.options == {"chunks": 3, "validate": True}


class Direct:
    """A permutation that moves nothing."""

    def plan(self, ids, experts, rows=None):
        return None

    def permute(self, x, plan):
        return 2 * x

    def unpermute(self, rows, plan, weights):
        return 2 * rows


def timed(exchange):
    """Return the stages of a forward and backward pass, each of which takes 1 ms at its end."""
    clock = count()
    marks = Marks(lambda: next(clock))
    x = torch.ones(2, requires_grad=True)
    permutation = MarkedPermutation(Direct())
    permutation.marks = marks
    y = exchange(x, permutation, marked_compute(lambda x: 3 * x, marks))
    end_pass(marks, "forward")
    y.sum().backward()
    end_pass(marks, "backward")
    times = marks.times(lambda stamps: [stamp - stamps[0] for stamp in stamps[1:]])
    ends = [stage for _, stage in marks.ends]
    assert sum(times["forward"]) + sum(times["backward"]) == len(ends)
    x.sum().backward()
    assert len(ends) == len(marks.ends)  # no hook is left on the input
    return ends


def test_the_stages_of_an_exchange_with_a_permutation():
    def exchange(x, permutation, compute):
        plan = permutation.plan(None, 2)
        rows = compute(permutation.permute(x, plan) + 1) + 1
        return permutation.unpermute(rows, plan, None)

    forward = ["plan", "counts", "gather", "dispatch", "experts", "return", "combine", "combine"]
    assert timed(exchange) == [*forward, "combine", "return", "experts", "dispatch", "gather"]


def test_the_stages_of_an_exchange_without_a_permutation():
    def exchange(x, permutation, compute):
        return compute(x) + 1

    assert timed(exchange) == [
        *("dispatch", "experts", "return"),
        *("return", "experts", "dispatch"),
    ]
