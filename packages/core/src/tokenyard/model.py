"""The base class of language models: everything that training, generation and estimates use of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import nn

from tokenyard.interfaces import Output
from tokenyard.losses import AuxiliaryLoss


class SavedBytes(NamedTuple):
    """Bytes per token that a model keeps from its forward to its backward pass, without the logits."""

    blocks: tuple[int, ...]  # of each block
    block_input: int  # what is kept of a block whose forward pass is recomputed
    rest: int  # outside the blocks


class Model(nn.Module, ABC):
    """A causal language model.

    Constructed as ``cls(config, backends=..., device=..., compute_dtype=..., dtype=...,
    expert_parallel=...)``, all but `config` by keyword and optional:

    * `config` is the `model:` section of a config file without `name`.
    * `backends` maps parts of an MoE layer to backends (see ``tokenyard.MoE``).
    * `device` is where the model will run, `compute_dtype` what its experts will compute in.
      Backends are chosen for these two.
    * `dtype` is the dtype of the parameters. They are made on `device`, or on the meta device
      inside ``with torch.device("meta")``.
    * `expert_parallel` is the number of ranks that share the experts of each layer.

    A subclass sets the four attributes in its constructor.
    """

    blocks: nn.ModuleList  # in order; each is sharded, and recomputed, as a whole
    vocab_size: int  # V, ids are below it
    max_seq_len: int  # the most tokens of a sequence, those in a cache included
    auxiliary: AuxiliaryLoss  # the weights of the router losses

    @abstractmethod
    def forward(self, ids: Any, cache: Any = None) -> Output:
        """Return logits [B, S, V] for ids [B, S], and the Balance of each MoE layer in order.

        A cache from `new_cache` holds the tokens of earlier calls, and gains those of this one.
        """

    @abstractmethod
    def new_cache(self, batch: int, length: int) -> Any:
        """Return an empty cache for `batch` sequences of at most `length` tokens."""

    @abstractmethod
    def init_weights(self, seed: int) -> None:
        """Set every parameter and buffer to its initial value.

        Values depend on the seed and the parameter's name, never on the ranks or their number.
        """

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> float:
        """Return the floating-point operations of the forward pass for one token.

        The mean over the positions of a sequence of `seq_len` tokens. ``tokenyard.count`` counts
        those of the weights; attention scores come on top.
        """

    @abstractmethod
    def saved_bytes_per_token(self, seq_len: int, width: int) -> SavedBytes:
        """Return what the backward pass needs of a token.

        The mean over a sequence of `seq_len` tokens, for a compute dtype of `width` bytes.

        ``tokenyard.count.saved_by_ffn`` counts it for MoE layers and dense networks.
        """
