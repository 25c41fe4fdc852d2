"""The conformance kit: standard tests that a backend must pass, in four lines of the plugin author's.

    from tokenyard.testing import ExpertsConformance

    class TestAcme(ExpertsConformance):
        backend = "acme"

Results are compared with a float64 oracle by relative norm; the tolerance is twice the error that plain torch code
makes in the same dtype, plus that dtype's eps. A backend unusable for a case skips it with its own sentence.
"""

from tokenyard.testing._exchange import ExchangeConformance
from tokenyard.testing._experts import ExpertsConformance
from tokenyard.testing._model import ModelConformance
from tokenyard.testing._permutation import PermutationConformance
from tokenyard.testing._ranks import Ranks, RanksError, ranks
from tokenyard.testing._router import TopKRouterConformance
from tokenyard.testing._router_contract import RouterContract
from tokenyard.testing._strategy import StrategyConformance

__all__ = [
    "ExchangeConformance",
    "ExpertsConformance",
    "ModelConformance",
    "PermutationConformance",
    "Ranks",
    "RanksError",
    "RouterContract",
    "StrategyConformance",
    "TopKRouterConformance",
    "ranks",
]
