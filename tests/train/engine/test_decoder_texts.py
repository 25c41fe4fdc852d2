"""Each text of a decoder is that of a new one, whatever came before it."""

import random
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tokenyard import moe_layers
from tokenyard_models import Dbrx, Mpt
from tokenyard_train.engine import decoding
from tokenyard_train.engine.decoder import Decoder
from tokenyard_train.engine.sampling import Sampling, sample

SIZES = {"size": "tiny", "d_model": 32, "vocab_size": 61}
BIAS = {"ffn_config": {"moe_bias_update_rate": 0.1}}
WIDE = {"dtype": torch.float64, "compute_dtype": torch.float64}


def changed_in_place(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def replaced(net):
    net.norm.weight = nn.Parameter(torch.rand_like(net.norm.weight))


def loaded(net):
    net.load_state_dict({k: v + 0.1 * torch.rand_like(v) for k, v in net.state_dict().items()})


def converted(net):
    if not moe_layers(net):  # experts are for one dtype
        net.to(torch.float32 if net.norm.weight.dtype == torch.float64 else torch.float64)


def updated(net):
    for moe in moe_layers(net):
        moe.router.update(torch.rand(moe.workload.num_experts))


CHANGES = [changed_in_place, replaced, loaded, converted, updated]


def ids(draw, most: int) -> list[int]:
    return [draw.randrange(60) for _ in range(draw.randint(1, most))]


@pytest.mark.parametrize("case", range(4))
def test_random_texts(graph, monkeypatch, case):
    """Of two models that change, in other numbers and lengths, some of them a conversation."""
    monkeypatch.setattr(decoding, "_can_capture", lambda model, cache, steps: steps >= 4)
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    nets = [Mpt(SIZES, **WIDE), Dbrx(SIZES | BIAS, **WIDE)]
    for net in nets:
        net.init_weights(seed)
    decoder = Decoder(spare=draw.choice([0, 5, 40]), shares_tokens=draw.random() < 0.5)
    net = draw.choice(nets)
    texts: list[int] = []
    for _ in range(8):
        if draw.random() < 0.4:
            draw.choice(CHANGES)(net)
        if draw.random() < 0.1:
            net = draw.choice(nets)
        prompts = [ids(draw, 12) for _ in range(draw.choice([1, 1, 2, 3]))]
        if draw.random() < 0.5:
            prompts = [[*texts, *ids(draw, 3)][: draw.randint(1, 40)]]
        sampling = Sampling(draw.randint(1, 20), draw.choice([0, 0.9]), seed, set(ids(draw, 3)))
        with torch.inference_mode() if draw.random() < 0.1 else nullcontext():
            rows = sample(net, prompts, sampling, decoder)
        assert rows == sample(net, prompts, sampling), f"of the seed {seed}"
        texts = [*prompts[0], *rows[0]]
