"""A layer's times while a kernel of another stream holds some of a GPU's multiprocessors.

Collectives of NCCL do that, in training over several GPUs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from tokenyard import ConfigError
from tokenyard.measure.launching import IdleClock
from tokenyard.measure.timing import Stages, measure, run_stages
from tokenyard_bench.launch_times import medians
from tokenyard_bench.sweep import Sweep
from tokenyard_cli.results import Record

log = logging.getLogger("tokenyard")

_START_SECONDS = 0.001  # within which the kernel begins
_LIMIT_SECONDS = 2  # after which it ends on its own
_WAITED = f"waited for all streams of the GPU, or took longer than {_LIMIT_SECONDS} s"


class HeldClock(IdleClock):
    """CUDA events, while a kernel holds some multiprocessors: no large program fits beside it."""

    def __init__(self, device: torch.device, multiprocessors: int):
        super().__init__(device)
        self.multiprocessors = multiprocessors
        self.state = torch.zeros(2, dtype=torch.int32, device=device)
        self.stream = torch.cuda.Stream(device)

    def prepare(self, call: Callable[[], object]) -> None:
        """Overwrite the L2 cache, wait, and hold the multiprocessors."""
        from tokenyard_bench._hold import hold

        self.state[0].zero_()
        super().prepare(call)
        with torch.cuda.stream(self.stream):
            hold[(self.multiprocessors,)](self.state, _LIMIT_SECONDS * 10**9, num_warps=32)
        time.sleep(_START_SECONDS)

    def between(self, stamps: Sequence[Any]) -> list[float]:
        """Free the multiprocessors, and return milliseconds."""
        self.state[0].fill_(1)
        return super().between(stamps)

    def ran_out(self) -> bool:
        """Return whether the kernel ended on its own since the last call of this method.

        It does if a timed call waits for it, or takes as long.
        """
        late = bool(self.state[1])
        self.state[1].zero_()
        return late


def check_held(multiprocessors: int, device: torch.device) -> None:
    """Raise ConfigError if a device cannot have so many multiprocessors held."""
    if device.type != "cuda":
        raise ConfigError(f"--held is for a GPU, and --device is {device.type!r}; leave it out")
    if torch.version.hip is not None:
        raise ConfigError("--held is for NVIDIA GPUs, and this torch is for AMD GPUs; leave it out")
    if find_spec("triton") is None:
        raise ConfigError("--held needs triton, which is not installed: pip install triton")
    count = torch.cuda.get_device_properties(device).multi_processor_count
    if multiprocessors >= count:
        raise ConfigError(
            f"--held is {multiprocessors}, and the GPU has {count} multiprocessors; "
            f"give at most {count - 1}"
        )


def held_times(
    sweep: Sweep, layers: Mapping[str, Stages], multiprocessors: int
) -> dict[str, Record]:
    """Return for each layer, whose stages are the forward and the backward pass, its times in ms.

    The GPU is idle before, but for the kernel that holds so many multiprocessors: none under
    `free`, and `multiprocessors` under `held`. A layer that waits for that kernel is left out.
    """
    clock = HeldClock(sweep.device, multiprocessors)
    beside = {name: stages for name, stages in layers.items() if _runs_beside(name, stages, clock)}
    free = measure(beside, IdleClock(sweep.device), sweep.repetitions)
    held = measure(beside, clock, sweep.repetitions)
    if clock.ran_out():
        log.warning("a layer %s, so --held times none", _WAITED)
        return {}
    return {
        name: {
            "multiprocessors_held": multiprocessors,
            "free": medians(free[name]),
            "held": medians(held[name]),
        }
        for name in beside
    }


def _runs_beside(name: str, stages: Stages, clock: HeldClock) -> bool:
    """Return whether a layer can be timed beside the kernel; warn if it cannot."""
    run_stages(stages)  # allocates memory, which could wait for the kernel
    measure({name: stages}, clock, repetitions=1, warmup=0)
    late = clock.ran_out()
    if late:
        log.warning("%s %s, so --held does not time it", name, _WAITED)
    return not late
