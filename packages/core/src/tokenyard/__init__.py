"""Dropless Mixture-of-Experts layers whose parts are plugins."""

from tokenyard.__about__ import __version__
from tokenyard.activations import (
    ACTIVATIONS,
    SwigluOptions,
    activate,
    is_gated,
    swiglu,
    swiglu_options,
    up_rows,
)
from tokenyard.adapter import LoraAdapter, LoraSettings
from tokenyard.backend import KINDS, Backend, Kind
from tokenyard.count import Size, count_parameters
from tokenyard.cross_entropy import linear_cross_entropy, predict
from tokenyard.devices import resolve_device
from tokenyard.documents import pack_documents
from tokenyard.errors import BackendError, ConfigError, TokenyardError
from tokenyard.experts import Experts, GroupedExperts
from tokenyard.feed_forward import FeedForward
from tokenyard.hookspecs import hookimpl
from tokenyard.interfaces import (
    IGNORED,
    PADDING,
    Balance,
    Compute,
    Documents,
    Exchange,
    ExpertKernel,
    ExpertWeights,
    LoraExpertKernel,
    LowRank,
    Output,
    Permutation,
    Plan,
    Router,
    Routing,
    ShardingReport,
    Strategy,
    Targets,
    TokenLoss,
)
from tokenyard.lora import add_lora, merge_lora
from tokenyard.losses import AuxiliaryLoss, load_balancing_loss, z_loss
from tokenyard.model import Model, SavedBytes, why_no_documents
from tokenyard.moe import MoE, moe_layers
from tokenyard.paths import cache_folder
from tokenyard.processes import started_processes
from tokenyard.registry import BackendChoice, Registry, default_registry
from tokenyard.workload import RoutingRule, Workload

__all__ = [
    "ACTIVATIONS",
    "IGNORED",
    "KINDS",
    "PADDING",
    "AuxiliaryLoss",
    "Backend",
    "BackendChoice",
    "BackendError",
    "Balance",
    "Compute",
    "ConfigError",
    "Documents",
    "Exchange",
    "ExpertKernel",
    "ExpertWeights",
    "Experts",
    "FeedForward",
    "GroupedExperts",
    "Kind",
    "LoraAdapter",
    "LoraExpertKernel",
    "LoraSettings",
    "LowRank",
    "MoE",
    "Model",
    "Output",
    "Permutation",
    "Plan",
    "Registry",
    "Router",
    "Routing",
    "RoutingRule",
    "SavedBytes",
    "ShardingReport",
    "Size",
    "Strategy",
    "SwigluOptions",
    "Targets",
    "TokenLoss",
    "TokenyardError",
    "Workload",
    "__version__",
    "activate",
    "add_lora",
    "cache_folder",
    "count_parameters",
    "default_registry",
    "hookimpl",
    "is_gated",
    "linear_cross_entropy",
    "load_balancing_loss",
    "merge_lora",
    "moe_layers",
    "pack_documents",
    "predict",
    "resolve_device",
    "started_processes",
    "swiglu",
    "swiglu_options",
    "up_rows",
    "why_no_documents",
    "z_loss",
]
