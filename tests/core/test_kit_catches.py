"""The kit fails for deliberately wrong backends, with a message that names the fault."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from tokenyard import AuxiliaryLoss, Backend, Model, Registry, SavedBytes, hookimpl, predict
from tokenyard.draw import draw_normal
from tokenyard.experts import TorchExperts
from tokenyard.registry import Plugin
from tokenyard.testing import ExpertsConformance, ModelConformance

from .wrong_kernels import (
    BreaksTheGraph,
    Detached,
    DetachedGates,
    MutatedInput,
    NaNForEmptyExperts,
    Noisy,
    OverwritesSavedTensors,
    ReadsDroppedTokens,
    ReadsDroppedWeights,
    RightRows,
    UnwrittenRows,
    WithoutBiases,
    WrongGateGradient,
)


def conformance(kernel: type) -> ExpertsConformance:
    class Kit(ExpertsConformance):
        backend = "torch"

        def construct(self, *args, workload=None):
            return kernel(*args)

    return Kit()


def record(name: str, value: object) -> None:
    """Replace pytest's record_property."""


def matches_oracle(kit):
    kit.test_matches_oracle(torch.float32, "reglu", False, record)


def routes_everywhere(kit):
    kit.test_routings("all to one expert", 3, record)


@pytest.mark.parametrize(
    ("kernel", "test", "complaint"),
    [
        (WrongGateGradient, matches_oracle, r"d topk_weights: relative error 1\.0..e-02, allowed"),
        (
            MutatedInput,
            ExpertsConformance.test_inputs_are_not_mutated,
            "the kernel changed x in place",
        ),
        (NaNForEmptyExperts, routes_everywhere, "d up: relative error inf"),
        (Noisy, ExpertsConformance.test_same_result_twice, "y differs from run to run"),
        (
            OverwritesSavedTensors,
            ExpertsConformance.test_passes_over_one_graph,
            "a later backward pass over the same graph gives other gradients",
        ),
        (UnwrittenRows, matches_oracle, "y: relative error inf"),
        (
            ReadsDroppedTokens,
            lambda kit: kit.test_static_rows_bound(record),
            "read a token, weight or gradient that was dropped",
        ),
        (
            ReadsDroppedWeights,
            lambda kit: kit.test_static_rows_bound(record),
            "read a token, weight or gradient that was dropped",
        ),
        (BreaksTheGraph, lambda kit: kit.test_compiles_whole(record), "graph_break"),
        (
            DetachedGates,
            matches_oracle,
            "no gradient reaches topk_weights; is it used, and not detached?",
        ),
        (Detached, matches_oracle, "y is cut off from everything that requires a gradient"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_kernel_fails(kernel, test, complaint):
    test(conformance(TorchExperts if kernel is not UnwrittenRows else RightRows))
    with pytest.raises(Exception, match=complaint):
        test(conformance(kernel))


class TestTheGuard:
    """A standard test may only be overridden by an expected failure with a reason."""

    def test_overriding_fails(self):
        class Sly(ExpertsConformance):
            def test_same_result_twice(self):
                pass

        with pytest.raises(
            AssertionError, match="test_same_result_twice is a standard test; mark it xfail"
        ):
            Sly().test_no_standard_test_is_overridden()

    def test_removing_fails(self):
        class Removed(ExpertsConformance):
            test_routings = None

        with pytest.raises(AssertionError, match="test_routings is a standard test"):
            Removed().test_no_standard_test_is_overridden()

    def test_an_expected_failure_with_a_reason_passes(self):
        class Honest(ExpertsConformance):
            @pytest.mark.xfail(reason="sums by atomics")
            def test_same_result_twice(self):
                super().test_same_result_twice()

        Honest().test_no_standard_test_is_overridden()


def test_an_unusable_backend_is_skipped_with_its_reason():
    class Offer:
        @staticmethod
        @hookimpl
        def tokenyard_experts():
            return [Backend("lunar", "os:sep", unusable=lambda workload: "'lunar' needs a moon")]

    class Kit(ExpertsConformance):
        backend = "lunar"

        def registry(self):
            return Registry([Plugin(Offer, "lunar", "1.0")])

    with pytest.raises(pytest.skip.Exception, match="lunar: 'lunar' needs a moon"):
        Kit().test_inputs_are_not_mutated()


class TestABackendWithoutBiases:
    """A backend without biases is tested in all other respects."""

    class Kit(ExpertsConformance):
        backend = "plain"

        def registry(self):
            class Offer:
                @staticmethod
                @hookimpl
                def tokenyard_experts():
                    return [Backend("plain", "os:sep", unusable=WithoutBiases.no_biases)]

            return Registry([Plugin(Offer, "plain", "1.0")])

        def construct(self, *args, workload=None):
            assert not workload.bias
            return WithoutBiases(*args)

    def test_a_fault_is_found(self):
        with pytest.raises(Exception, match="graph_break"):
            self.Kit().test_compiles_whole(record)

    def test_cases_with_biases_are_skipped(self):
        self.Kit().test_one_gradient_alone("up", record)
        with pytest.raises(pytest.skip.Exception, match="plain: 'plain' has no biases"):
            self.Kit().test_one_gradient_alone("up_bias", record)


def test_a_backend_that_is_not_installed_fails_with_the_error_of_the_registry():
    class Kit(ExpertsConformance):
        backend = "torhc"

    with pytest.raises(pytest.fail.Exception, match=r"'torhc' is unknown \(did you mean 'torch'"):
        Kit().test_inputs_are_not_mutated()


class Complete(Model):
    """The smallest model: an embedding that is also the head."""

    def __init__(self, config, **placement):
        super().__init__()
        self.blocks = nn.ModuleList()
        self.vocab_size = 7
        self.max_seq_len = 16
        self.auxiliary = AuxiliaryLoss()
        self.embed = nn.Embedding(7, 4, dtype=torch.float64)

    def forward(self, ids, cache=None, targets=None):
        return predict(self.embed(ids), self.embed.weight, (), targets)

    def new_cache(self, batch, length):
        return None

    def init_weights(self, seed):
        draw_normal(self.embed.weight, seed, "embed.weight", 1.0)

    def flops_per_token(self, seq_len):
        return 2 * 7 * 4

    def saved_bytes_per_token(self, seq_len, width):
        return SavedBytes((), 0, 4 * width)


class WithoutCache(Complete):
    new_cache = Model.new_cache


class WithoutLength(Complete):
    def __init__(self, config, **placement):
        super().__init__(config, **placement)
        del self.max_seq_len


class WithoutTargets(Complete):
    def forward(self, ids, cache=None):
        return super().forward(ids)


class IgnoresWeights(Complete):
    def forward(self, ids, cache=None, targets=None):
        return super().forward(ids, cache, targets and targets._replace(weights=None))


class NoModel(nn.Module):
    pass


class CountsTheLookup(Complete):
    def flops_per_token(self, seq_len):
        return 2 * super().flops_per_token(seq_len)


def model_conformance(model: type) -> ModelConformance:
    class Offer:
        load = staticmethod(lambda: model)

    class Kit(ModelConformance):
        backend = "acme"
        config: ClassVar[dict] = {}

        def offered(self):
            return Offer

        def construct(self, *args, workload=None, **kwargs):
            return model(*args, **kwargs)

    return Kit()


def test_a_complete_model_passes():
    kit = model_conformance(Complete)
    kit.test_is_complete()
    kit.test_flops_are_counted()
    kit.test_initialised_alike_from_meta()


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (WithoutCache, "acme: WithoutCache lacks new_cache; see tokenyard.Model"),
        (
            WithoutLength,
            "acme: the constructor of WithoutLength must set max_seq_len, of type int; it is None",
        ),
        (
            WithoutTargets,
            "acme: the forward method of WithoutTargets lacks the argument targets; end it with "
            r"tokenyard.predict\(x, head_weight, balances, targets\)",
        ),
        (NoModel, "acme: NoModel does not derive from tokenyard.Model"),
    ],
)
def test_a_part_that_a_model_lacks_is_named(model, complaint):
    with pytest.raises(pytest.fail.Exception, match=complaint):
        model_conformance(model).test_is_complete()


def test_a_loss_that_ignores_the_weights_is_caught():
    model_conformance(Complete).test_loss_of_targets()
    with pytest.raises(AssertionError):
        model_conformance(IgnoresWeights).test_loss_of_targets()


def test_flops_that_are_not_computed_are_caught():
    with pytest.raises(AssertionError):
        model_conformance(CountsTheLookup).test_flops_are_counted()
