"""Expert kernels that are deliberately wrong, and a correct base class of some of them."""

from itertools import pairwise

import torch

from tokenyard import GroupedExperts
from tokenyard.experts import TorchExperts


class Scale(torch.autograd.Function):
    """The identity, with a gradient that is off by a factor."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.01 * dy


class WrongGateGradient(TorchExperts):
    def __call__(self, x, plan, topk_weights, weights):
        return super().__call__(
            x, plan, None if topk_weights is None else Scale.apply(topk_weights), weights
        )


class MutatedInput(TorchExperts):
    def __call__(self, x, plan, topk_weights, weights):
        y = super().__call__(x, plan, topk_weights, weights)
        x.data.mul_(1.5)  # invisible to autograd's version counter
        return y


class NaNForEmptyExperts(TorchExperts):
    """Leaves the weight gradients of empty experts undefined, as a grouped GEMM may."""

    def __call__(self, x, plan, topk_weights, weights):
        up = weights.up.clone()
        if up.requires_grad:
            empty = (plan.offsets.diff() == 0).view(-1, 1, 1)
            up.register_hook(lambda grad: torch.where(empty, float("nan"), grad))
        return super().__call__(x, plan, topk_weights, weights._replace(up=up))


class Noisy(TorchExperts):
    """Differs from run to run."""

    def __call__(self, x, plan, topk_weights, weights):
        y = super().__call__(x, plan, topk_weights, weights)
        return y * (1 + torch.rand((), dtype=y.dtype) * 1e-3)


class Decay(torch.autograd.Function):
    """The identity, with a gradient that halves with each backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = torch.ones(())
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.factor *= 0.5
        return dy * ctx.factor


class OverwritesSavedTensors(TorchExperts):
    def __call__(self, x, plan, topk_weights, weights):
        return super().__call__(Decay.apply(x), plan, topk_weights, weights)


class RightRows(GroupedExperts):
    """An unfused reglu kernel."""

    def mlp(self, rows, offsets, weights):
        out = torch.zeros_like(rows)
        for e, (start, end) in enumerate(pairwise(offsets.tolist())):
            gate, up = (rows[start:end] @ weights.up[e].mT).chunk(2, -1)
            out[start:end] = (gate.relu() * up) @ weights.down[e].mT
        return out


class UnwrittenRows(RightRows):
    """Leaves the last row uninitialised."""

    def mlp(self, rows, offsets, weights):
        out = torch.empty_like(rows)
        out[:-1] = super().mlp(rows, offsets, weights)[:-1]
        return out


class ReadsDroppedTokens(TorchExperts):
    """Multiplies dropped tokens by zero, which gives NaN for NaN."""

    def __call__(self, x, plan, topk_weights, weights):
        return super().__call__(x, plan, topk_weights, weights) + 0 * x.sum()


class ReadsDroppedWeights(TorchExperts):
    def __call__(self, x, plan, topk_weights, weights):
        return super().__call__(x, plan, topk_weights, weights) + 0 * topk_weights.sum().to(x.dtype)


class BreaksTheGraph(TorchExperts):
    def __call__(self, x, plan, topk_weights, weights):
        torch._dynamo.graph_break()
        return super().__call__(x, plan, topk_weights, weights)


class DetachedGates(TorchExperts):
    def __call__(self, x, plan, topk_weights, weights):
        return super().__call__(x, plan, topk_weights.detach(), weights)


class Detached(TorchExperts):
    def __call__(self, x, plan, topk_weights, weights):
        return super().__call__(x, plan, topk_weights, weights).detach()


class WithoutBiases(BreaksTheGraph):
    """A kernel that does not support biases."""

    @staticmethod
    def no_biases(workload):
        return "'plain' has no biases" if workload.bias else None
