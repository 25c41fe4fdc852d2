"""The transformer that every model family is: embeddings, blocks of attention and experts, a head.

ids [B, S] -> embed -> for each block: x + attention(norm_1(x)); x + ffn(norm_2(x)) -> norm -> head
-> logits [B, S, V]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from tokenyard import (
    Balance,
    ConfigError,
    Documents,
    FeedForward,
    Model,
    MoE,
    Output,
    Registry,
    SavedBytes,
    Targets,
    TokenLoss,
    Workload,
    predict,
)
from tokenyard.count import weight_flops_per_token
from tokenyard.lora import head_inputs
from tokenyard.registry import Request
from tokenyard_models.block import Block, norm_of
from tokenyard_models.config import TransformerConfig
from tokenyard_models.fixed_cache import FixedCache
from tokenyard_models.init_weights import initialize
from tokenyard_models.kv_cache import Cache
from tokenyard_models.rotary import Rotation, rotation_of
from tokenyard_models.saved_bytes import Widths, saved_bytes


class Transformer(Model):
    """A language model as `config` describes it.

    The arguments are those of ``tokenyard.Model``, with a resolved TransformerConfig in place of a
    `model:` section. `expert_parallel` defaults to what the config asks for, else 1.
    `init_weights` sets the values of the parameters.
    """

    definition = "transformer"  # the family's name in configs

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
        self.config = config
        self.auxiliary = config.auxiliary
        self.vocab_size = config.vocab_size
        self.max_seq_len = config.max_seq_len
        self.expert_parallel = _expert_parallel(config, expert_parallel)
        workload = _workload(config, torch.device(device), compute_dtype, self.expert_parallel)
        self._fused_norms = (
            torch.device(device).type == "cuda"
        )  # RMSNorm is a kernel of torch there
        meta = torch.get_default_device().type == "meta"
        with torch.device("meta" if meta else device):
            self.embed = _embedding(config.vocab_size, config.dim)
            self.positions = None
            if config.rope_theta is None:
                self.positions = _embedding(config.max_seq_len, config.dim)
            ffns = (
                _ffn(config, layer, workload, backends, registry) for layer in range(config.layers)
            )
            self.blocks = nn.ModuleList(Block(config, ffn) for ffn in ffns)
            self.norm = norm_of(config)
            self.head = None
            if not config.tied_head:
                self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if dtype is not None:
            _convert(self.parameters(), dtype)

    def forward(
        self,
        ids: Tensor,
        cache: Cache | FixedCache | None = None,
        targets: Targets | None = None,
        documents: Documents | None = None,
    ) -> Output | TokenLoss:
        """Return logits [B, S, V] for ids [B, S], and the Balance of each MoE layer.

        A cache continues earlier calls; with a fixed one there are no Balances. With `targets`,
        return their loss instead of the logits, which then exist in chunks only. With `documents`,
        each is computed as if it were alone. Raises ConfigError for more tokens than max_seq_len,
        and for documents with a cache.
        """
        # Embed: [B, S] -> [B, S, D]
        positions = self._positions(ids, cache, documents)
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions(positions)
        # Blocks
        balances: list[Balance] = []
        rotation = self._rotation(positions, x.dtype, cache)
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[i]
            x, balance = block(x, positions, rotation, layer_cache, documents)
            if balance is not None:
                balances.append(balance)
        # Head: [B, S, D] -> [B, S, V]
        x = self.norm(x)
        weight = self.embed.weight
        if self.head is not None:
            x, weight = head_inputs(x, self.head)
        return predict(x, weight, balances, targets)

    def _positions(
        self, ids: Tensor, cache: Cache | FixedCache | None, documents: Documents | None
    ) -> Tensor:
        """Return the positions of ids [B, S]: [S], or [B, S] in documents. Raises ConfigError."""
        if isinstance(cache, FixedCache):
            return cache.position
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        if end > self.max_seq_len:
            raise ConfigError(
                f"{end} tokens were given to a model whose max_seq_len is {self.max_seq_len}"
            )
        if documents is None:
            return torch.arange(start, end, device=ids.device)
        if cache is not None:
            raise ConfigError("documents and a cache were given; a cache continues one document")
        return documents.positions

    def _rotation(
        self, positions: Tensor, dtype: torch.dtype, cache: Cache | FixedCache | None
    ) -> Rotation | None:
        if isinstance(cache, FixedCache):
            return cache.rotation
        return rotation_of(positions, self.config, dtype)

    def new_cache(self, batch: int, length: int) -> Cache:
        """Return an empty cache for `batch` sequences of at most `length` tokens."""
        return Cache(batch, length, self.config)

    def init_weights(self, seed: int) -> None:
        """Set every parameter and buffer to its initial value, the same in every layout."""
        initialize(self, seed, self.config.layers)

    def flops_per_token(self, seq_len: int) -> float:
        """Return the floating-point operations of the forward pass for one token, on average.

        Attention takes 4 * heads * head_dim for each position that a token attends to. A causal
        token attends to (seq_len + 1) / 2 positions on average.
        """
        lookups = [] if self.positions is None else [self.positions.weight]
        if self.head is not None:
            lookups.append(self.embed.weight)
        scores = 4 * self.config.heads * self.config.head_dim * (seq_len + 1) / 2
        return weight_flops_per_token(self, lookups) + self.config.layers * scores

    def saved_bytes_per_token(self, seq_len: int, width: int) -> SavedBytes:
        """Return what the backward pass needs of a token, for a compute dtype of `width` bytes.

        Attention keeps no scores, so `seq_len` does not matter.
        """
        ffns = [cast(Block, block).ffn for block in self.blocks]
        widths = Widths(width, self.embed.weight.dtype.itemsize)
        return saved_bytes(self.config, ffns, widths, self._fused_norms)


def _convert(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Convert parameters alone: a selection bias is a buffer, and stays float32."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _embedding(rows: int, dim: int) -> nn.Embedding:
    """Return an embedding. On the meta device it is not drawn: that would import the compiler."""
    weight = torch.empty(rows, dim)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)


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
        ffn_dims=moe.ffn_dims,
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
    """Raise ConfigError for a key that only a model with experts has."""
    keys: dict[str, object] = {f"backends.{kind}": request for kind, request in backends.items()}
    keys["parallel.expert_parallel"] = None if expert_parallel == 1 else expert_parallel
    for key, value in keys.items():
        if value not in (None, "auto"):
            raise ConfigError(f"{key} is {value!r}, and the model has no experts; leave it out")


def _expert_parallel(config: TransformerConfig, argument: int | None) -> int:
    """Return the number of ranks that share the experts. Raises ConfigError for two numbers."""
    world_size = config.expert_parallel
    if world_size is not None and argument is not None and world_size != argument:
        keys = f"moe_world_size is {world_size} and parallel.expert_parallel is {argument}"
        raise ConfigError(f"{keys}; they mean the same, so set one of them")
    return argument or world_size or 1
