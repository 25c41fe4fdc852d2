"""The Experts module, core's expert kernels, and tools to write others."""

from tokenyard.experts._cpu import CpuExperts
from tokenyard.experts._emulated_fp8 import EmulatedFp8Experts
from tokenyard.experts._grouped import GroupedExperts
from tokenyard.experts._grouped_matmuls import rows_outer, rows_times
from tokenyard.experts._loop import LoopExperts
from tokenyard.experts._lora_call import LoraCall, LoraPair
from tokenyard.experts._lora_op import register_lora_op
from tokenyard.experts._module import Experts
from tokenyard.experts._op import ExpertGradients, ExpertNeeds, ExpertsCall, register_experts_op
from tokenyard.experts._register import Donated
from tokenyard.experts._torch import TorchExperts

__all__ = [
    "CpuExperts",
    "Donated",
    "EmulatedFp8Experts",
    "ExpertGradients",
    "ExpertNeeds",
    "Experts",
    "ExpertsCall",
    "GroupedExperts",
    "LoopExperts",
    "LoraCall",
    "LoraPair",
    "TorchExperts",
    "register_experts_op",
    "register_lora_op",
    "rows_outer",
    "rows_times",
]
