"""`tokenyard bench train` and `tokenyard bench generate`: the commands."""

from __future__ import annotations

from tokenyard_cli.console import wide_console
from tokenyard_cli.guide import guide
from tokenyard_cli.options import dataclass_options
from tokenyard_train.bench.options import BenchGenerateOptions, TrainOptions
from tokenyard_train.cli.exit import exit_if_collective_fails


@guide("tokenyard bench train config.yaml --steps 20 --peers both", "bench.md")
@dataclass_options
@exit_if_collective_fails()
def train(options: TrainOptions) -> None:
    """Measure training from a config: tokens/s, FLOP/s, memory, and the time of each phase.

    Peers are transformers' Mixtral of the same size, trained in turns with ours on the same data.
    With --peer-dtype bf16 they train entirely in bf16.
    Only so does their grouped_mm run in bf16, because it ignores autocast.
    With lora they have our adapters, by PEFT.
    """
    from tokenyard_train.bench.commands import run_train

    run_train(options, wide_console())


@guide("tokenyard bench generate config.yaml --batch 1 --batch 16", "bench.md")
@dataclass_options
def generate(options: BenchGenerateOptions) -> None:
    """Measure generation from a config with random weights: tokens/s, and ms of one more token.

    Peers are transformers' Mixtral of the same size, in the dtype that ours computes in.
    """
    from tokenyard_train.bench.commands import run_generate

    run_generate(options, wide_console())
