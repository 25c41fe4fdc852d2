"""The transformer that every definition is: embeddings, blocks of attention and (mostly) experts, a head.

ids [B, S] -> embed -> for each block: x + attention(norm_1(x)); x + ffn(norm_2(x)) -> norm -> head -> logits
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenyard import Balance, ConfigError, FeedForward, MoE, Output, Registry, Workload
from tokenyard.registry import Request
from tokenyard_models.attention import Attention
from tokenyard_models.cache import Cache, LayerCache
from tokenyard_models.config import TransformerConfig
from tokenyard_models.init import initialize


class Block(nn.Module):
    """One layer. Its routing leaves it only as a Balance, never as logits [T, E]."""

    def __init__(self, config: TransformerConfig, ffn: MoE | FeedForward):
        super().__init__()
        self.norm_1, self.norm_2 = _norm(config), _norm(config)
        self.attention = Attention(config)
        self.ffn = ffn
        self.forced_balance = config.moe is not None and config.moe.forced_balance

    def forward(
        self, x: Tensor, positions: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, Balance | None]:
        """Return x [B, S, D] and, from an MoE layer, its Balance."""
        x = x + self.attention(self.norm_1(x), positions, cache)
        if not isinstance(self.ffn, MoE):
            return x + self.ffn(self.norm_2(x)), None
        y, routing = self.ffn(self.norm_2(x), self._forced_ids(x))
        return x + y, self.ffn.router.balance(routing)

    def _forced_ids(self, x: Tensor) -> Tensor | None:
        if not self.forced_balance or not isinstance(self.ffn, MoE):
            return None
        experts, k = self.ffn.workload.num_experts, self.ffn.workload.top_k
        tokens = x.shape[0] * x.shape[1]
        return torch.arange(tokens * k, device=x.device).remainder(experts).view(tokens, k)


class Transformer(nn.Module):
    """A language model as `config` describes it.

    `backends` are those of its MoE layers; `device` is where it will run and `compute_dtype` what its experts will
    compute in, by which backends are chosen. Parameters are made in `dtype` on that device, or on the meta device
    inside ``with torch.device("meta")``; `init_weights` gives them their values. `expert_parallel` ranks share the
    experts; left out, as many as the config itself asks for, or one.
    """

    definition = "transformer"  # the name that configs use, of those that have one

    def __init__(
        self,
        config: TransformerConfig,
        *,
        backends: Mapping[str, Request] | None = None,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype | None = None,
        expert_parallel: int | None = None,
        registry: Registry | None = None,
    ):
        super().__init__()
        if config.moe is None:
            _no_experts(backends or {}, expert_parallel or config.expert_parallel)
        self.config, self.auxiliary = config, config.auxiliary
        self.expert_parallel = _expert_parallel(config, expert_parallel)
        workload = _workload(config, torch.device(device), compute_dtype, self.expert_parallel)
        meta = torch.get_default_device().type == "meta"
        with torch.device("meta" if meta else device):
            self.embed = _embedding(config.vocab_size, config.dim)
            self.positions = (
                _embedding(config.max_seq_len, config.dim) if config.rope_theta is None else None
            )
            ffns = (
                _ffn(config, layer, workload, backends, registry) for layer in range(config.layers)
            )
            self.blocks = nn.ModuleList(Block(config, ffn) for ffn in ffns)
            self.norm = _norm(config)
            self.head = (
                None if config.tied_head else nn.Linear(config.dim, config.vocab_size, bias=False)
            )
        if dtype is not None:
            for parameter in self.parameters():
                parameter.data = parameter.data.to(
                    dtype
                )  # not self.to(dtype): a selection bias stays float32

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Output:
        """Return logits [B, S, V] for ids [B, S] and the Balance of each MoE layer; a cache continues earlier calls."""
        start = 0 if cache is None else cache.length
        if start + ids.shape[1] > self.config.max_seq_len:
            length = start + ids.shape[1]
            raise ConfigError(
                f"{length} tokens were given to a model whose max_seq_len is {self.config.max_seq_len}"
            )
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions(positions)
        balances: list[Balance] = []
        for i, block in enumerate(self.blocks):
            x, balance = block(x, positions, None if cache is None else cache.layers[i])
            balances += [] if balance is None else [balance]
        weight = self.embed.weight if self.head is None else self.head.weight
        return Output(F.linear(self.norm(x), weight), tuple(balances))

    def new_cache(self, batch: int, length: int) -> Cache:
        """Return an empty cache with room for `length` tokens of `batch` sequences."""
        return Cache(batch, length, self.config)

    def init_weights(self, seed: int) -> None:
        """Give every parameter and buffer its initial value, the same in every layout."""
        initialize(self, seed, self.config.layers)


def _embedding(rows: int, dim: int) -> nn.Embedding:
    """Return an embedding; on the meta device, where nn.Embedding's own draw would import the compiler, undrawn."""
    weight = torch.empty(rows, dim)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)


def _norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.dim, eps=config.norm_eps)
    return nn.LayerNorm(config.dim, eps=config.norm_eps, bias=config.bias)


def _workload(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype, expert_parallel: int
) -> Workload | None:
    if (moe := config.moe) is None:
        return None
    return Workload(
        config.dim,
        moe.ffn_dim,
        moe.num_experts,
        moe.top_k,
        activation=moe.activation,
        bias=moe.bias,
        router=moe.rule,
        dtype=dtype,
        device=device,
        expert_parallel=expert_parallel,
    )


def _ffn(
    config: TransformerConfig,
    layer: int,
    workload: Workload | None,
    backends: Mapping[str, Request] | None,
    registry: Registry | None,
) -> MoE | FeedForward:
    moe = config.moe
    if moe is None or workload is None or layer in config.dense_layers:
        return FeedForward(config.dim, config.dense_width, config.dense_activation, config.bias)
    return MoE(
        workload,
        backends=backends,
        shared_dim=moe.shared_dim,
        shared_weighted_sum=moe.shared_weighted_sum,
        output_bias=moe.output_bias,
        registry=registry,
    )


def _no_experts(backends: Mapping[str, Request], expert_parallel: int | None) -> None:
    """Raise ConfigError for what is asked of experts."""
    asked: dict[str, object] = {f"backends.{kind}": request for kind, request in backends.items()}
    asked["parallel.expert_parallel"] = None if expert_parallel == 1 else expert_parallel
    for key, value in asked.items():
        if value not in (None, "auto"):
            raise ConfigError(f"{key} is {value!r}, and the model has no experts; leave it out")


def _expert_parallel(config: TransformerConfig, asked: int | None) -> int:
    own = config.expert_parallel
    if own is not None and asked is not None and own != asked:
        given = f"moe_world_size is {own} and parallel.expert_parallel is {asked}"
        raise ConfigError(f"{given}; they mean the same, so set one of them")
    return asked or own or 1
