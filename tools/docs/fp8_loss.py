"""Train a tiny DBRX with experts in bf16 and in FP8, with three seeds, in turns; write the losses.

``python tools/docs/fp8_loss.py OUT.json --seconds 300`` takes as many steps as fit, the same for
all runs. On a GPU the experts are gluon's; on a CPU, FP8 is emulated and `--steps` is needed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tokenyard import moe_layers
from tokenyard.experts import EmulatedFp8Experts
from tokenyard.measure.machine import describe_machine
from tokenyard_train.config import load_config
from tokenyard_train.engine.evaluate import evaluate
from tokenyard_train.engine.setup import Setup, build_setup
from tokenyard_train.engine.step import train_step

CONFIG = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
SEEDS = (17, 18, 19)
EXPERTS = {"bf16": "gluon", "fp8": "{name: gluon, precision: fp8}"}
ON_GPU = (
    "model.d_model=512",
    "model.ffn_config.ffn_hidden_size=512",
    "max_seq_len=512",
    "precision=bf16_master",
)
_PROBED = 10  # steps, to choose the number of steps


def main() -> None:
    """Train all runs in turns, and write the file."""
    options = _options()
    began = time.perf_counter()
    steps = options.steps or _fitting(options, began)
    with tempfile.TemporaryDirectory() as folder:
        runs = {run: _build(options.device, folder, *run, steps) for run in product(EXPERTS, SEEDS)}
        losses: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
        for step in range(steps):
            for run, setup in runs.items():
                losses[run].append(train_step(setup, step).result.loss)
            if time.perf_counter() - began > options.seconds:
                steps = step + 1  # it was slower than the probe
                break
        records: dict[str, dict[str, Any]] = {name: {} for name in EXPERTS}
        for (name, seed), setup in runs.items():
            rounded = [round(loss, 4) for loss in losses[name, seed]]
            taken = len(rounded)
            held_out = evaluate(setup, taken)["loss"]
            records[name][str(seed)] = {"loss": rounded, "eval_loss": round(held_out, 5)}
    machine = describe_machine(torch.device(options.device))
    content = {"machine": machine, "steps": taken, "scheduled": steps, "runs": records}
    options.out.write_text(json.dumps(content) + "\n")
    for name, seeds in records.items():
        print(f"{taken} of {steps} steps, {name}:", [run["eval_loss"] for run in seeds.values()])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0, help="for all runs")
    parser.add_argument("--steps", type=int, default=0, help="instead of those that fit")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def _fitting(options: argparse.Namespace, began: float) -> int:
    """Return the number of steps of each run that fit the time that is left."""
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in EXPERTS:
            setup = _build(options.device, folder, name, SEEDS[0], 100)
            for step in range(2 * _PROBED):
                if step == _PROBED:
                    first = time.perf_counter()
                train_step(setup, step)
            seconds += time.perf_counter() - first
    left = options.seconds - 1.15 * (time.perf_counter() - began)
    return max(10, int(0.9 * left * _PROBED / (seconds * len(SEEDS))))


def _build(device: str, folder: str, name: str, seed: int, steps: int) -> Setup:
    """Return the setup of a run of so many steps."""
    gpu = device.startswith("cuda")
    overrides = [f"device={device}", f"seed={seed}", f"max_duration={steps}ba", "callbacks={}"]
    overrides += [f"save_folder={folder}", *(ON_GPU if gpu else ("precision=amp_bf16",))]
    overrides += [f"backends.experts={EXPERTS[name]}"] if gpu else []
    setup = build_setup(load_config(CONFIG, overrides), Console(quiet=True))
    setup.convert_weights()
    for moe in moe_layers(setup.model) if name == "fp8" and not gpu else ():
        moe.experts.kernel = EmulatedFp8Experts(moe.workload, moe.experts.permutation)
    return setup


if __name__ == "__main__":
    main()
