"""The base class of language models: what training, generation and estimates need of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from inspect import signature
from typing import Any, NamedTuple

from torch import nn

from tokenyard.interfaces import Documents, Output, Targets, TokenLoss
from tokenyard.losses import AuxiliaryLoss
from tokenyard.moe import moe_layers


class SavedBytes(NamedTuple):
    """Bytes per token that a forward pass saves for the backward pass, without the logits."""

    blocks: tuple[int, ...]  # those of each block
    block_input: int  # those of a block whose forward pass is recomputed
    rest: int  # those outside the blocks
    kept: tuple[int, ...] = ()  # those of each block that selective recompute keeps, if known


_ATTRIBUTES = {
    "blocks": nn.ModuleList,
    "vocab_size": int,
    "max_seq_len": int,
    "auxiliary": AuxiliaryLoss,
}


def missing_part(model: object) -> str | None:
    """Return one sentence on what a model, or its class, lacks of `Model`; else None.

    Of a class, only the base class, the methods and their arguments are checked.
    """
    cls = model if isinstance(model, type) else type(model)
    if not issubclass(cls, Model):
        return f"{cls.__qualname__} does not derive from tokenyard.Model; derive it"
    if cls.__abstractmethods__:
        names = ", ".join(sorted(cls.__abstractmethods__))
        return f"{cls.__qualname__} lacks {names}; see tokenyard.Model"
    if "targets" not in signature(cls.forward).parameters:
        return (
            f"the forward method of {cls.__qualname__} lacks the argument targets; end it with "
            "tokenyard.predict(x, head_weight, balances, targets)"
        )
    if isinstance(model, type):
        return None
    for name, kind in _ATTRIBUTES.items():
        value = getattr(model, name, None)
        if not isinstance(value, kind):
            return (
                f"the constructor of {cls.__qualname__} must set {name}, of type {kind.__name__}; "
                f"it is {value!r}"
            )
    return None


def why_no_documents(model: Model) -> str | None:
    """Return one sentence on why a model cannot read packed documents, or None."""
    if "documents" not in signature(type(model).forward).parameters:
        return (
            f"{type(model).__qualname__} does not read packed documents: its forward method lacks "
            "the argument documents; see tokenyard.Documents"
        )
    for moe in moe_layers(model):
        router: Any = moe.router
        for name in ("forward", "balance"):
            if "padding" not in signature(getattr(router, name)).parameters:
                return (
                    f"the router {type(router).__qualname__} does not leave padding out: its "
                    f"method {name} lacks the argument padding; see tokenyard.Router"
                )
    return None


class Model(nn.Module, ABC):
    """A causal language model.

    Constructed as ``cls(config, backends=..., device=..., compute_dtype=..., dtype=...,
    expert_parallel=...)``, all but `config` by keyword and optional:

    * `config` is the `model:` section of a config file without `name`.
    * `backends` maps parts of an MoE layer to backends (see ``tokenyard.MoE``).
    * `device` is the device of the model, and `compute_dtype` the compute dtype of its experts.
      Backends are chosen for both.
    * `dtype` is the dtype of the parameters. They are allocated on `device`, or on the meta device
      inside ``with torch.device("meta")``.
    * `expert_parallel` is the number of ranks that share the experts of each layer. None means 1,
      unless the model's own config says otherwise.

    A subclass sets `blocks`, `vocab_size`, `max_seq_len` and `auxiliary` in its constructor.
    """

    blocks: nn.ModuleList
    """The blocks in order. Each is sharded, and recomputed, as a whole."""
    vocab_size: int
    """V, above all ids."""
    max_seq_len: int
    """The maximum length of a sequence, including tokens in a cache."""
    auxiliary: AuxiliaryLoss
    """The weights of the router losses."""

    @abstractmethod
    def forward(
        self,
        ids: Any,
        cache: Any = None,
        targets: Targets | None = None,
        documents: Documents | None = None,
    ) -> Output | TokenLoss:
        """Return logits [B, S, V] for ids [B, S], and the Balance of each MoE layer in order.

        A cache from `new_cache` holds the tokens of earlier calls. This call adds its tokens. With
        `targets`, return their loss instead of the logits. ``tokenyard.predict`` does both.

        `documents` says which tokens of a row belong together. Attention stays within a document,
        positions begin anew in each, and experts and Balances leave padding out. A model without
        this argument trains on text only: see ``why_no_documents``.
        """

    @abstractmethod
    def new_cache(self, batch: int, length: int) -> Any:
        """Return an empty cache for `batch` sequences of at most `length` tokens.

        If it has the optional method ``prefix(length, capacity)``, which returns a cache with room
        for `capacity` tokens that holds its first `length`, a chat keeps it between answers.
        If it has the optional method ``fixed()``, text is generated by a CUDA graph. That returns a
        cache for calls with one id a row, which launch the same kernels on the same memory each
        time, and whose method ``advance()`` moves its position, on the device, to the next id. The
        Output of such a call need not hold Balances.
        If it also has the optional method ``rewind(length)``, the graph serves later texts. That
        drops all tokens but the first `length`, those of ``fixed()`` included, and leaves the
        memory where it is. ``fixed()`` then returns the same cache as before, at the new position.
        """

    @abstractmethod
    def init_weights(self, seed: int) -> None:
        """Set every parameter and buffer to its initial value.

        Values depend on the seed and on names of parameters, never on the rank or world size.
        ``tokenyard.draw.draw_normal`` fills a parameter so.
        """

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs per token of the forward pass over sequences of `seq_len` tokens.

        ``tokenyard.count.weight_flops_per_token`` counts those of the weights. Add those of
        attention scores: 4 * heads * head_dim * (seq_len + 1) / 2 for each causal layer.
        """

    @abstractmethod
    def saved_bytes_per_token(self, seq_len: int, width: int) -> SavedBytes:
        """Return the bytes per token that a forward pass saves, for sequences of `seq_len` tokens.

        `width` is the size of the compute dtype in bytes. ``tokenyard.count.saved_by_ffn`` counts
        them for MoE layers and dense FFNs, and ``kept_by_ffn`` what selective recompute keeps.
        """
