"""The supervisor, with small programs as ranks: which rank failed or hung, and what follows."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tokenyard_train.launch import faults, stopped
from tokenyard_train.launch.faults import _calls, collective_fault
from tokenyard_train.launch.supervisor import supervise

HEAD = (
    "import json, os, signal, sys, time; "
    "rank = int(os.environ['RANK']); notes = os.environ['TOKENYARD_NOTES']"
)
NOTE = "{'collective': 'all_reduce', 'reason': 'timed out'}"
FAULT = (
    f"json.dump({NOTE}, open(f'{{notes}}/x{{rank}}', 'w')); "
    "os.rename(f'{notes}/x{rank}', f'{notes}/{rank}.json')"
)
FAILED = f"{FAULT}; sys.exit(1)"
TOGETHER = (  # on a busy machine, ranks start at different times
    "open(f'{notes}/s{rank}', 'w').close()\n"
    "ranks = [f'{notes}/s{r}' for r in range(int(os.environ['WORLD_SIZE']))]\n"
    "while not all(map(os.path.exists, ranks)): time.sleep(0.01)"
)


def timeout(seconds):
    """Return a line that writes the timeout of a collective whole or not at all, as a rank does."""
    own = "f'{notes}/timeout{rank}'"
    return f"open({own}, 'w').write('{seconds}'); os.rename({own}, f'{{notes}}/timeout')"


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def run(capfd, *lines, nproc=3, max_restarts=0):
    """Supervise a program; return the exit code and stderr."""

    def program(began):
        return [sys.executable, "-c", "\n".join((HEAD, f"began = {began}", TOGETHER, *lines))]

    code = supervise(program, nproc, max_restarts)
    return code, capfd.readouterr().err.strip()


def test_all_is_well(capfd):
    assert run(capfd, "time.sleep(0.1 * rank)") == (0, "")


@pytest.mark.parametrize("code", [2, 75])
def test_a_mistake_and_a_stop_request_are_not_restarted(capfd, code):
    assert run(capfd, f"sys.exit({code})", max_restarts=5) == (code, "")


def test_a_restart_resumes_once_the_run_has_started(capfd):
    """Until the run owns its folder, an attempt starts like the first one."""
    lines = ("if began: sys.exit(0)", "if rank == 1: sys.exit(7)", "time.sleep(60)")
    failed = "rank 1 ended by exit code 7; "
    assert run(capfd, *lines, max_restarts=1) == (
        1,
        f"{failed}restart 1 of 1\n{failed}no restart is left",
    )
    begin = "open(f'{notes}/began', 'w').close()"
    assert run(capfd, begin, *lines, max_restarts=1) == (0, f"{failed}restart 1 of 1")


def test_it_stops_after_the_last_restart(capfd):
    code, errors = run(capfd, f"{KILLED} if rank == 2 else time.sleep(60)", max_restarts=1)
    sentence = "rank 2 ended by signal SIGKILL; "
    assert (code, errors.splitlines()) == (
        1,
        [sentence + "restart 1 of 1", sentence + "no restart is left"],
    )


def test_a_killed_rank_is_blamed_although_the_waiting_ranks_end_first(capfd):
    lines = ("if rank != 1:", f"    {FAILED}", "time.sleep(0.3)", KILLED)
    assert run(capfd, *lines) == (1, "rank 1 ended by signal SIGKILL; no restart is left")


@pytest.mark.parametrize(
    ("line", "state"), [("time.sleep(60)", "hangs"), ("stop", "hangs (it is stopped)")]
)
def test_a_rank_that_misses_a_collective_is_blamed(capfd, line, state):
    line = "os.kill(os.getpid(), signal.SIGSTOP)" if line == "stop" else line
    code, errors = run(capfd, "if rank != 1:", f"    {FAILED}", line)
    assert code == 1
    assert errors in [
        f"rank 1 {state}: rank {rank} waited in all_reduce (timed out); no restart is left"
        for rank in (0, 2)
    ]


def test_ranks_that_wait_in_different_collectives_have_diverged(capfd):
    other = FAILED.replace("'all_reduce'", "'barrier'")
    errors = run(capfd, f"if rank == 1: {other}", FAILED, nproc=2)[1]
    waits = ["rank 0 waited in all_reduce", "rank 1 waited in barrier"]
    assert errors in [
        f"ranks {first} and {1 - first} diverged: {waits[first]}, and "
        f"{waits[1 - first].replace(' waited', '')} (timed out); no restart is left"
        for first in (0, 1)
    ]


def test_ranks_that_wait_in_one_collective_have_lost_each_other(capfd):
    errors = run(capfd, FAILED, nproc=2)[1]
    assert errors == "rank 0 failed in all_reduce (timed out); no restart is left"


def test_a_fault_counts_before_its_rank_has_ended(capfd):
    """A GPU takes a while to release a process."""
    began = time.monotonic()
    errors = run(capfd, f"if rank == 0: {FAULT}", "time.sleep(60)", nproc=2)[1]
    assert errors.startswith("rank 1 hangs: rank 0 waited in all_reduce (timed out)")
    assert time.monotonic() - began < 30


def test_a_rank_that_aborts_is_blamed_if_the_others_fail_by_it(capfd):
    line = "os.kill(os.getpid(), signal.SIGABRT)"
    errors = run(capfd, f"if rank == 1: {line}", FAILED, nproc=2)[1]
    assert errors == "rank 1 ended by signal SIGABRT; no restart is left"


def test_a_rank_aborted_by_nccl_is_not_blamed(capfd):
    lines = ("if rank != 1:", "    os.kill(os.getpid(), signal.SIGABRT)", "time.sleep(60)")
    assert run(capfd, *lines)[1].startswith("rank 1 hangs: rank ")


def test_remaining_ranks_are_killed(capfd, tmp_path):
    began = time.monotonic()
    write = f"open(f'{tmp_path}/{{rank}}', 'w').write(str(os.getpid()))"
    run(capfd, write, "sys.exit(1) if rank == 0 else time.sleep(60)")
    assert time.monotonic() - began < 20
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_request_is_forwarded_as_sigterm(capfd, number):
    """The exit code is 75, also if the rank dies from the signal."""
    request = f"time.sleep(0.5); os.kill(os.getppid(), {int(number)}); time.sleep(60)"
    handle = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))"
    for lines in ((handle, request), (request,)):
        assert run(capfd, *lines, nproc=1, max_restarts=3) == (75, "")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_fails_after_a_stop_request_is_named(capfd):
    """The exit code is 75 all the same, but the step may not have been saved."""
    fail = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
    request = "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    code, errors = run(capfd, fail, request, nproc=1, max_restarts=3)
    assert (code, errors) == (75, "rank 0 ended by exit code 7; no restart after a request to stop")


def test_a_stopped_rank_is_blamed_rather_than_a_rank_that_waits_for_it(capfd):
    stop = "os.kill(os.getpid(), signal.SIGSTOP)"
    late = "    time.sleep(2)"  # the other one is stopped by then, even on a busy machine
    errors = run(
        capfd,
        "if rank == 0:",
        late,
        f"    {FAILED}",
        "if rank == 1:",
        f"    {stop}",
        "time.sleep(60)",
    )[1]
    assert errors == (
        "rank 1 hangs (it is stopped): rank 0 waited in all_reduce (timed out); no restart is left"
    )


@pytest.mark.parametrize(
    ("write", "start_timeout"),
    [(timeout(1.5), 60), ("", 1.5)],
    ids=["in the run", "at the start"],
)
def test_a_stopped_rank_is_noticed_although_no_rank_waits_for_it(
    capfd, monkeypatch, write, start_timeout
):
    """After the timeout of a collective, or of the start until a rank has written it."""
    monkeypatch.setattr(faults, "_START_TIMEOUT", start_timeout)
    stop = "os.kill(os.getpid(), signal.SIGSTOP)"
    began = time.monotonic()
    errors = run(capfd, write, f"if rank == 1: {stop}", "time.sleep(60)")[1]
    assert errors == "rank 1 hangs (it is stopped); no restart is left"
    assert time.monotonic() - began < 30


def test_a_rank_that_ended_is_noticed_although_all_others_are_stopped(capfd):
    lines = (
        timeout(1.5),
        "if began: sys.exit(0)",
        "open(f'{notes}/began', 'w').close()",
        "if rank == 0: time.sleep(1); sys.exit(0)",  # the other is stopped by then
        "os.kill(os.getpid(), signal.SIGSTOP)",
    )
    began = time.monotonic()
    # with more ranks, those that stop later may not be named
    said = run(capfd, *lines, nproc=2, max_restarts=1)
    assert said == (0, "rank 1 hangs (it is stopped); restart 1 of 1")
    assert time.monotonic() - began < 30


def test_a_suspended_job_is_waited_for(capfd, tmp_path):
    """All of its ranks are stopped, for longer than a collective may take, and none has ended."""
    pids = [f"{tmp_path}/{rank}" for rank in range(2)]
    wake = (
        "import os, signal, sys, time\n"
        "while not all(map(os.path.exists, sys.argv[1:])): time.sleep(0.01)\n"
        "time.sleep(4)\n"
        "for path in sys.argv[1:]: os.kill(int(open(path).read()), signal.SIGCONT)"
    )
    waker = subprocess.Popen([sys.executable, "-c", wake, *pids])
    lines = (
        timeout(0.5),
        f"write = f'{tmp_path}/x{{rank}}'",
        "open(write, 'w').write(str(os.getpid()))",
        f"os.rename(write, f'{tmp_path}/{{rank}}')",
        "os.kill(os.getpid(), signal.SIGSTOP)",
    )
    assert run(capfd, *lines, nproc=2) == (0, "")
    assert waker.wait(timeout=10) == 0


def test_the_time_counts_in_which_some_ranks_are_stopped_and_others_run(monkeypatch):
    """All ranks of a suspended job are stopped, and the supervisor may be, too."""
    now = 0.0
    stopped_pids = set()
    monkeypatch.setattr(stopped.time, "monotonic", lambda: now)
    monkeypatch.setattr(stopped, "is_stopped", lambda pid: pid in stopped_pids)
    ranks = stopped.StoppedRanks()

    def look(pids, until, running=(0, 1, 2)):
        nonlocal now
        stopped_pids.clear()
        stopped_pids.update(pids)
        while now < until:
            now += 0.5
            ranks.look({rank: 10 + rank for rank in running}, ended=len(running) < 3)

    look({11}, until=5)
    assert ranks.longer_than(4.5) == [1]
    assert ranks.longer_than(5) == []
    look({10, 11, 12}, until=100)
    assert ranks.longer_than(0) == []
    look({11, 12}, until=102, running=(1, 2))
    assert ranks.longer_than(1.5) == [1, 2]
    assert ranks.longer_than(2) == []
    look((), until=103)
    look({11, 12}, until=106)
    now += 1000  # the supervisor was stopped
    look({12}, until=now + 0.5)
    assert ranks.longer_than(0) == [2]
    assert ranks.longer_than(4) == []


class TestFaults:
    """Exceptions that mean that another rank missed a collective."""

    def fault(self, error):
        def all_reduce():
            raise error

        try:
            all_reduce()
        except Exception as caught:
            return collective_fault(caught)

    def test_those_of_torch_distributed_and_of_gloo(self):
        fault = self.fault(dist.DistBackendError("NCCL is gone\nat once"))
        assert (fault.collective, fault.reason) == ("all_reduce", "NCCL is gone")
        for text in (
            "[/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer",
            "Application timeout caused pair closure",  # raised when another call timed out
        ):
            assert self.fault(RuntimeError(text)).reason == text

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


SUPERVISOR = """
import subprocess
import sys
from tokenyard_train.launch.supervisor import supervise
program = [sys.executable, "-c", sys.argv[1]]
sys.exit(supervise(lambda began: program, 2, 0))
"""
RANK = """
import os, time
from tokenyard_train.parent_death import die_with_supervisor
die_with_supervisor()
os.write(1, f"{{os.getpid()}}\\n".encode())
{}
time.sleep(60)
"""


@pytest.fixture
def supervisor():
    """Start a supervisor of two ranks that run some lines; return it and the ranks' ids."""
    started = []

    def start(line: str = ""):
        program = [sys.executable, "-c", SUPERVISOR, RANK.format(line)]
        process = subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process, [int(process.stdout.readline()) for _ in range(2)]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(pids: list[int], seconds: float = 10.0) -> bool:
    """Wait until no process of these ids is left, or only zombies."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        if all(not path.exists() or path.read_text().split()[2] == "Z" for path in states):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestWhatIsLeft:
    @pytest.mark.parametrize("line", ["", "os.kill(os.getpid(), 19)"], ids=["running", "stopped"])
    def test_ranks_die_with_a_killed_supervisor(self, supervisor, line):
        process, ranks = supervisor(line)
        process.kill()
        assert ended(ranks)

    def test_a_second_request_kills_ranks_that_do_not_listen(self, supervisor):
        process, ranks = supervisor("os.kill(os.getpid(), 19)")
        while not all(map(stopped.is_stopped, ranks)):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(0.7)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 1
        assert "killed at the second request to stop" in errors
        assert ended(ranks)

    def test_a_rank_whose_supervisor_is_gone_does_not_start(self, supervisor):
        code = "from tokenyard_train.parent_death import die_with_parent; die_with_parent(1 << 22)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL


def test_the_ranks_print_their_common_mistake_once(capfd, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 1.0e-3\n")
    command = [sys.executable, "-m", "tokenyard_train", "check", str(config)]
    assert supervise(lambda started: command, nproc=2, max_restarts=3) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "learning_rate is not a known key; write optimizer.lr" in line


def test_the_calls_of_a_fault_end_before_torch_dispatches_an_operator():
    """The functional collectives of exchanges fail inside torch's dispatcher."""
    operator = torch.ops._c10d_functional.wait_tensor
    try:
        operator("no tensor")
    except RuntimeError as error:
        calls = _calls(error.__traceback__)
    name = "test_the_calls_of_a_fault_end_before_torch_dispatches_an_operator"
    assert calls == [(__name__, name)]
