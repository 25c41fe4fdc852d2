"""Standard tests of language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenyard.backend import Kind
from tokenyard.documents import pack_documents
from tokenyard.interfaces import IGNORED, PADDING, Balance, Targets, TokenLoss
from tokenyard.model import Model, missing_part, why_no_documents
from tokenyard.moe import moe_layers
from tokenyard.testing._base import Conformance
from tokenyard.tolerance import relative_error


class ModelConformance(Conformance):
    """Standard tests of every model.

    `config` is the `model:` section of a small model with `max_seq_len` of at least 16.
    """

    kind: ClassVar[Kind] = "model"
    config: ClassVar[Mapping[str, Any]] = {}

    def test_is_complete(self) -> None:
        """The class derives from ``tokenyard.Model`` and has every method and attribute of it."""
        missing = missing_part(self.offered().load()) or missing_part(self._model())
        if missing is not None:
            pytest.fail(f"{self.backend}: {missing}")

    def test_logits_and_balances(self) -> None:
        """Logits for every position, and one Balance for each MoE layer that counts every slot.

        If the counts differ, the model returns another layer's Balance, or a Routing's ids include
        dropped slots that ``Router.balance`` left out.
        """
        model = self._model()
        ids = self._ids(model, 2, 9)
        output = model(ids)
        layers = moe_layers(model)
        assert output.logits.shape == (2, 9, model.vocab_size)
        assert len(output.balances) == len(layers)
        for balance, layer in zip(output.balances, layers):
            assert balance.counts.sum().item() == 18 * layer.workload.top_k

    def test_loss_of_targets(self) -> None:
        """With targets, the model returns their weighted cross-entropy and its gradients.

        If this fails, `forward` ignores the weights or IGNORED ids, or computes other logits.
        """
        model = self._model()
        inputs = self._ids(model, 2, 9)
        ids = self._ids(model, 2, 9)
        ids[0, 3:5] = IGNORED
        weights = torch.rand(2, 9, device=ids.device, dtype=torch.float64)
        losses = F.cross_entropy(
            model(inputs).logits.flatten(0, 1),
            ids.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        want = (losses * weights.flatten()).sum()
        got = model(inputs, targets=Targets(ids, weights))
        assert len(got.balances) == len(moe_layers(model))
        assert relative_error(got.nats, want) < 1e-12
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = [
            torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (got.nats, want)
        ]
        for gradient, reference in zip(*gradients):
            if reference is not None and reference.any():
                assert gradient is not None
                assert relative_error(gradient, reference) < 1e-11

    def test_causal(self) -> None:
        """A later token never changes an earlier position's logits.

        If this fails, attention lacks its causal mask, or the routing algorithm lets tokens compete
        for experts.
        """
        model = self._model()
        ids = self._ids(model, 2, 9)
        changed = ids.clone()
        changed[:, 6:] = (changed[:, 6:] + 1) % model.vocab_size
        first = model(ids).logits
        second = model(changed).logits
        assert relative_error(second[:, :6], first[:, :6]) < 1e-12
        assert relative_error(second[:, 6:], first[:, 6:]) > 1e-6

    def test_packed_documents_are_as_if_alone(self) -> None:
        """Packed documents give the logits, loss, gradients and Balances of each one alone.

        If this fails, attention or positions cross a document, or padding takes part in routing: a
        Balance counts it, or it takes the capacity of an expert. A model whose `forward` has no
        argument `documents` is skipped.
        """
        model = self._model()
        if (reason := why_no_documents(model)) is not None:
            pytest.skip(f"{self.backend}: {reason}")
        tokens = self._ids(model, 2, 9)
        targets = self._ids(model, 2, 9)
        ids = torch.tensor([[0] * 5 + [1] * 3 + [PADDING], [0] * 4 + [1] * 5])
        ids = ids.to(tokens.device)
        targets[ids == PADDING] = IGNORED
        parts = [(row, ids[row] == number) for row in range(2) for number in range(2)]
        alone = [(tokens[r, here][None], Targets(targets[r, here][None])) for r, here in parts]
        documents = pack_documents(ids, count=7, longest=6)
        logits = model(tokens, documents=documents).logits
        for (row, here), (inputs, _) in zip(parts, alone):
            assert relative_error(logits[row, here], model(inputs).logits[0]) < 1e-12
        got = model(tokens, targets=Targets(targets), documents=documents)
        each: list[TokenLoss] = [model(inputs, targets=wanted) for inputs, wanted in alone]
        sums = [_summed(layer) for layer in zip(*(loss.balances for loss in each))]
        for balance, expected in zip(got.balances, sums):
            assert torch.equal(balance.counts, expected.counts)
            assert torch.equal(balance.dropped, expected.dropped)
        want = TokenLoss(torch.stack([loss.nats for loss in each]).sum(), tuple(sums))
        parameters = [p for p in model.parameters() if p.requires_grad]
        for loss, reference in zip(_scalars(got), _scalars(want), strict=True):
            assert relative_error(loss, reference) < 1e-12
            gradients = [
                torch.autograd.grad(
                    scalar, parameters, allow_unused=True, retain_graph=True, materialize_grads=True
                )
                for scalar in (loss, reference)
            ]
            for gradient, alike in zip(*gradients):
                assert relative_error(gradient, alike) < 1e-12

    def test_cache_continues(self) -> None:
        """A prompt and then single tokens through the cache give the logits of one whole pass.

        If this fails, positions restart at 0 with each call, or the cache keeps too few tokens.
        """
        model = self._model()
        ids = self._ids(model, 2, 9)
        cache = model.new_cache(2, 9)
        with torch.no_grad():
            parts = [model(ids[:, a:b], cache).logits for a, b in ((0, 5), (5, 6), (6, 7), (7, 9))]
            assert relative_error(torch.cat(parts, 1), model(ids).logits) < 1e-12

    def test_every_parameter_gets_a_gradient(self) -> None:
        """The loss and the balance reach every parameter."""
        model = self._model()
        output = model(self._ids(model, 4, 16))
        loss = output.logits.square().mean()
        for balance in output.balances:
            loss = loss + balance.prob_sum.sum() + balance.z_sum
        loss.backward()
        missing = [
            name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
        ]
        assert not missing

    def test_auxiliary_loss(self) -> None:
        """``auxiliary`` takes the model's own balances and gives a finite loss with a gradient."""
        model = self._model()
        layers = moe_layers(model)
        if not layers:
            pytest.skip(f"{self.backend}: the model has no MoE layer")
        balances = model(self._ids(model, 2, 9)).balances
        loss = model.auxiliary(balances, 18, layers[0].workload.top_k)
        assert torch.as_tensor(loss).isfinite().all()

    def test_initialised_alike_from_meta(self) -> None:
        """Built on the meta device, allocated and initialised, it depends on the seed alone.

        If this fails, `init_weights` leaves a parameter or buffer as `to_empty` made it.
        """
        states = [self._model(seed).state_dict() for seed in (3, 3, 4)]
        assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
        assert any(not torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values()))

    def test_flops_are_counted(self) -> None:
        """`flops_per_token` equals what torch counts for one token, and grows with attention.

        The growth with the length may be anything from half of what torch counts, which ignores
        the causal mask, to all of it. If the count is too small, a head, a router or attention is
        missing; if it is too large, an embedding was counted that is only indexed.
        """
        model = self._model()
        length = 16
        claimed = [model.flops_per_token(n) for n in (1, length)]
        counted = [_forward_flops(model, self._ids(model, 1, n)) / n for n in (1, length)]
        assert claimed[0] == pytest.approx(counted[0], rel=1e-6)
        growth = counted[1] - counted[0]
        assert 0.5 * growth <= claimed[1] - claimed[0] + 1e-6
        assert claimed[1] - claimed[0] <= growth + 1e-6

    def test_saved_bytes(self) -> None:
        """`saved_bytes_per_token` names each block, and recomputing blocks never keeps more."""
        model = self._model()
        saved = model.saved_bytes_per_token(16, 4)
        assert len(saved.blocks) == len(model.blocks)
        assert all(0 < saved.block_input <= block for block in saved.blocks)
        assert saved.rest >= 0
        assert sum(model.saved_bytes_per_token(16, 2).blocks) < sum(saved.blocks)

    def _model(self, seed: int = 0) -> Model:
        with torch.device("meta"):
            model: Model = self.construct(
                self.config,
                device=self.run_device(),
                backends={},
                compute_dtype=torch.float64,
                dtype=torch.float64,
                expert_parallel=None,
            )
        model = model.to_empty(device=self.run_device())
        model.init_weights(seed)
        return model.eval()

    def _ids(self, model: Model, batch: int, length: int) -> Tensor:
        return torch.randint(0, model.vocab_size, (batch, length), device=self.run_device())


def _summed(balances: Sequence[Balance]) -> Balance:
    return Balance(*(torch.stack(parts).sum(0) for parts in zip(*balances)))


def _scalars(loss: TokenLoss) -> list[Tensor]:
    """Return what training differentiates: the loss, and of each layer its probabilities and z."""
    sums = [(b.prob_sum.square().sum(), b.z_sum) for b in loss.balances]
    return [loss.nats, *(scalar for pair in sums for scalar in pair)]


def _forward_flops(model: Model, ids: Tensor) -> float:
    """Count the floating-point operations of a forward pass over ids [B, S].

    Experts are counted by their weights, K of every E: torch cannot see into a custom operator.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    counts = counter.get_flop_counts()
    total = float(counter.get_total_flops())
    names = {module: name for name, module in model.named_modules()}
    for moe in moe_layers(model):
        inside = counts.get(f"{type(model).__name__}.{names[moe.experts]}", {})
        total -= sum(inside.values())
        share = moe.workload.top_k / moe.workload.num_experts
        matrices = (moe.experts.up, moe.experts.down)
        total += 2 * ids.numel() * share * sum(matrix.numel() for matrix in matrices)
    return total
