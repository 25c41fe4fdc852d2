"""Standard tests of language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenyard.backend import Kind
from tokenyard.moe import moe_layers
from tokenyard.numerics import relative_error
from tokenyard.testing._base import Conformance


class ModelConformance(Conformance):
    """What every model must do. `config` is a small one; it must hold `vocab_size` and `max_seq_len`."""

    kind: ClassVar[Kind] = "model"
    config: ClassVar[Mapping[str, Any]]

    def test_logits_and_balances(self) -> None:
        """Logits for every position, and one Balance for each MoE layer that counts every slot."""
        model, ids = self._model(), self._ids(2, 9)
        output = model(ids)
        layers = moe_layers(model)
        assert output.logits.shape == (2, 9, self.config["vocab_size"])
        assert len(output.balances) == len(layers)
        for balance, layer in zip(output.balances, layers):
            assert balance.counts.sum().item() == 18 * layer.workload.top_k

    def test_causal(self) -> None:
        """A later token never changes an earlier position's logits."""
        model, ids = self._model(), self._ids(2, 9)
        changed = ids.clone()
        changed[:, 6:] = (changed[:, 6:] + 1) % self.config["vocab_size"]
        first, second = model(ids).logits, model(changed).logits
        assert relative_error(second[:, :6], first[:, :6]) < 1e-12
        assert relative_error(second[:, 6:], first[:, 6:]) > 1e-6

    def test_cache_continues(self) -> None:
        """A prompt at once and then single tokens through the cache give the logits of one whole pass."""
        model, ids = self._model(), self._ids(2, 9)
        cache = model.new_cache(2, 9)
        with torch.no_grad():
            parts = [model(ids[:, a:b], cache).logits for a, b in ((0, 5), (5, 6), (6, 7), (7, 9))]
            assert relative_error(torch.cat(parts, 1), model(ids).logits) < 1e-12

    def test_every_parameter_gets_a_gradient(self) -> None:
        """The loss and the balance reach every parameter."""
        model, ids = self._model(), self._ids(4, 16)
        output = model(ids)
        loss = output.logits.square().mean() + sum(
            (b.prob_sum.sum() + b.z_sum for b in output.balances), torch.zeros(())
        )
        loss.backward()
        missing = [
            name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
        ]
        assert not missing

    def test_initialised_alike_from_meta(self) -> None:
        """Built on the meta device, allocated and initialised, it equals another of the same seed and no other."""
        states = [self._model(seed).state_dict() for seed in (3, 3, 4)]
        assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
        assert any(not torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values()))

    def _model(self, seed: int = 0) -> Any:
        with torch.device("meta"):
            model = self.construct(
                self.config,
                device=self.run_device(),
                compute_dtype=torch.float64,
                dtype=torch.float64,
            )
        model = model.to_empty(device=self.run_device())
        model.init_weights(seed)
        return model.eval()

    def _ids(self, batch: int, length: int) -> Tensor:
        return torch.randint(
            0, self.config["vocab_size"], (batch, length), device=self.run_device()
        )
