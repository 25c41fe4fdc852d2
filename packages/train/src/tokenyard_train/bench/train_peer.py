"""Train transformers' Mixtral of the same size, on the same batches, with the same optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from tokenyard import ConfigError
from tokenyard_models import Transformer, TransformerConfig
from tokenyard_models.hf import WeightsError, to_peft
from tokenyard_train.bench.mixtral import mixtral
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import PackedDocuments
from tokenyard_train.data.mixture import Mixture
from tokenyard_train.data.samples import Samples
from tokenyard_train.engine.optimizer import build_optimizer
from tokenyard_train.engine.precision import BF16_MASTER, computing_in
from tokenyard_train.engine.setup import Setup

PEER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes of a peer's weights, by the value of `--peer-dtype`."""

BOTH = ("transformers-eager", "transformers-grouped_mm")
"""The implementations of transformers itself."""


class PeerTask(NamedTuple):
    """What a peer trains, and on what. It holds no weights, so that ours can be freed."""

    config: TrainConfig
    size: TransformerConfig
    data: Samples | Mixture
    dtype: torch.dtype  # of the peer's weights
    adapters: Path | None  # our LoRA adapters, as PEFT reads them


def peer_task(setup: Setup, dtype: torch.dtype, folder: Path) -> PeerTask:
    """Return the task of all peers of a run. Its adapters are written to `folder`.

    Raises ConfigError if no peer can train like this run.
    """
    config = setup.config
    if not isinstance(setup.model, Transformer):
        raise ConfigError("--peers needs a model of tokenyard-models; give --peers none")
    if config.precision == BF16_MASTER and dtype != torch.bfloat16:
        raise ConfigError(
            "precision is bf16_master, whose matmuls are in bfloat16 without autocast; "
            "give --peer-dtype bf16"
        )
    if isinstance(setup.data.train, PackedDocuments):
        raise ConfigError("--peers compares training on text; give --peers none")
    adapters = None
    if config.lora is not None:
        if config.lora.train_also or config.lora.dropout:
            raise ConfigError("--peers with lora needs no train_also and no dropout, as in PEFT")
        adapters = folder / "adapters"
        try:
            to_peft(setup.model, adapters, dtype=dtype)
        except WeightsError as error:
            raise ConfigError(
                f"--peers with lora needs a model.name such as mixtral ({error})"
            ) from None
    return PeerTask(config, setup.model.config, setup.data.train, dtype, adapters)


class MixtralPeer:
    """A MixtralForCausalLM with the sizes of a run's model, and its optimizer.

    With `lora` it has our adapters, by PEFT, on frozen weights. Raises ConfigError if Mixtral has
    no such model.
    """

    def __init__(self, task: PeerTask, implementation: str):
        self.task = task
        self.model = _build(task, implementation)
        self.optimizer = build_optimizer(task.config.optimizer, self.model)
        self._balance = self.model.config.router_aux_loss_coef

    def step(self, number: int) -> float:
        """Train on batch `number` in the run's microbatches and precision. Return nats a token."""
        config = self.task.config
        device = torch.device(config.device)
        batch = self.task.data.batch(number, config.global_train_batch_size).to(device)
        total = torch.zeros((), device=device)
        for rows in batch.split(int(config.device_train_microbatch_size)):
            with computing_in(config.precision, device):
                output = self.model(input_ids=rows[:, :-1], use_cache=False)
                nats = F.cross_entropy(
                    output.logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
                )
            loss = nats / batch[:, 1:].numel()
            auxiliary = output.aux_loss * self._balance * len(rows) / len(batch)
            (loss + auxiliary).backward()
            total += loss.detach()
        clipping = config.algorithms.gradient_clipping
        if clipping is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clipping.clipping_threshold)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item()


def _build(task: PeerTask, implementation: str) -> Any:
    """Return the model on its device."""
    model = mixtral(task.size, implementation, task.dtype, task.config.device)
    if task.config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model if task.adapters is None else _with_adapters(model, task.adapters)


def _with_adapters(model: Any, folder: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise ConfigError('--peers with lora needs PEFT; pip install "peft>=0.21"') from None
    return PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False)
