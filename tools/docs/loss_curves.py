"""Train a tiny DBRX with several settings and seeds, all runs at once; write their losses.

``python tools/docs/loss_curves.py fp8 OUT.json --steps 2000`` trains with experts in bf16 and FP8,
``states`` with each way to store weights and moments. Each run is a ``tokenyard train`` of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenyard.measure.machine import describe_machine
from tokenyard_train.parent_death import PARENT
from tokenyard_train.records.metrics import Metrics

CONFIG = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
SIZE = (
    "model.d_model=512",
    "model.ffn_config.ffn_hidden_size=512",
    "max_seq_len=512",
    "callbacks=null",
)
_MASTERS = "precision=bf16_master"
_FP8 = "backends.experts={name: gluon, precision: fp8%s}"
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "fp8": {
        "bf16": (_MASTERS, "backends.experts=gluon"),
        "fp8": (_MASTERS, _FP8 % ""),
        "fp8, weight_gradients: fp8": (_MASTERS, _FP8 % ", weight_gradients: fp8"),
    },
    "states": {
        "fp32": ("precision=fp32",),
        "amp_bf16": ("precision=amp_bf16",),
        "bf16_master": (_MASTERS,),
        "bf16_master, moments: bf16": (_MASTERS, "optimizer.moments=bf16"),
        "bf16_master, moments: 8bit": (_MASTERS, "optimizer.moments=8bit"),
    },
}
_POINTS = 200  # of a curve of training losses: each is the mean of the steps since the one before
_EVALUATIONS = 20


class Run(NamedTuple):
    """A run that was started."""

    name: str
    seed: int
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def metrics(self) -> Path:
        """The file of its records."""
        return self.folder / "run" / "metrics.jsonl"


def main() -> None:
    """Train all runs of a set at once, and write the file."""
    options = _options()
    settings = {name: SETS[options.set][name] for name in options.settings or SETS[options.set]}
    machine = describe_machine(torch.device(options.device))
    began = time.perf_counter()
    deadline = began + options.seconds
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        runs = []
        for seed in options.seeds:
            runs += [_start(folder, options, name, seed) for name in settings]
            _wait_for_first_steps(runs, deadline)
        _wait(runs, deadline)
        records: dict[str, dict[str, Any]] = {name: {} for name in settings}
        for run in runs:
            records[run.name][str(run.seed)] = _record(run, options.steps)
    content = {
        "machine": machine,
        "steps": options.steps,
        "steps_per_loss": _steps_per_loss(options.steps),
        "seconds": round(time.perf_counter() - began, 1),
        "overrides": [*SIZE, *options.overrides],
        "settings": settings,
        "runs": records,
    }
    options.out.write_text(json.dumps(content) + "\n")
    for line in _table(records):
        print(line)
    if any(run.process.returncode for run in runs):
        sys.exit(1)  # the file has what they recorded


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value overrides of all runs")
    parser.add_argument("--settings", nargs="+", help="some of the set; default: all")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--seconds", type=float, default=3600.0, help="then stop all runs")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--folder", type=Path, help="keeps the files of the runs")
    options = parser.parse_intermixed_args()
    if mistake := _mistake(options):
        parser.error(mistake)
    return options


def _mistake(options: argparse.Namespace) -> str | None:
    """Return what would fail after the runs have started, or None."""
    known = SETS[options.set]
    for name in options.settings or known:
        if name not in known:
            return f"--settings {name!r} is none of {options.set}; give some of {list(known)}"
    if len(set(options.seeds)) < len(options.seeds):
        return f"--seeds are {options.seeds}; give each of them once"
    if options.steps < 1:
        return f"--steps is {options.steps}; give 1 or more"
    if not options.out.absolute().parent.is_dir():
        return f"the folder of {str(options.out)!r} does not exist; make it first"
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        return f"--device is {options.device!r}, and torch finds no CUDA GPU here; give cpu"
    return None


def _start(folder: Path, options: argparse.Namespace, name: str, seed: int) -> Run:
    """Start a run in a process of one thread: the GPU does the work."""
    own = folder / f"{list(SETS[options.set]).index(name)}-{seed}"
    own.mkdir(parents=True)
    overrides = [
        *(f"device={options.device}", f"seed={seed}", f"save_folder={own / 'run'}"),
        *(f"max_duration={options.steps}ba", f"save_interval={options.steps}ba"),
        f"eval_interval={max(1, options.steps // _EVALUATIONS)}ba",
        f"console_log_interval={max(1, options.steps // 4)}ba",
        *(*SIZE, *SETS[options.set][name], *options.overrides),
    ]
    command = [sys.executable, "-m", "tokenyard_train", "train", str(CONFIG), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", PARENT: str(os.getpid())}
    with (own / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    return Run(name, seed, own, process)


def _wait_for_first_steps(runs: list[Run], deadline: float) -> None:
    """Wait until each run trains or has ended: runs that start later find its kernels compiled."""
    waiting = list(runs)
    while waiting and time.perf_counter() < deadline:
        time.sleep(0.1)
        waiting = [r for r in waiting if not r.metrics.exists() and r.process.poll() is None]


def _wait(runs: list[Run], deadline: float) -> None:
    """Wait for all runs, and stop those that still train at the deadline."""
    for run in runs:
        try:
            run.process.wait(max(0.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.process.wait()
            print(f"{run.name}, seed {run.seed}: stopped, the time is over", file=sys.stderr)
            continue
        if run.process.returncode != 0:
            log = (run.folder / "log").read_text(errors="replace")
            print(f"{run.name}, seed {run.seed} failed:\n{log[-2000:]}", file=sys.stderr)


def _record(run: Run, steps: int) -> dict[str, Any]:
    """Return the losses of a run, and the median milliseconds of a step."""
    records = Metrics(run.metrics).read()
    train = [record for record in records if record["kind"] == "train"]
    losses = [record["loss"] for record in train]
    every = _steps_per_loss(steps)
    means = [statistics.fmean(losses[i : i + every]) for i in range(0, len(losses), every)]
    held_out = {r["batch"]: round(r["loss"], 5) for r in records if r["kind"] == "eval"}
    seconds = [record["seconds"] for record in train]
    return {
        "loss": [round(mean, 4) for mean in means],
        "held_out": held_out,
        "step_ms": round(1e3 * statistics.median(seconds), 2) if seconds else None,
    }


def _steps_per_loss(steps: int) -> int:
    return max(1, steps // _POINTS)


def _table(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each setting: its last held-out losses, and their mean and deviation."""
    for name, seeds in records.items():
        runs = list(seeds.values())
        losses = [list(run["held_out"].values())[-1] for run in runs if run["held_out"]]
        if not losses:
            yield f"{name}: no evaluation"
            continue
        deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
        batches = [list(run["held_out"])[-1] for run in runs if run["held_out"]]
        yield (
            f"{name}: {losses}, mean {statistics.fmean(losses):.4f}, deviation {deviation:.4f}, "
            f"after {batches} steps of {[run['step_ms'] for run in runs]} ms"
        )


if __name__ == "__main__":
    main()
