"""Train transformers' Mixtral of the same size, on the same batches, with the same optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tokenyard import ConfigError
from tokenyard_models import Transformer, TransformerConfig, use_in_transformers
from tokenyard_train.data import PackedDocuments
from tokenyard_train.engine.optimizer import build_optimizer
from tokenyard_train.engine.precision import BF16_MASTER
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


class MixtralPeer:
    """A MixtralForCausalLM with the sizes of a run's model, and its optimizer.

    Raises ConfigError if Mixtral has no such model.
    """

    def __init__(self, setup: Setup, implementation: str, dtype: torch.dtype):
        if not isinstance(setup.model, Transformer):
            raise ConfigError("--peers needs a model of tokenyard-models; give --peers none")
        if setup.config.precision == BF16_MASTER and dtype != torch.bfloat16:
            raise ConfigError(
                "precision is bf16_master, whose matmuls are in bfloat16 without autocast; "
                "give --peer-dtype bf16"
            )
        if isinstance(setup.data.train, PackedDocuments):
            raise ConfigError("--peers compares training on text; give --peers none")
        self.data = setup.data.train
        self.setup = setup
        self.model = _build(setup.model.config, implementation).to(setup.device, dtype)
        self.optimizer = build_optimizer(setup.config.optimizer, self.model)

    def step(self, number: int) -> float:
        """Train on batch `number` in the run's microbatches and precision. Return nats a token."""
        setup = self.setup
        config = setup.config
        samples = self.data.batch(number, config.global_train_batch_size)
        batch = samples.to(setup.device)
        total = torch.zeros((), device=setup.device)
        for rows in batch.split(int(config.device_train_microbatch_size)):
            with setup.precision():
                output = self.model(input_ids=rows[:, :-1], use_cache=False)
                nats = F.cross_entropy(
                    output.logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
                )
            loss = nats / setup.batch_tokens
            auxiliary = output.aux_loss * self.model.router_aux_loss_coef * len(rows) / len(batch)
            (loss + auxiliary).backward()
            total += loss.detach()
        clipping = config.algorithms.gradient_clipping
        if clipping is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clipping.clipping_threshold)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item()


def _build(size: TransformerConfig, implementation: str) -> Any:
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError:
        raise ConfigError('--peers needs transformers; pip install "transformers>=5.14"') from None
    if implementation == "tokenyard":
        use_in_transformers()
    return MixtralForCausalLM._from_config(
        MixtralConfig(**_mixtral_keys(size)),
        attn_implementation="sdpa",
        experts_implementation=implementation,
    )


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
