"""The Experts module, the base of unfused expert kernels, and core's two kernels."""

from tokenyard.experts._grouped import GroupedExperts
from tokenyard.experts._loop import LoopExperts
from tokenyard.experts._module import Experts
from tokenyard.experts._torch import TorchExperts

__all__ = ["Experts", "GroupedExperts", "LoopExperts", "TorchExperts"]
