"""The transformer under compilation, recomputation, autocast and caches."""

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional

from tokenyard import PADDING, ConfigError, moe_layers, pack_documents
from tokenyard.recompute import recomputed
from tokenyard.tolerance import relative_error
from tokenyard_models import Dbrx, Mpt


def tiny(bias_update_rate: float = 0.0, **kwargs) -> Dbrx:
    config = {
        "size": "tiny",
        "d_model": 32,
        "vocab_size": 50,
        "ffn_config": {"moe_bias_update_rate": bias_update_rate},
    }
    model = Dbrx(config, **kwargs)
    model.init_weights(0)
    return model


def ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_whole(packed):
    torch.compiler.reset()
    model = tiny(dtype=torch.float64, compute_dtype=torch.float64)
    batch = ids()
    numbers = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [PADDING] * 2])
    documents = pack_documents(numbers) if packed else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = model(batch, documents=documents)
    got = compiled(batch, documents=documents)
    assert relative_error(got.logits, want.logits) < 1e-12
    assert all(torch.equal(a.counts, b.counts) for a, b in zip(got.balances, want.balances))
    dy = torch.randn_like(got.logits)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(output.logits, parameters, dy) for output in (got, want)]
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(*gradients))


@pytest.mark.parametrize("selective", [False, True])
def test_recomputing_blocks_changes_nothing(selective):
    plain = tiny(dtype=torch.float64, compute_dtype=torch.float64)
    wrapped = copy.deepcopy(plain)
    for block in wrapped.blocks:
        block.forward = recomputed(block.forward, selective)
    batch = ids()
    results = []
    for model in (plain, wrapped):
        output = model(batch)
        (output.logits.square().mean() + output.balances[0].prob_sum.square().sum()).backward()
        results.append((output.balances, [p.grad for p in model.parameters()]))
    for a, b in zip(results[0][0], results[1][0]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_autocast_is_near_float64():
    """K = E, so that rounding cannot choose other experts."""
    config = {
        "size": "tiny",
        "d_model": 32,
        "vocab_size": 50,
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 4},
    }
    model = Dbrx(config, compute_dtype=torch.bfloat16)
    batch = ids()
    model.init_weights(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(batch)
    wide = Dbrx(config, compute_dtype=torch.float64, dtype=torch.float64)
    wide.load_state_dict(model.state_dict())
    exact = wide(batch)
    assert relative_error(low.logits, exact.logits) < 4 * torch.finfo(torch.bfloat16).eps
    low.logits.float().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_backends_are_passed_to_every_layer():
    model = tiny(backends={"experts": "loop"})
    assert {moe.chosen["experts"].backend.name for moe in moe_layers(model)} == {"loop"}
    batch = ids()
    assert relative_error(model(batch).logits, tiny()(batch).logits) < 1e-5


def test_too_many_tokens():
    with pytest.raises(
        ConfigError, match="257 tokens were given to a model whose max_seq_len is 256"
    ):
        tiny()(ids(1, 257))


def test_a_full_cache_is_an_error():
    model = tiny()
    cache = model.new_cache(1, 4)
    model(ids(1, 3), cache)
    with pytest.raises(ConfigError, match="the cache has room for 4 tokens and 5 were given"):
        model(ids(1, 2), cache)


def test_a_cache_is_for_its_number_of_sequences():
    model = tiny()
    with pytest.raises(
        ConfigError, match="the cache is for 2 sequences and 1 were given; make a new one"
    ):
        model(ids(1, 3), model.new_cache(2, 4))


def test_parameters_are_made_in_the_dtype_and_the_selection_bias_in_float32():
    """A bfloat16 bias would stop moving: its steps are smaller than the rounding."""
    model = tiny(dtype=torch.bfloat16, compute_dtype=torch.bfloat16, bias_update_rate=0.001)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {moe.router.selection_bias.dtype for moe in moe_layers(model)} == {torch.float32}
    assert model(ids()).logits.dtype == torch.bfloat16


def test_learned_positions_continue_with_the_cache():
    model = Mpt({"size": "tiny", "d_model": 32, "vocab_size": 50}, dtype=torch.float64)
    model.init_weights(0)
    batch = ids(3, 9)
    cache = model.new_cache(3, 9)
    parts = [model(batch[:, i : i + 1], cache).logits for i in range(9)]
    assert relative_error(torch.cat(parts, 1), model(batch).logits) < 1e-12


@pytest.mark.parametrize("family", [Mpt, Dbrx])
@pytest.mark.parametrize("by_token", [False, True])
def test_a_fixed_cache_continues_a_cache(monkeypatch, family, by_token):
    """One token a call, at a position that is on the device; the cache may go on afterwards.

    Attention on a GPU returns memory ordered by token, not by head.
    """
    if by_token:
        attention = functional.scaled_dot_product_attention

        def ordered(*args, **options):
            return attention(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

        monkeypatch.setattr(functional, "scaled_dot_product_attention", ordered)
    sizes = {"size": "tiny", "d_model": 32, "vocab_size": 50}
    model = family(sizes, dtype=torch.float64, compute_dtype=torch.float64)
    model.init_weights(0)
    batch = ids(3, 9) % 50
    cache = model.new_cache(3, 9)
    parts = [model(batch[:, :4], cache).logits]
    fixed = cache.fixed()
    for i in range(4, 9):
        parts.append(model(batch[:, i : i + 1], fixed).logits)
        fixed.advance()
    assert relative_error(torch.cat(parts, 1), model(batch).logits) < 1e-12
    again = model(batch[:, 8:], cache.prefix(8, 9)).logits
    assert relative_error(again, parts[-1]) < 1e-12


@pytest.mark.parametrize("family", [Mpt, Dbrx])
def test_a_cache_that_was_rewound_computes_what_a_new_one_does(family):
    """Bit for bit, in the same memory, by the same fixed cache; nan of a former text is gone."""
    model = family({"size": "tiny", "d_model": 32, "vocab_size": 50})
    model.init_weights(0)
    cache = model.new_cache(3, 12)
    former = ids(3, 7)
    model(former, cache)
    keys, values = cache.layers[0].memory()
    fixed = cache.fixed()
    for length in (5, 0):
        new = cache.prefix(length, 12)
        values[:, :, length:].fill_(float("nan"))
        cache.rewind(length)
        assert torch.equal(continued(model, cache), continued(model, new))
        assert cache.fixed() is fixed
        assert cache.layers[0].memory()[0] is keys


def test_a_cache_is_rewound_to_tokens_that_it_may_hold():
    model = tiny()
    cache = model.new_cache(1, 8)
    model(ids(1, 3), cache)
    for length in (-1, 4):
        with pytest.raises(ConfigError, match=f"length is {length}, .* give a number from 0 to 3"):
            cache.rewind(length)
    cache.fixed()
    with pytest.raises(ConfigError, match="length is 9, and the cache holds at most 8 tokens"):
        cache.rewind(9)
    cache.rewind(3)
    assert cache.length == 3


def continued(model, cache) -> torch.Tensor:
    """Return the logits of 12 tokens without those in the cache, 3 of them by a fixed one."""
    batch = torch.arange(36).view(3, 12)
    parts = [model(batch[:, cache.length : 9], cache).logits]
    fixed = cache.fixed()
    for i in range(9, 12):
        parts.append(model(batch[:, i : i + 1], fixed).logits)
        fixed.advance()
    return torch.cat(parts, 1)


def test_the_memory_of_a_fixed_cache_is_freed_with_it():
    """At once: generated texts may follow each other faster than the garbage collector runs."""
    model = tiny()
    cache = model.new_cache(1, 4)
    model(ids(1, 3), cache)
    cache.fixed()
    memory = weakref.ref(cache.layers[0].memory()[0])
    gc.disable()
    try:
        del cache
        assert memory() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_a_token_alone_keeps_its_experts_under_a_capacity(factor):
    """Decode one token at a time: the capacity rounds down to 0, and drops nothing."""
    ffn = {"ffn_type": "mb_moe", "moe_num_experts": 8, "moe_top_k": 1}
    model = Mpt({"size": "tiny", "ffn_config": ffn | {"moe_capacity_factor": factor}})
    model.init_weights(0)
    batch = ids(1, 17) % 257
    cache = model.new_cache(1, 17)
    model(batch[:, :16], cache)
    output = model(batch[:, 16:], cache)
    assert [balance.dropped.item() for balance in output.balances] == [0, 0]
