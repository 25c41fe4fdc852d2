"""The conformance kit: standard tests for a backend, in four lines of a plugin's test.

    from tokenyard.testing import ExpertsConformance

    class TestAcme(ExpertsConformance):
        backend = "acme"

The tests compare results with a float64 oracle by relative norm. The tolerance is twice the error
of plain torch code in the same dtype, plus the eps of that dtype. If a backend is unusable for a
case, the case is skipped with the backend's reason.
"""

from tokenyard.testing._exchange import ExchangeConformance
from tokenyard.testing._experts import ExpertsConformance
from tokenyard.testing._fp8_experts import Fp8ExpertsConformance
from tokenyard.testing._model import ModelConformance
from tokenyard.testing._permutation import PermutationConformance
from tokenyard.testing._ranks import Ranks, RanksError, preload, ranks
from tokenyard.testing._router import TopKRouterConformance
from tokenyard.testing._router_contract import RouterContract
from tokenyard.testing._strategy import StrategyConformance

__all__ = [
    "ExchangeConformance",
    "ExpertsConformance",
    "Fp8ExpertsConformance",
    "ModelConformance",
    "PermutationConformance",
    "Ranks",
    "RanksError",
    "RouterContract",
    "StrategyConformance",
    "TopKRouterConformance",
    "preload",
    "ranks",
]
