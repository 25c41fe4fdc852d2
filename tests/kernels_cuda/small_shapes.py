"""Launch every kernel on small, odd shapes, for compute-sanitizer. A script; needs a GPU."""

import torch

from tokenyard import RoutingRule, Workload
from tokenyard_kernels_cuda.ops._logits import NARROW, logits_op, split_kernel
from tokenyard_kernels_cuda.permutation import CudaPermutation
from tokenyard_kernels_cuda.router import CudaRouter


def move(dtype, dim, tokens=37, experts=7, top_k=3, rows=None):
    """Plan with dropped slots, permute and unpermute, forward and backward."""
    ids = torch.randint(0, experts + 1, (tokens, top_k), device="cuda", dtype=torch.int32)
    permutation = CudaPermutation(Workload(dim, 8, experts, top_k, dtype=dtype, device="cuda"))
    plan = permutation.plan(ids, experts, rows)
    x = torch.randn(tokens, dim, device="cuda", dtype=dtype, requires_grad=True)
    weights = torch.rand(tokens, top_k, device="cuda", requires_grad=True)
    y = permutation.unpermute(permutation.permute(x, plan), plan, weights)
    torch.autograd.grad(y, (x, weights), torch.randn_like(y))


def choose(experts, top_k, **rule):
    """Select and weigh experts, forward and backward."""
    router = CudaRouter(
        Workload(16, 8, experts, top_k, router=RoutingRule(**rule), device="cuda")
    ).cuda()
    logits = torch.randn(21, experts, device="cuda", requires_grad=True)
    ids, weights = router.choose(logits, None)
    again = router.choose(logits, ids)[1]
    torch.autograd.grad(
        (weights, again), logits, (torch.randn_like(weights), torch.randn_like(again))
    )


def split(dtype):
    """Split a gradient, as the router's backward pass does before its GEMMs."""
    wide = torch.randn(21, 9, device="cuda")
    both = torch.empty(21, 18, device="cuda", dtype=dtype)
    split_kernel(dtype)((1, 1), 256, wide, both, 21, 9)


def few_logits(dtype):
    """Compute the logits of few tokens and of some more, and their gradients, in partial blocks."""
    weight = torch.randn(19, 264, device="cuda", dtype=dtype, requires_grad=True)
    for tokens in (11, 37):
        x = torch.randn(tokens, 264, device="cuda", dtype=dtype, requires_grad=True)
        logits_op(x, weight).sum().backward()


def main():
    """Launch all kernels."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (8, 15, 264):
            move(dtype, dim)
    for dtype in NARROW:
        split(dtype)
        few_logits(dtype)
    move(torch.bfloat16, 16, rows=60)
    move(torch.bfloat16, 16, tokens=3000, experts=130)
    move(torch.bfloat16, 8, tokens=5, experts=1500)
    choose(8, 2, normalize=1.0)
    choose(72, 9, score="sigmoid", normalize=2.0)
    choose(64, 6, select_first=True, bias_update_rate=0.1)
    choose(1000, 4, num_groups=8, groups_kept=3, group_score="top2")
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
