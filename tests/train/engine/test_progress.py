"""What a run prints: a bar on a terminal, whole lines in a log file."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text

from tokenyard_train.commands.train import train
from tokenyard_train.config.duration import Span
from tokenyard_train.engine.progress import Progress

RECORD = {
    "kind": "train",
    "batch": 23456,
    "loss": 2.3456,
    "grad_norm": 0.51234,
    "lr": 6e-4,
    "tokens_per_s": 1234567,
    "flops_per_s": 436439.9e9,
    "remaining_s": 90061.0,
    "routing": [{"busiest": 2.5, "entropy": 0.9}, {"busiest": 1.5, "entropy": 0.8}],
}
ALWAYS = "23456/48000  loss 2.346  1 d 1:01:01 left"
REST = (
    "1,234,567 tokens/s",
    "lr 6.00e-04",
    "grad_norm 0.512",
    "436 TFLOP/s",
    "busiest expert 2.50x",
    "entropy 0.800",
)


def shown(width: int) -> str:
    """Return the last line that a terminal of this width shows after a step."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    setup = SimpleNamespace(
        console=console,
        batches=48000,
        config=SimpleNamespace(console_log_interval=Span(1, "ba")),
        steps_in=lambda span: span.value,
    )
    with Progress(SimpleNamespace(setup=setup, batch=0)) as progress:
        progress.show(RECORD)
    printed = Text.from_ansi(console.file.getvalue()).plain
    return [line for line in printed.splitlines() if line.strip()][-1]


@pytest.mark.parametrize(("width", "others"), [(60, 0), (80, 1), (100, 3), (160, 6)])
def test_a_terminal_keeps_step_total_loss_and_time_left(width, others):
    """Other numbers come in the order of their use, as far as the width allows."""
    line = shown(width)
    bar, _, state = line.partition(" ")
    assert len(bar) >= 8
    assert set(bar) <= set("━╸╺")
    assert state.strip() == "  ".join((ALWAYS, *REST[:others]))
    assert len(line) <= width


def test_a_log_file_has_one_unbroken_line_for_each_step(config, capsys):
    train(config(run_name="a-run", eval_interval="3ba"), Console(width=60))
    lines = capsys.readouterr().out.splitlines()
    number = r"[\d.,e+-]+"
    step = re.compile(
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d batch (\d)/6: loss {number}  \d+:\d\d:\d\d left  "
        rf"{number} tokens/s  lr {number}  grad_norm {number}  {number} [kMG]?FLOP/s  "
        rf"busiest expert {number}x  entropy {number}"
    )
    found = [match[1] for line in lines if (match := step.fullmatch(line))]
    assert found == ["1", "2", "3", "4", "5", "6"]
    scores = [line for line in lines if "held-out loss" in line]
    assert all(re.match(r"\d{4}-\S+ \S+ batch [36]: held-out loss", line) for line in scores)
    assert len(scores) == 2
    assert any(re.match(r"dbrx: .* fp32; tokenizer bytes, ", line) for line in lines)


def test_the_interval_of_log_lines_is_kept(config, capsys):
    """The last step is always there."""
    train(config(console_log_interval="4ba", eval_loader=None), Console(width=60))
    steps = re.findall(r"batch (\d)/6: loss", capsys.readouterr().out)
    assert steps == ["4", "6"]
