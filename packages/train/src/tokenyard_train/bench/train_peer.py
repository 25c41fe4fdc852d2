"""Train transformers' Mixtral of the same size, on the same batches, with the same optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from tokenyard import ConfigError
from tokenyard_models import Transformer, TransformerConfig, use_in_transformers
from tokenyard_models.hf import WeightsError, to_peft
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import PackedDocuments
from tokenyard_train.data.mixture import Mixture
from tokenyard_train.data.samples import Samples
from tokenyard_train.engine.optimizer import build_optimizer
from tokenyard_train.engine.precision import BF16_MASTER, computing_in
from tokenyard_train.engine.setup import Setup

IMPLEMENTATIONS = {
    "transformers-eager": "eager",
    "transformers-grouped_mm": "grouped_mm",
    "transformers-tokenyard": "tokenyard",
}
"""Expert implementation of each peer. The last is ours, inside transformers."""

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
    """Return the model on its device. Its weights are drawn there, in their dtype."""
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError:
        raise ConfigError('--peers needs transformers; pip install "transformers>=5.14"') from None
    if implementation == "tokenyard":
        use_in_transformers()
    with torch.device(task.config.device):
        model = MixtralForCausalLM._from_config(
            MixtralConfig(**_mixtral_keys(task.size)),
            attn_implementation="sdpa",
            experts_implementation=implementation,
            dtype=task.dtype,
        )
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


def _mixtral_keys(size: TransformerConfig) -> dict[str, Any]:
    """Return the keys of a MixtralConfig. Raises ConfigError if Mixtral has no such model."""
    moe = size.moe
    if moe is None or moe.activation != "swiglu" or size.rope_theta is None or size.dense_layers:
        raise ConfigError(
            "--peers compares with Mixtral, "
            "which has swiglu experts in every layer and rotary positions"
        )
    return {
        "vocab_size": size.vocab_size,
        "hidden_size": size.dim,
        "intermediate_size": moe.ffn_dim,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.max_seq_len,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "tie_word_embeddings": size.tied_head,
        "output_router_logits": True,
        # With balanced experts, transformers' loss is K and ours is 1.
        "router_aux_loss_coef": size.auxiliary.balance_weight / moe.top_k,
        "sliding_window": None,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
