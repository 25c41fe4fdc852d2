"""Turn a dense model's folder into the folder of an MoE model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tokenyard import ConfigError, count_parameters
from tokenyard_cli.console import print_line
from tokenyard_models import Upcycling
from tokenyard_models import upcycle as write_upcycled
from tokenyard_train.checkpoint import checkpoints, is_checkpoint
from tokenyard_train.commands.options import UpcycleOptions
from tokenyard_train.commands.writing import print_reading, print_written, writing_report
from tokenyard_train.folder_lock import lock_new_folder

_TIES = (
    "where router logits are float32, as here; "
    "in 16 bits, groups of equal logits may mix their slices"
)


def upcycle(options: UpcycleOptions, console: Console) -> None:
    """Write the folder; print the model's size and whether it computes the dense model's function.

    Raises TokenyardError before anything is written.
    """
    source = options.source
    upcycling = Upcycling(options.num_experts, options.top_k, options.granularity, options.seed)
    if checkpoints(source) or is_checkpoint(source):
        raise ConfigError(
            f"{source} is a run's; first write it as a folder: "
            f"tokenyard convert {source} FOLDER --to hf"
        )
    with lock_new_folder(options.target):
        print_reading(console, source)
        report = writing_report(console, options.target)
        model = write_upcycled(source, options.target, upcycling, report=report)
    size = count_parameters(model)
    sizes = f"{size.total:,} parameters, {size.active:,} of them active"
    print_written(console, options.target, f"{model.definition}, {sizes}", "hf")
    print_line(console, _describe_function(upcycling, source))


def _describe_function(upcycling: Upcycling, source: Path) -> str:
    """Say whether the new model computes the function of the dense one."""
    if upcycling.keeps_function:
        rounding = "up to rounding" if upcycling.granularity == 1 else f"up to rounding, {_TIES}"
        return f"it computes what {source} does, {rounding}"
    slices = f"tokens take {upcycling.top_k} slices, and {upcycling.granularity} make a layer"
    return (
        f"it does not compute what {source} does: {slices}; "
        "it would if --top-k were a multiple of --granularity"
    )
