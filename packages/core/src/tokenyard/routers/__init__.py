"""The routers of core: top-k, and algorithms that balance the tokens of a batch."""

from tokenyard.routers._expert_choice import ExpertChoiceRouter
from tokenyard.routers._sinkhorn import SinkhornRouter
from tokenyard.routers._token_rounding import TokenRoundingRouter
from tokenyard.routers._topk import TopKRouter

__all__ = ["ExpertChoiceRouter", "SinkhornRouter", "TokenRoundingRouter", "TopKRouter"]
