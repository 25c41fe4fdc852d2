"""What ranks run for the test of MegaBlocks' API with expert parallelism."""

import torch
import torch.distributed as dist

from tokenyard_models.megablocks import Arguments, dMoE
from tokenyard_models.megablocks.layers.moe import clear_load_balancing_loss

Result = dict[str, torch.Tensor]


def layer_of(parallel: bool) -> dMoE:
    """A gated layer; all ranks draw the same weights."""
    torch.manual_seed(5)
    args = Arguments(
        hidden_size=8,
        ffn_hidden_size=12,
        moe_num_experts=4,
        moe_top_k=2,
        mlp_type="glu",
        activation_fn=torch.nn.functional.silu,
        bias=False,
        fp16=False,
        device="cpu",
        moe_expert_model_parallelism=parallel,
    )
    return dMoE(args)


def tokens_of(rank: int) -> torch.Tensor:
    """The tokens of a rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(7 + rank, 1, 8, generator=generator)


def step(parallel: bool, ranks: list[int]) -> Result:
    """Forward and backward of the tokens of some ranks; return results and gradients."""
    layer = layer_of(parallel)
    inputs = [tokens_of(rank).requires_grad_() for rank in ranks]
    outputs = [layer(x) for x in inputs]
    sum(y.square().sum() for y in outputs).backward()
    clear_load_balancing_loss()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    results = {f"y{rank}": y.detach() for rank, y in zip(ranks, outputs)}
    return results | {f"dx{rank}": x.grad for rank, x in zip(ranks, inputs)} | gradients


def parallel_step() -> Result:
    """One rank's part of a step."""
    return step(True, [dist.get_rank()])
