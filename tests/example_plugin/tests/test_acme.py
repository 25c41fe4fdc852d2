from tokenyard import RoutingRule
from tokenyard.testing import ExpertsConformance, ModelConformance, RouterContract


class TestAcme(ExpertsConformance):
    backend = "acme"


class TestAcmeModel(ModelConformance):
    backend = "acme"
    config = {"vocab_size": 61, "max_seq_len": 32, "dim": 32, "ffn_dim": 24}


class TestExpertChoice(RouterContract):
    backend = "acme_choice"
    rule = RoutingRule("acme_choice", options={"factor": 1.5})
