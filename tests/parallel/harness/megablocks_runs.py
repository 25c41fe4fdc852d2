"""What ranks run for the test of MegaBlocks' API with expert parallelism."""

import torch
import torch.distributed as dist

from tokenyard_models.megablocks import Arguments, MoE, dMoE
from tokenyard_models.megablocks.layers.moe import clear_load_balancing_loss

Result = dict[str, torch.Tensor]
SIZES = {"hidden_size": 8, "ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2}
GATED = {"mlp_type": "glu", "activation_fn": torch.nn.functional.silu}
TOP_K = SIZES["moe_top_k"]


def layer_of(kind: type[MoE], parallel: bool, capacity: float = 1) -> MoE:
    """A layer; all ranks draw the same weights."""
    torch.manual_seed(5)
    options = SIZES | (GATED if kind is dMoE else {})
    args = Arguments(
        **options,
        bias=False,
        fp16=False,
        device="cpu",
        moe_capacity_factor=capacity,
        moe_expert_model_parallelism=parallel,
    )
    return kind(args)


def tokens_of(rank: int, count: int) -> torch.Tensor:
    """The tokens of a rank. They are near each other, so that some experts are full."""
    generator = torch.Generator().manual_seed(rank)
    return 1 + torch.randn(count, 1, 8, generator=generator)


def step(layer: MoE, tokens: list[torch.Tensor]) -> Result:
    """Forward and backward of the tokens of some ranks; return results and gradients."""
    x = torch.cat(tokens).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    clear_load_balancing_loss()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad} | gradients


def parallel_step(kind: type[MoE], counts: list[int], capacity: float) -> Result:
    """One rank's part of a step."""
    rank = dist.get_rank()
    return step(layer_of(kind, True, capacity), [tokens_of(rank, counts[rank])])


def parallel_capacity(ids: list[torch.Tensor], capacity: float) -> torch.Tensor:
    """A rank's ids, and E for each slot that is past the capacity."""
    return layer_of(MoE, True, capacity).experts.within_capacity(ids[dist.get_rank()])
