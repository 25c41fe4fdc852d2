"""Options of the commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Option


@dataclass(frozen=True, kw_only=True)
class CaseOptions:
    """Options that `bench layer`, `bench kernels` and `bench routing` share."""

    shapes: Annotated[
        list[str],
        Option(
            "--shape",
            help="Built-in name, all, or T,D,F,E,K such as 2048,512,1024,16,4. Repeatable.",
        ),
    ] = field(default_factory=lambda: ["all"])
    tokens: Annotated[
        list[int], Option(min=1, help="Tokens in place of those of the shapes. Repeatable.")
    ] = field(default_factory=list)
    dtypes: Annotated[list[str], Option("--dtype", help="bf16, fp16 or fp32. Repeatable.")] = field(
        default_factory=lambda: ["bf16"]
    )
    routings: Annotated[
        list[str], Option("--routing", help="natural, zipf or uniform. Repeatable.")
    ] = field(default_factory=lambda: ["natural"])
    device: Annotated[str, Option(help="cpu, cuda, cuda:N or auto.")] = "auto"
    threads: Annotated[int | None, Option(min=1, help="CPU threads. Default: torch's.")] = None
    repetitions: Annotated[int, Option(min=3, help="Timed runs of each entrant.")] = 20
    seed: Annotated[int, Option(help="Seed of the random tensors.")] = 0
    out: Annotated[Path, Option(help="Output folder.")] = Path("bench")


@dataclass(frozen=True, kw_only=True)
class KernelsOptions(CaseOptions):
    """Options of `bench kernels`."""

    backends: Annotated[
        str,
        Option(
            help="Expert backends separated by commas, or all. gluon:precision=fp8 has options."
        ),
    ] = "all"
    activation: Annotated[str, Option(help="Activation, such as swiglu or geglu.")] = "swiglu"


@dataclass(frozen=True, kw_only=True)
class LayerOptions(KernelsOptions):
    """Options of `bench layer`."""

    peers: Annotated[str, Option(help="Peers separated by commas, all or none.")] = "all"
    launches: Annotated[
        bool, Option("--launches", help="Also time from an idle GPU, the host, and CUDA graphs.")
    ] = False
    held: Annotated[
        int,
        Option(
            min=0, help="Also time while another kernel holds so many multiprocessors, such as 16."
        ),
    ] = 0
    microbatches: Annotated[
        int, Option(min=1, help="Forward and backward passes between two changes of the weights.")
    ] = 1


@dataclass(frozen=True, kw_only=True)
class ExchangeOptions(CaseOptions):
    """Options of `bench exchange`."""

    exchanges: Annotated[
        list[str],
        Option(
            "--exchange",
            help="NAME, NAME:KEY=VALUE such as all_to_all_tokens:chunks=2, or all. Repeatable.",
        ),
    ] = field(default_factory=lambda: ["all"])
    experts: Annotated[str, Option(help="Expert backend, such as gluon:precision=fp8.")] = "auto"
    activation: Annotated[str, Option(help="Activation, such as swiglu or geglu.")] = "swiglu"
    peers: Annotated[str, Option(help="liger, all or none.")] = "all"
    pause: Annotated[
        float, Option(min=0, help="Seconds that the devices are idle before each timed step.")
    ] = 0.25
    timeout: Annotated[
        float, Option(min=1, help="Seconds that a collective of an entrant may take.")
    ] = 300


@dataclass(frozen=True, kw_only=True)
class RoutingOptions(CaseOptions):
    """Options of `bench routing`."""

    backends: Annotated[
        str, Option(help="Routers and permutations separated by commas, or all.")
    ] = "all"
