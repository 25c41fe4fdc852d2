from tokenyard.testing import ExpertsConformance


class TestAcme(ExpertsConformance):
    backend = "acme"
