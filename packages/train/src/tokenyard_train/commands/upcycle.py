"""From a dense model's folder to one of a model with experts, with a word on what it then computes."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tokenyard import ConfigError, count_parameters
from tokenyard_models import Upcycling
from tokenyard_models import upcycle as upcycled
from tokenyard_train.checkpoint import checkpoints

_TIES = "where router logits are float32, as here; in 16 bits, groups of equal logits may mix their slices"


def upcycle(
    source: Path,
    target: Path,
    num_experts: int,
    top_k: int,
    granularity: int,
    seed: int,
    console: Console,
) -> None:
    """Write the folder; say how large the model is, and whether it computes what the dense one does.

    Raises TokenyardError, and then nothing is written.
    """
    how = Upcycling(num_experts, top_k, granularity, seed)
    if checkpoints(source) or (source / "manifest.json").exists():
        raise ConfigError(
            f"{source} is a run's; first write it as a folder: tokenyard convert {source} FOLDER --to hf"
        )
    model = upcycled(source, target, how)
    size = count_parameters(model)
    sizes = f"{size.total:,} parameters, {size.active:,} of them active"
    console.print(
        f"wrote {target}: {model.definition}, {sizes}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(_function(how, source), highlight=False, markup=False, soft_wrap=True)


def _function(how: Upcycling, source: Path) -> str:
    if how.keeps_function:
        rounding = "up to rounding" if how.granularity == 1 else f"up to rounding, {_TIES}"
        return f"it computes what {source} does, {rounding}"
    slices = f"tokens take {how.top_k} slices, and {how.granularity} make a layer"
    return f"it does not compute what {source} does: {slices}; it would if --top-k were a multiple of --granularity"
