"""Progress of a run on the console: a bar on a terminal, one line a step elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from tokenyard.units import describe_duration, describe_flop_rate
from tokenyard_cli.console import print_line
from tokenyard_train.engine.state import Run

_SHORTEST_BAR = 8  # columns
_GAP = "  "  # between the numbers of a step


class Progress:
    """Shows the records of a run. A context manager."""

    def __init__(self, run: Run):
        setup = run.setup
        self.console = setup.console
        self.batches = setup.batches
        self.every = max(1, setup.steps_in(setup.config.console_log_interval))
        self.bar = Bar(
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True)),
            console=self.console,
            disable=not self.console.is_terminal,
            expand=True,
        )
        self.task = self.bar.add_task(
            "", total=self.batches, completed=run.batch, state=self._step(run.batch)
        )

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        """Show the record of a step, of a skipped step or of an evaluation."""
        batch = record["batch"]
        match record["kind"]:
            case "train":
                self._show_step(batch, describe(record))
            case "skipped":
                self.bar.update(self.task, completed=batch)
                numbers = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
                self._print(f"batch {batch} was skipped: {numbers}")
            case kind if kind.startswith("eval"):
                loss = f"{record['loss']:.4f}, {record['bits_per_byte']:.3f} bits per byte"
                of = kind.removeprefix("eval/") + " " if "/" in kind else ""
                self._print(f"batch {batch}: {of}held-out loss {loss}")

    def _show_step(self, batch: int, numbers: Mapping[str, str]) -> None:
        step = self._step(batch)
        if self.console.is_terminal:
            width = self.console.width - _SHORTEST_BAR - 1
            self.bar.update(self.task, completed=batch, state=fit(step, numbers, width))
        elif batch == self.batches or batch % self.every == 0:
            self._print(f"batch {step}: {_GAP.join(numbers.values())}")

    def _step(self, batch: int) -> str:
        return f"{batch}/{self.batches}"

    def _print(self, text: str) -> None:
        """Print a line; with the time if it may end in a file."""
        if not self.console.is_terminal:
            text = f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}"
        print_line(self.console, text)


def describe(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers of a training record as text, in the order of a line.

    `busiest` is the highest load of an expert in any layer, as a multiple of the mean; `entropy` is
    the lowest of any layer.
    """
    numbers = {
        "loss": f"loss {record['loss']:.3f}",
        "left": f"{describe_duration(record['remaining_s'])} left",
        "speed": f"{record['tokens_per_s']:,} tokens/s",
        "lr": f"lr {record['lr']:.2e}",
        "grad_norm": f"grad_norm {record['grad_norm']:.3g}",
        "work": describe_flop_rate(record["flops_per_s"]),
    }
    if record["routing"]:
        busiest = max(layer["busiest"] for layer in record["routing"])
        entropy = min(layer["entropy"] for layer in record["routing"])
        numbers["busiest"] = f"busiest expert {busiest:.2f}x"
        numbers["entropy"] = f"entropy {entropy:.3f}"
    return numbers


_ALWAYS = ("loss", "left")


def fit(step: str, numbers: Mapping[str, str], width: int) -> str:
    """Return the step, its loss, the time left, and the first other numbers that `width` holds."""
    shown = [step]
    for name, text in numbers.items():
        longer = [*shown, text]
        if name not in _ALWAYS and len(_GAP.join(longer)) > width:
            break
        shown = longer
    return _GAP.join(shown)
