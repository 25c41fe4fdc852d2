"""The `triton` experts: gather, two products with the activation between, and the weighted sum, without host waits."""

from __future__ import annotations

from typing import ClassVar, get_args

from torch import Tensor

from tokenyard.errors import ConfigError
from tokenyard.interfaces import ExpertWeights, Permutation, Plan
from tokenyard.workload import Workload
from tokenyard_kernels_triton.ops._experts import Products, Save, experts


class TritonExperts:
    """Computes experts by Triton kernels; once differentiable.

    `save` says what stands between forward and backward besides x: the pre-activation ("pre_activation", 4KF bytes a
    token in bfloat16 when gated), the same in 8-bit blocks ("fp8", 0.516 of it, with a relative error of some 2.5 % in
    the pre-activation that gradients see), or nothing ("recompute", which computes it again). Raises ConfigError for
    another word.
    """

    products: ClassVar[Products] = "portable"

    def __init__(self, workload: Workload, permutation: Permutation, save: Save = "pre_activation"):
        if save not in get_args(Save):
            known = ", ".join(get_args(Save))
            raise ConfigError(f"backends.experts.save is {save!r}; known are: {known}")
        self.activation, self.save = workload.activation, save

    def __call__(self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        return experts(x, plan, topk_weights, weights, self.activation, save=self.save, kernels=self.products)


class GluonExperts(TritonExperts):
    """The same with its products written in Gluon, for Hopper: warps that load, and warpgroups that multiply."""

    products = "hopper"
