"""The supervisor's verdicts, on small programs in the place of a training run: who failed, who hung, what follows."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tokenyard_train.launch.faults import fault_of
from tokenyard_train.launch.supervisor import supervise

HEAD = "import json, os, signal, sys, time; rank, notes = int(os.environ['RANK']), os.environ['TOKENYARD_NOTES']"
NOTE = "{'collective': 'all_reduce', 'reason': 'timed out'}"
FAILED = f"json.dump({NOTE}, open(f'{{notes}}/{{rank}}.json', 'w')); sys.exit(1)"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def run(capfd, *lines, nproc=3, max_restarts=0):
    """Supervise a program; return the exit code and what was said."""

    def program(began):
        return [sys.executable, "-c", "\n".join((HEAD, f"began = {began}", *lines))]

    code = supervise(program, nproc, max_restarts)
    return code, capfd.readouterr().err.strip()


def test_all_is_well(capfd):
    assert run(capfd, "time.sleep(0.1 * rank)") == (0, "")


@pytest.mark.parametrize("code", [2, 75])
def test_a_mistake_and_a_wish_are_not_tried_again(capfd, code):
    assert run(capfd, f"sys.exit({code})", max_restarts=5) == (code, "")


def test_a_failure_is_tried_again_and_goes_on_once_it_began(capfd):
    """Before the run's folder is its own, another attempt starts as the first one did."""
    lines = ("if began: sys.exit(0)", "if rank == 1: sys.exit(7)", "time.sleep(60)")
    failed = "process 1 ended by exit code 7; "
    assert run(capfd, *lines, max_restarts=1) == (
        1,
        f"{failed}restart 1 of 1\n{failed}no restart is left",
    )
    begin = "open(f'{notes}/began', 'w').close()"
    assert run(capfd, begin, *lines, max_restarts=1) == (0, f"{failed}restart 1 of 1")


def test_it_gives_up(capfd):
    code, said = run(capfd, f"{KILLED} if rank == 2 else time.sleep(60)", max_restarts=1)
    sentence = "process 2 ended by signal SIGKILL; "
    assert (code, said.splitlines()) == (
        1,
        [sentence + "restart 1 of 1", sentence + "no restart is left"],
    )


def test_who_was_killed_is_blamed_and_not_who_missed_it(capfd):
    """Though the others end first."""
    lines = ("if rank != 1:", f"    {FAILED}", "time.sleep(0.3)", KILLED)
    assert run(capfd, *lines) == (1, "process 1 ended by signal SIGKILL; no restart is left")


@pytest.mark.parametrize(
    ("how", "state"), [("time.sleep(60)", "hangs"), ("stop", "hangs (it is stopped)")]
)
def test_who_does_not_come_is_blamed_with_the_collective_that_missed_it(capfd, how, state):
    how = "os.kill(os.getpid(), signal.SIGSTOP)" if how == "stop" else how
    code, said = run(capfd, "if rank != 1:", f"    {FAILED}", how)
    assert code == 1
    assert (
        said == f"process 1 {state}: process 0 waited in all_reduce (timed out); no restart is left"
        or (
            said
            == f"process 1 {state}: process 2 waited in all_reduce (timed out); no restart is left"
        )
    )


def test_who_is_aborted_by_nccl_only_waited(capfd):
    lines = ("if rank != 1:", "    os.kill(os.getpid(), signal.SIGABRT)", "time.sleep(60)")
    assert run(capfd, *lines)[1].startswith("process 1 hangs: process ")


def test_no_process_is_left(capfd, tmp_path):
    """The others are killed."""
    began = time.monotonic()
    write = f"open(f'{tmp_path}/{{rank}}', 'w').write(str(os.getpid()))"
    run(capfd, write, "sys.exit(1) if rank == 0 else time.sleep(60)")
    assert time.monotonic() - began < 20
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_asks_it_to_stop_is_passed_on(capfd, number):
    """As SIGTERM; code 75 says so, whether the run was so far as to say it itself or not."""
    ask = f"time.sleep(0.5); os.kill(os.getppid(), {int(number)}); time.sleep(60)"
    hear = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))"
    for lines in ((hear, ask), (ask,)):
        assert run(capfd, *lines, nproc=1, max_restarts=3) == (75, "")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_who_is_stopped_is_blamed_and_not_who_waits_for_it(capfd):
    stop = "os.kill(os.getpid(), signal.SIGSTOP)"
    late = "    time.sleep(2)"  # so that the other is stopped by then, however busy the machine is
    said = run(
        capfd,
        "if rank == 0:",
        late,
        f"    {FAILED}",
        "if rank == 1:",
        f"    {stop}",
        "time.sleep(60)",
    )[1]
    assert (
        said
        == "process 1 hangs (it is stopped): process 0 waited in all_reduce (timed out); no restart is left"
    )


class TestFaults:
    """Which exceptions mean that another process did not come."""

    def fault(self, error):
        def all_reduce():
            raise error

        try:
            all_reduce()
        except Exception as caught:
            return fault_of(caught)

    def test_those_of_torch_distributed_and_of_gloo(self):
        found = self.fault(dist.DistBackendError("NCCL is gone\nat once"))
        assert (found.collective, found.reason) == ("all_reduce", "NCCL is gone")
        text = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4"
        assert self.fault(RuntimeError(text)).reason == text
        beside = "Application timeout caused pair closure"  # what was on its way when another call timed out
        assert self.fault(RuntimeError(beside)).reason == beside

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("Split sizes doesn't match"),
            ValueError("gloo"),
        ],
    )
    def test_no_others(self, error):
        assert self.fault(error) is None
