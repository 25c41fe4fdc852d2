"""A signal at any moment leaves no process behind, and the resumed run ends bit-identical."""

import functools

import pytest
import torch
from harness import layout_runs as runs
from harness.layouts import run
from harness.signals import Disturbance, disturb, draw_disturbance, remains
from harness.supervisor import SupervisedRun
from test_launch import final_state_at

BATCHES = 24
LAYOUTS = {1: "single", 2: "fsdp-2-ep2"}
PARALLEL = {
    1: {},
    2: {"strategy": {"name": "fsdp", "timeout": 30}, "expert_parallel": 2},
}
LENGTH = {
    "max_duration": f"{BATCHES}ba",
    "save_interval": "3ba",
    "eval_interval": "10ba",
    "save_num_checkpoints_to_keep": 2,
    "global_train_batch_size": 4,
}
CODES = {
    "SIGINT": {75, 1, 130, -2},  # the last three: before the first rank was started
    "SIGTERM": {75, -15},
    "SIGHUP": {75, -1},
    "kill a rank": {1},
    "stop and kill a rank": {1},
    "kill the supervisor": {-9},
}
QUICK = [
    (1, Disturbance("kill the supervisor", 0, "batch", 4, 0.03)),
    (1, Disturbance("SIGHUP", 0, "saving", 5, 0.005)),
]
LONG = [
    (2, Disturbance("kill the supervisor", 0, "batch", 4, 0.03)),
    (2, Disturbance("stop and kill a rank", 1, "batch", 6, 0.02)),
]


@pytest.fixture(scope="module")
def undisturbed(small_config, tmp_path_factory):
    """Return the state at the end of an undisturbed run over some ranks, trained once."""

    @functools.cache
    def train(nproc):
        folder = tmp_path_factory.mktemp("undisturbed")
        _train(nproc, small_config(), folder)
        return final_state_at(folder / LAYOUTS[nproc], BATCHES)

    return train


def _train(nproc, settings, folder, **changes):
    """Train with one thread, as the launched ranks do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(runs.finished, LAYOUTS[nproc], settings, folder, **(LENGTH | changes))
    finally:
        torch.set_num_threads(threads)


def check(nproc, disturbance, settings, folder, undisturbed, monkeypatch):
    """Send a signal, look for what is left, and resume."""
    mark = f"TOKENYARD_SIGNALS={folder}"
    monkeypatch.setenv(*mark.split("="))
    layout = LAYOUTS[nproc]
    config = settings | LENGTH
    config |= {
        "device_train_microbatch_size": 4 // nproc,
        "device_eval_batch_size": 2,
        "parallel": PARALLEL[nproc],
        "save_folder": str(folder / layout),
    }
    launched = SupervisedRun(config, nproc, "--max-restarts", "0")
    disturb(launched, disturbance)
    code = launched.process.wait(timeout=100)
    monkeypatch.delenv("TOKENYARD_SIGNALS")
    assert remains(mark) == [], disturbance
    assert code in CODES[disturbance.kind] | {0}, (disturbance, code, launched.text())
    # Ctrl-C before the command has begun is Python's to answer.
    assert "Traceback" not in launched.text() or code in (1, -2), launched.text()
    if code != 0:
        _train(nproc, settings, folder, autoresume=True)
    assert final_state_at(folder / layout, BATCHES) == undisturbed(nproc), disturbance


@pytest.mark.parametrize(
    ("nproc", "disturbance"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in LONG)],
    ids=lambda value: str(value)[:60],
)
def test_a_signal_costs_no_bit(nproc, disturbance, settings, tmp_path, undisturbed, monkeypatch):
    check(nproc, disturbance, settings, tmp_path, undisturbed, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(200))
def test_200_signals_cost_no_bit(seed, settings, tmp_path, undisturbed, monkeypatch):
    nproc = 1 + seed // 6 % 2
    disturbance = draw_disturbance(seed, nproc, BATCHES)
    check(nproc, disturbance, settings, tmp_path, undisturbed, monkeypatch)
