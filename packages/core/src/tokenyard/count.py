"""Exact counts of a model's parameters, FLOPs and saved memory. Works on the meta device."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from tokenyard.activations import is_gated
from tokenyard.feed_forward import FeedForward
from tokenyard.interfaces import CachingExpertKernel
from tokenyard.model import Model
from tokenyard.moe import MoE, moe_layers
from tokenyard.sharded import local_part
from tokenyard.workload import Workload

_WIDE = 4  # bytes of float32, the dtype of routing and of the residual stream


class Size(NamedTuple):
    """The numbers of parameters of a model."""

    total: int
    active: int  # used for one token: those of K of E experts, and all outside of experts
    experts: int  # those of all experts


def count_parameters(model: nn.Module) -> Size:
    """Return the numbers of parameters of a model. Tied parameters count once.

    What lies past the width of an expert does not count. The numbers of active parameters and
    FLOPs assume that all experts compute equally many tokens.
    """
    numel = used_numel(model)
    total = sum(numel.values())
    experts = 0
    idle = 0
    for moe in moe_layers(model):
        work = moe.workload
        in_layer = sum(numel[p] for p in moe.experts.parameters())
        experts += in_layer
        idle += in_layer * (work.num_experts - work.top_k) // work.num_experts
    return Size(total, total - idle, experts)


def used_numel(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return how many numbers of each parameter are used: fewer if experts differ in width."""
    numel = {p: p.numel() for p in model.parameters()}
    for moe in moe_layers(model):
        for p in moe.experts.parameters():
            numel[p] = round(p.numel() * used_width(moe.workload))
    return numel


def used_width(workload: Workload) -> float:
    """Return the share of the experts' weights that is used: below 1 if their widths differ."""
    if workload.ffn_dims is None:
        return 1.0
    return sum(workload.ffn_dims) / (workload.num_experts * workload.ffn_dim)


def weight_flops_per_token(model: nn.Module, lookups: Collection[Tensor] = ()) -> float:
    """Return the FLOPs per token of the forward matmuls with weight matrices.

    Each matrix element counts 2 FLOPs; those of experts count K / E times. `lookups` are matrices
    that are only indexed, such as an embedding that is not also the head.
    """
    expert_share = {
        p: m.workload.top_k / m.workload.num_experts * used_width(m.workload)
        for m in moe_layers(model)
        for p in m.experts.parameters()
    }
    skipped = set(lookups)
    matrices = [
        p
        for name, p in model.named_parameters()
        if p.dim() > 1 and not name.endswith("_bias") and p not in skipped
    ]
    return 2 * sum(p.numel() * expert_share.get(p, 1) for p in matrices)


def training_flops_per_token(model: Model, seq_len: int) -> float:
    """Return the FLOPs per token of the matmuls of a training step, without recompute.

    A forward matmul has two in the backward pass: for the gradient of its input and of its weight.
    A frozen weight has no gradient. (A frozen embedding that is also the head counts as trained.)
    """
    lookups = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = weight_flops_per_token(model, [*lookups, *trained])
    return 3 * model.flops_per_token(seq_len) - frozen


def saved_by_ffn(ffn: MoE | FeedForward, width: int) -> int:
    """Return the bytes per token that an MoE layer or dense FFN saves for the backward pass.

    `width` is b, the bytes of the compute dtype. U is the number of rows of an up projection: 2F if
    gated, else F. A dense FFN saves b(U + F), or b(U + 2F) if gated.

    An MoE layer saves bKU if its kernel saves x and the pre-activation, as core's kernels do, or
    what its kernel says (``interfaces.SavingExpertKernel``), and about 12E + 28K for routing. Under
    autocast, the router saves 4D more. An exchange saves bD for each row that it receives.
    """
    if isinstance(ffn, FeedForward):
        return _saved_by_dense(ffn, width)
    work = ffn.workload
    routing = 12 * work.num_experts + 28 * work.top_k
    router_input = _WIDE * work.dim if width < _WIDE else 0
    shared = 0 if ffn.shared is None else _saved_by_dense(ffn.shared, width)
    received = round(width * work.dim * ffn.experts.exchange.rows_per_token)
    experts = _slots(ffn) * saved_by_row(ffn, width)
    return experts + routing + router_input + shared + received


