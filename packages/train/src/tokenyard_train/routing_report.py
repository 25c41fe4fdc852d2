"""How a trained model routes a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenyard import ConfigError, moe_layers
from tokenyard_train.data import Tokenizer, build_tokenizer
from tokenyard_train.data.schema import Tokenizer as TokenizerConfig
from tokenyard_train.data.sources.files import documents_of, files_of
from tokenyard_train.results import write_results
from tokenyard_train.routing_stats import normalised_entropy
from tokenyard_train.trained import load_trained

_SAMPLE, _AT_ONCE = 1024, 8  # tokens of a sample at most, and samples of a forward pass


class LayerReport(NamedTuple):
    """One MoE layer's routing of a text."""

    load: list[float]  # each expert's share of the slots
    entropy: float  # of the load, over that of a uniform one
    busiest: float  # the largest load, as a multiple of the mean
    dead: list[int]  # experts without a token
    together: list[list[float]]  # [i][j]: of the tokens that go to expert i, the share that goes to j, too


def report(
    path: Path,
    data: Path,
    tokens: int,
    text_key: str,
    tokenizer: str | None,
    out: Path,
    console: Console,
    device: str = "auto",
    precision: str | None = None,
) -> list[LayerReport]:
    """Route a text by the model at `path`; print a table, and write ``routing.json`` and ``routing.png`` to `out`.

    `data` is a file of text, or a folder of .txt files; `device` and `precision` are those of `load_trained`. Raises
    TokenyardError.
    """
    found = load_trained(path, device, precision)
    if not moe_layers(found.model):
        raise ConfigError(f"the model in {path} has no experts; give one that has")
    reads = build_tokenizer(found.tokenizer if tokenizer is None else TokenizerConfig(name=tokenizer))
    ids = _ids(data, text_key, reads, tokens)
    with found.computing():
        layers = route(found.model, ids)
    records = [layer._asdict() for layer in layers]
    content = {"kind": "routing", "model": str(path), "data": str(data), "tokens": len(ids), "records": records}
    written = write_results(out, "routing", content)
    from tokenyard_train.routing_plot import routing_plot  # a second that a mistake need not wait for

    routing_plot(layers, written.with_suffix(".png"))
    _print(layers, len(ids), console)
    console.print(f"wrote {written} and {written.with_suffix('.png')}", highlight=False, markup=False)
    return layers


@torch.no_grad()
def route(model: Any, ids: Tensor) -> list[LayerReport]:
    """Return how each MoE layer of a model routes ids [N], read in samples that do not see each other."""
    layers = moe_layers(model)
    device = next(model.parameters()).device
    both = [torch.zeros(2 * (moe.workload.num_experts,), dtype=torch.float64, device=device) for moe in layers]
    hooks = [moe.register_forward_hook(_count(total)) for moe, total in zip(layers, both)]
    model.eval()
    try:
        for samples in _samples(ids, min(_SAMPLE, model.config.max_seq_len)):
            model(samples.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return [_layer(total.cpu()) for total in both]


def _count(total: Tensor) -> Any:
    """Return a hook that adds to total [E, E] how many tokens went to both of two experts (to one, on the diagonal)."""

    def hook(module: Any, inputs: Any, output: Any) -> None:
        ids = output[1].topk_ids.long()
        chosen = torch.zeros(ids.shape[0], total.shape[0] + 1, dtype=torch.float32, device=ids.device)
        chosen = chosen.scatter_(1, ids.clamp(max=total.shape[0]), 1.0)[:, :-1]  # the last column is of dropped slots
        total.add_((chosen.T @ chosen).double())

    return hook


def _layer(both: Tensor) -> LayerReport:
    counts = both.diagonal()
    load = (counts / counts.sum().clamp(min=1)).tolist()
    together = (both / counts.clamp(min=1).unsqueeze(1)).fill_diagonal_(0.0)
    dead = [i for i, count in enumerate(counts.tolist()) if not count]
    return LayerReport(load, normalised_entropy(load), max(load) * len(load), dead, together.tolist())


def _samples(ids: Tensor, length: int) -> Iterator[Tensor]:
    whole = len(ids) // length * length
    yield from ids[:whole].view(-1, length).split(_AT_ONCE) if whole else ()
    if whole < len(ids):
        yield ids[whole:].unsqueeze(0)


def _ids(data: Path, text_key: str, tokenizer: Tokenizer, most: int) -> Tensor:
    ids: list[int] = []
    for file in files_of(str(data), (".txt",), "--data"):
        for document in documents_of(file, text_key, "--data"):
            ids += [*tokenizer.encode(document).tolist(), tokenizer.end]
            if len(ids) >= most:
                return torch.tensor(ids[:most])
    if not ids:
        raise ConfigError(f"--data {str(data)!r} holds no text; give a file of text, or a folder of .txt files")
    return torch.tensor(ids)


def _print(layers: list[LayerReport], tokens: int, console: Console) -> None:
    table = Table("layer", "entropy", "busiest", "dead", "the pair that goes together most", title_justify="left")
    table.title = f"{tokens:,} tokens"
    for number, layer in enumerate(layers):
        share, one, other = max((s, i, j) for i, row in enumerate(layer.together) for j, s in enumerate(row))
        dead = ", ".join(map(str, layer.dead[:8])) + (", ..." if len(layer.dead) > 8 else "")
        pair = f"{100 * share:.0f} % of expert {one}'s tokens go to {other}, too" if share else ""
        table.add_row(str(number), f"{layer.entropy:.3f}", f"{layer.busiest:.2f}", dead or "none", pair)
    console.print(table)
