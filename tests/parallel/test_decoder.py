"""A conversation with a model that is sharded over two ranks."""

import pytest
import torch

from tokenyard.sharded import allocate
from tokenyard.testing import ranks
from tokenyard_models import Dbrx
from tokenyard_parallel.strategies import FsdpStrategy
from tokenyard_train.engine.decoder import Decoder
from tokenyard_train.engine.sampling import Sampling, sample

SIZES = {"size": "tiny", "d_model": 32, "vocab_size": 61}


def converse(expert_parallel):
    """Return the tokens that the first pass of each answer computes. Weights change at the end."""
    wide = {"dtype": torch.float64, "compute_dtype": torch.float64}
    with torch.device("meta"):
        model = Dbrx(SIZES, expert_parallel=expert_parallel, **wide)
    FsdpStrategy("cpu").layout(model)
    allocate(model, "cpu")
    model.init_weights(3)
    decoder = Decoder(spare=20, shares_tokens=True)
    text = [7, 8, 9]
    computed = []
    passes = []
    model.register_forward_hook(lambda _, args, output: passes.append(args[0].shape[1]))
    for turn in range(3):
        passes.clear()
        (answer,) = sample(model, [text], Sampling(5, 0, 0), decoder)
        computed.append(passes[0])
        assert [answer] == sample(model, [text], Sampling(5, 0, 0))
        text = [*text, *answer, 10, 11]
        if turn == 1:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.3)
    return computed, text


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_ranks_share_tokens_alike(expert_parallel):
    one, other = ranks(2).run(converse, expert_parallel)
    assert one == other
    assert one[0] == [3, 3, 17]  # after the first text, its last token and 2 new ones; then all
