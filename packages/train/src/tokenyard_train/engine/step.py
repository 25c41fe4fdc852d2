"""One optimizer step over a global batch.

Forward and backward passes, the gradient norm, the optimizer, the routers, the numbers to the host.

All of it is launched without a wait. So a GPU can be given the next step before the numbers of this
one have arrived.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenyard import MoE
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.microbatch import Accumulated, accumulate
from tokenyard_train.engine.phases import Phases, untimed
from tokenyard_train.engine.schedule import learning_rate, schedule_steps
from tokenyard_train.engine.setup import Setup
from tokenyard_train.engine.step_result import Step, StepInFlight
from tokenyard_train.records.step_numbers import Fetch, pack


def train_step(
    setup: Setup, batch: int, flags: Sequence[bool] = (), phase: Phases = untimed
) -> Step:
    """Take optimizer step number `batch`, from 0, unless its loss or gradient is not finite.

    `flags` are reduced over ranks with the step's numbers: a flag is true if it is true on any
    rank. `phase` is a context around each part of the step.
    """
    step = end_step(setup, batch, begin_step(setup, batch, phase), flags, phase)
    with phase("optimizer"):
        return step.wait()


def begin_step(setup: Setup, batch: int, phase: Phases = untimed) -> Accumulated:
    """Launch the forward and backward passes of a step.

    They change no parameter, state of the optimizer, or router.
    """
    # faster than to set the mode of each module, for which a GPU would wait
    if not all(module.training for module in setup.modules):
        setup.model.train()
    _seed(setup, batch)
    return accumulate(setup, batch, phase)


def end_step(
    setup: Setup,
    batch: int,
    accumulated: Accumulated,
    flags: Sequence[bool] = (),
    phase: Phases = untimed,
) -> StepInFlight:
    """Launch the updates of parameters and routers by what `begin_step` accumulated.

    Arguments are those of `train_step`.
    """
    loss, sums, *counts = accumulated
    experts = [moe.workload.num_experts for moe in setup.layers]
    # Clip and update; nothing changes if a number is not finite
    with phase("optimizer"):
        norm = setup.strategy.gradient_norm(setup.model)
        lr = _set_learning_rates(setup, batch)
        scale = _gradient_scale(setup.config, loss, norm)
        setup.optimizer.step(scale=scale)
        setup.optimizer.zero_grad(set_to_none=True)
        if sums is not None:
            taken = scale.eq(scale)  # false for nan
            _update_routers(setup.layers, sums.counts.split(experts), taken)
        packed = pack(loss, norm, sums, setup.strategy.reduce, flags, counts)
        fetch = Fetch(packed, experts, flags, counts)
    # Read the next batch while the GPU works
    with phase("data"):
        if batch + 1 < setup.batches:
            setup.reader.read_ahead(batch + 1)
    return StepInFlight(setup, fetch, lr)


@torch.no_grad()
def _update_routers(layers: Sequence[MoE], slots: Sequence[Tensor], taken: Tensor) -> None:
    """Update routers by the slots of their experts, if the step is `taken`, a bool on the device.

    So their buffers are kept or restored there: the host does not wait to learn which. A buffer
    that `update` replaced stays the same tensor, whose memory a CUDA graph reads.
    """
    for moe, counts in zip(layers, slots):
        router = moe.get_submodule("router")
        buffers = dict(router.named_buffers())
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        moe.router.update(counts)
        after = dict(router.named_buffers())
        for name, buffer in buffers.items():
            buffer.copy_(after[name].where(taken, before[name]))
            module, _, key = name.rpartition(".")
            setattr(router.get_submodule(module), key, buffer)


def _set_learning_rates(setup: Setup, batch: int) -> float:
    """Set the rate of each group for a step. Return that of the first group."""
    scheduler = setup.config.scheduler
    times = schedule_steps(scheduler, setup.steps_in)
    groups = setup.optimizer.param_groups
    for group in groups:
        group["lr"] = learning_rate(scheduler, group["initial_lr"], batch, times)
    rate: float = groups[0]["lr"]
    return rate


def _gradient_scale(config: TrainConfig, loss: Tensor, norm: Tensor) -> Tensor:
    """Return the factor that clips gradients of this norm; nan if the step must be skipped."""
    clipping = config.algorithms.gradient_clipping
    # 0, or nan if a number is not finite, by fewer kernels than isfinite() launches
    scale = ((loss + norm) * 0).to(norm.dtype)
    if clipping is None:
        return scale + 1
    # as torch clips: 1e-6 keeps a norm of zero from dividing by zero
    return scale + (clipping.clipping_threshold / (norm + 1e-6)).clamp(max=1.0)


def _seed(setup: Setup, batch: int) -> None:
    """Seed the generators of host and device by (seed, step, rank), so that no state needs saving.

    ``torch.manual_seed`` looks for all kinds of devices, which takes longer than all else before a
    small model's step.
    """
    key = f"{setup.config.seed}/{batch}/{setup.strategy.data[0]}"
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1
    torch.default_generator.manual_seed(seed)
    if setup.device.type == "cuda":
        torch.cuda.default_generators[setup.device.index].manual_seed(seed)
