"""A language model of its own: attention by distance (ALiBi), then experts, in every block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenyard import (
    AuxiliaryLoss,
    ConfigError,
    Model,
    MoE,
    Output,
    RoutingRule,
    SavedBytes,
    Targets,
    TokenLoss,
    Workload,
    predict,
)
from tokenyard.count import saved_by_ffn, weight_flops_per_token
from tokenyard.draw import draw_normal

Cache = list[list[Tensor]]  # of each block: nothing, or keys and values [B, H, S, D / H]


@dataclass(frozen=True)
class Sizes:
    """The keys of `model:` besides `name`."""

    vocab_size: int
    max_seq_len: int
    dim: int = 64
    heads: int = 4
    layers: int = 2
    ffn_dim: int = 64
    num_experts: int = 4
    top_k: int = 2
    routing: str = "topk"


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, sizes: Sizes, experts: MoE):
        super().__init__()
        self.heads = sizes.heads
        self.norms = nn.ModuleList(nn.RMSNorm(sizes.dim) for _ in range(2))
        self.qkv = nn.Linear(sizes.dim, 3 * sizes.dim, bias=False)
        self.out = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.experts = experts

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> tuple[Tensor, Any]:
        """Return x [B, S, D] and the Balance of its experts."""
        x = x + self.attend(self.norms[0](x), past)
        y, routing = self.experts(self.norms[1](x))
        return x + y, self.experts.router.balance(routing)

    def attend(self, x: Tensor, past: list[Tensor] | None) -> Tensor:
        """Return causal attention [B, S, D] over x and past tokens, with ALiBi (2108.12409)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        if past is not None:
            past[:] = [torch.cat(pair, 2) for pair in zip(past, (k, v))] or [k, v]
            k, v = past
        keys = torch.arange(k.shape[2], device=x.device)
        distance = keys[-q.shape[2] :].unsqueeze(1) - keys  # [S, keys]
        slopes = 2.0 ** -torch.arange(1, self.heads + 1, device=x.device).view(-1, 1, 1)
        bias = (-slopes * distance).masked_fill(distance < 0, float("-inf")).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B, H, S, D / H]
        return self.out(y.transpose(1, 2).flatten(2))


class AcmeModel(Model):
    """Embedding, blocks, head. It has what ``tokenyard.Model`` asks for, and no more."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        backends: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype | None = None,
        expert_parallel: int | None = None,
    ):
        super().__init__()
        try:
            self.sizes = sizes = Sizes(**config)
        except TypeError as error:
            raise ConfigError(f"model: {str(error).partition('() ')[2]}") from None
        self.vocab_size = sizes.vocab_size
        self.max_seq_len = sizes.max_seq_len
        self.auxiliary = AuxiliaryLoss(balance_weight=0.01)
        workload = Workload(
            sizes.dim,
            sizes.ffn_dim,
            sizes.num_experts,
            sizes.top_k,
            router=RoutingRule(sizes.routing),
            dtype=compute_dtype,
            device=torch.device(device),
            expert_parallel=expert_parallel or 1,
        )
        self.embed = nn.Embedding(sizes.vocab_size, sizes.dim)
        self.blocks = nn.ModuleList(
            Block(sizes, MoE(workload, backends=backends)) for _ in range(sizes.layers)
        )
        self.head = nn.Linear(sizes.dim, sizes.vocab_size, bias=False)
        if dtype is not None:
            self.to(dtype)

    def forward(
        self, ids: Tensor, cache: Cache | None = None, targets: Targets | None = None
    ) -> Output | TokenLoss:
        """Return logits [B, S, V] for ids [B, S] or the loss of targets, and a Balance a block."""
        x = self.embed(ids)
        balances = []
        for i, block in enumerate(self.blocks):
            x, balance = block(x, None if cache is None else cache[i])
            balances.append(balance)
        return predict(x, self.head.weight, balances, targets)

    def new_cache(self, batch: int, length: int) -> Cache:
        """Return an empty cache. It grows as it is filled."""
        return [[] for _ in self.blocks]

    def init_weights(self, seed: int) -> None:
        """Draw matrices from N(0, 1 / fan-in), and set norms to 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.data.fill_(1.0)
            else:
                draw_normal(parameter, seed, name, std=parameter.shape[-1] ** -0.5)

    def flops_per_token(self, seq_len: int) -> float:
        """Return the operations of weights and of attention, which sees half of the sequence."""
        attention = 4 * self.sizes.dim * (seq_len + 1) / 2
        return weight_flops_per_token(self, [self.embed.weight]) + len(self.blocks) * attention

    def saved_bytes_per_token(self, seq_len: int, width: int) -> SavedBytes:
        """Return the inputs of norms, matmuls and experts, and the attention weights."""
        dim = self.sizes.dim
        attention = width * (6 * dim + self.sizes.heads * seq_len)
        norms = 2 * (8 + width) * dim
        blocks = [norms + attention + saved_by_ffn(block.experts, width) for block in self.blocks]
        return SavedBytes(tuple(blocks), block_input=4 * dim, rest=width * dim)