def kept_by_ffn(ffn: MoE | FeedForward, width: int) -> int:
    """Return the bytes per token that selective recompute keeps of an MoE layer or dense FFN.

    The letters are those of `saved_by_ffn`. A dense FFN keeps the results of its matmuls, b(U + D).
    An MoE layer keeps what its kernel saves, the experts' result bD, and 4E + 12K for routing. With
    an exchange it keeps 3bD for each row that it receives: as it arrives, as computed, and as it
    returns. A row that arrives in FP8 has fewer bytes.
    """
    if isinstance(ffn, FeedForward):
        return _kept_by_dense(ffn, width)
    work = ffn.workload
    rows_per_token = ffn.experts.exchange.rows_per_token
    of_row = 2 * width * work.dim + arriving_bytes(ffn, width)
    result = round(rows_per_token * of_row) if rows_per_token else width * work.dim
    experts = _slots(ffn) * saved_by_row(ffn, width) + result
    routing = _WIDE * work.num_experts + 12 * work.top_k
    return experts + routing + (0 if ffn.shared is None else _kept_by_dense(ffn.shared, width))


def saved_by_row(moe: MoE, width: int) -> int:
    """Return the bytes that the kernel of an MoE layer saves for each row, besides x."""
    kernel = moe.experts.kernel
    if hasattr(kernel, "saved_bytes_per_row"):
        return int(kernel.saved_bytes_per_row(width))
    return width * moe.experts.up.shape[1]


def arriving_bytes(moe: MoE, width: int) -> int:
    """Return the bytes of a row as the exchange of an MoE layer receives it."""
    exchange = moe.experts.exchange
    if hasattr(exchange, "row_bytes"):
        return int(exchange.row_bytes(width))
    return width * moe.workload.dim


def _slots(moe: MoE) -> int:
    """Return the slots per token whose activations are allocated (`BoundedExchange`)."""
    exchange = moe.experts.exchange
    bound = min(getattr(exchange, "slots", 1.0), moe.workload.expert_parallel)
    return math.ceil(bound * moe.workload.top_k)


def exchange_buffer(layers: Iterable[MoE], tokens: int, width: int) -> int:
    """Return the bytes of the buffer that exchanges share (`BufferedExchange`), 0 without one.

    Each rank has so many tokens, and `width` are the bytes of the compute dtype.
    """
    exchanges: list[Any] = [moe.experts.exchange for moe in layers]
    sizes = [e.buffer_bytes(tokens, width) for e in exchanges if hasattr(e, "buffer_bytes")]
    return max(sizes, default=0)


def weight_copies(moe: MoE) -> int:
    """Return the bytes of what the kernel of an MoE layer keeps of the weights of this rank."""
    if not keeps_weight_copies(moe):
        return 0
    up, down = local_part(moe.experts.up), local_part(moe.experts.down)
    kernel = cast(CachingExpertKernel, moe.experts.kernel)
    return kernel.weight_copy_bytes(up.numel() + down.numel())


def keeps_weight_copies(moe: MoE) -> bool:
    """Return whether the kernel of an MoE layer may keep copies of weights.

    It keeps nothing of weights that autocast casts, since it sees other tensors in each pass.
    """
    casts = moe.experts.up.dtype != moe.workload.dtype
    return not casts and getattr(moe.experts.kernel, "weights_have_versions", False)


def _kept_by_dense(ffn: FeedForward, width: int) -> int:
    return width * (ffn.up.shape[0] + ffn.down.shape[0])


def _saved_by_dense(ffn: FeedForward, width: int) -> int:
    activations = 2 if is_gated(ffn.activation) else 1
    return width * (ffn.up.shape[0] + activations * ffn.down.shape[1])
