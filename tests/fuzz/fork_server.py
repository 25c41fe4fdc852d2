"""Run commands in processes forked from this one, which has imported torch. A script.

Starting a process that imports torch takes seconds; a fork takes milliseconds. Requests and
answers are lines of JSON on stdin and stdout, see `FORKED` in processes.py.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn

_MODULES = (
    "pyarrow.parquet",
    "tokenizers",
    "zstandard",
    "tokenyard.exchanges",
    "tokenyard.routers",
    "tokenyard.strategies",
    "tokenyard_cli",
    "tokenyard_models.hf",
    "tokenyard_train.checkpoint.dcp",
    "tokenyard_train.cli.data",
    "tokenyard_train.cli.models",
    "tokenyard_train.cli.train",
    "tokenyard_train.commands.check",
    "tokenyard_train.commands.convert",
    "tokenyard_train.commands.data",
    "tokenyard_train.commands.generate",
    "tokenyard_train.commands.routing",
    "tokenyard_train.commands.train",
    "tokenyard_train.commands.upcycle",
    "tokenyard_train.config",
    "tokenyard_train.data.hf_tokenizer",
    "tokenyard_train.data.sources.files",
    "tokenyard_train.data.sources.mds",
    "tokenyard_parallel.strategies",
    "tokenyard_train.records.plots",
    "torch._dynamo",
)
_AFTER = 20.0  # seconds of waiting, beyond the seconds of computing, before a case is killed


def main() -> None:
    """Import everything, then answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in _MODULES:
        importlib.import_module(name)
    _prepare()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _prepare() -> None:
    import torch

    from tokenyard import default_registry
    from tokenyard_train.records import plots

    default_registry()
    torch.set_num_threads(1)  # a child must not inherit a pool without its threads
    # Pictures take most of a short run's time, and tests/train/records draws them.
    plots.loss_curve = plots.expert_heatmap = lambda *args: None


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a process for a request; return how it ended, and its largest memory."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _run(request, write)
    os.close(write)
    waiting = select.poll()
    waiting.register(read, select.POLLIN)
    in_time = bool(waiting.poll(1000 * (request["seconds"] + _AFTER)))
    codes = os.read(read, 4096) if in_time else b""
    os.close(read)
    with suppress(ProcessLookupError):  # it ended before its session was made
        os.killpg(pid, signal.SIGKILL)  # also what it has left behind
    _, status, usage = os.wait4(pid, 0)
    return {
        "codes": json.loads(codes or b"[]"),
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) and not codes else 0,
        "megabytes": usage.ru_maxrss // 1024,
        "seconds": usage.ru_utime + usage.ru_stime,
    }


def _run(request: dict[str, Any], write: int) -> NoReturn:
    """Run the commands of a request until one fails; write their exit codes, then wait."""
    codes = []
    try:
        os.setsid()
        os.chdir(request["folder"])
        os.environ |= {"HOME": request["folder"], "TOKENYARD_CACHE": "/dev/null/no"}
        if request["path"]:
            _search(request["path"])
        _limit(request["seconds"], request["megabytes"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, arguments in enumerate(request["commands"]):
            codes.append(_command(number, arguments))
            if codes[-1] != 0:
                break
    finally:
        os.write(write, json.dumps(codes).encode())
        signal.pause()


def _search(path: list[str]) -> None:
    """Search folders for modules and plugins."""
    from tokenyard import default_registry

    sys.path[:0] = path
    default_registry.cache_clear()


def _command(number: int, arguments: list[str]) -> int:
    """Run one command with its output in files; return its exit code, 70 with a traceback."""
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        os.dup2(file, stream)
        os.close(file)
    import tokenyard_cli

    sys.argv = ["tokenyard", *arguments]
    code: Any = 0
    try:
        tokenyard_cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 70


def _limit(seconds: int, megabytes: int) -> None:
    """Bound the seconds of computing, and the memory beyond what this process has already."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    for limit, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, now + (megabytes << 20)),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))


if __name__ == "__main__":
    main()
