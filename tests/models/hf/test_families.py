"""Each family computes what transformers computes, and its folders round-trip bit by bit."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from hf_models import MODELS, VOCABULARY, loaded, made
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tokenyard.tolerance import relative_error
from tokenyard_models import from_hf, to_hf
from tokenyard_models.families._boxes import slices
from tokenyard_models.hf import Folder, load_weights
from tokenyard_models.hf._folder_map import formats, map_folder


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A transformers model and the folder that it saved."""
    model = made(MODELS[request.param])
    folder = tmp_path_factory.mktemp("published") / "model"
    model.save_pretrained(folder)
    return model, folder


def tokens():
    """Leave out the padding id, whose embedding transformers does not train."""
    return torch.randint(1, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(5))


def tensors(folder):
    return {
        key: value
        for path in folder.glob("*.safetensors")
        for key, value in load_file(path).items()
    }


def test_logits_and_all_gradients_are_those_of_transformers(saved):
    hf_model, folder = saved
    model = from_hf(folder)
    ids = tokens()
    want = hf_model(ids).logits
    got = model(ids).logits
    assert relative_error(got, want) < 1e-5
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(6))
    hf_model.zero_grad()
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    hf_parameters = dict(hf_model.named_parameters())
    parameters = dict(model.named_parameters())
    hf_format = formats()[hf_model.config.model_type]
    rows = hf_format.rows(fused=True)
    folder_map = map_folder(hf_format.name, rows, model.config, parameters)
    seen = set()
    for name, piece in (part for parts in folder_map.values() for part in parts):
        got = piece.orient(parameters[name].grad[slices(piece.box)])
        want = hf_parameters[piece.key].grad[slices(piece.file_box)]
        assert relative_error(got.reshape(want.shape), want) < 1e-5, name
        seen |= {name, piece.key}
    assert seen >= parameters.keys() | hf_parameters.keys()


@pytest.mark.parametrize("family", formats())
@torch.no_grad()
def test_greedy_text_is_the_same(family, tmp_path):
    """Generate 64 tokens, with the cache of our model."""
    hf_model = made(MODELS[family])
    hf_model.save_pretrained(tmp_path / "model")
    model = from_hf(tmp_path / "model")
    prompt = tokens()[:, :9]
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = hf_model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    cache = model.new_cache(3, 9 + 64)
    ids = prompt
    text = [prompt]
    for _ in range(64):
        ids = model(ids, cache).logits[:, -1].argmax(-1, keepdim=True)
        text.append(ids)
    assert torch.equal(torch.cat(text, 1), want)


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_written_is_what_transformers_reads(saved, tmp_path, fused):
    """Write shards of a few kilobytes, with an index and the token ids."""
    hf_model, folder = saved
    if fused and not formats()[hf_model.config.model_type].fused:
        pytest.skip("it has no fused form")
    to_hf(from_hf(folder), tmp_path / "ours", like=folder, fused=fused, shard_bytes=4000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 3
    back = loaded(tmp_path / "ours", hf_model.config)
    ids = tokens()
    assert torch.equal(back(ids).logits, hf_model(ids).logits)
    assert back.config.eos_token_id == hf_model.config.eos_token_id
    again = from_hf(tmp_path / "ours")
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.parameters(), from_hf(folder).parameters(), strict=True)
    )


def test_a_round_trip_changes_no_bit(saved, tmp_path):
    """Read bfloat16 weights as float32 and write them as bfloat16."""
    hf_model, _ = saved
    # A copy, because bfloat16() also rounds the buffers of the model.
    deepcopy(hf_model).bfloat16().save_pretrained(tmp_path / "theirs")
    to_hf(
        from_hf(tmp_path / "theirs", dtype=torch.float32), tmp_path / "ours", dtype=torch.bfloat16
    )
    before = tensors(tmp_path / "theirs")
    after = tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert from_hf(tmp_path / "ours").embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_rank_reads_its_shards(saved, dim):
    """Shard the parameters along any dimension, and load as rank 2 of 3 in one process."""
    _, folder = saved
    whole = dict(from_hf(folder).named_parameters())
    model = from_hf(folder)
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        mesh = init_device_mesh("cpu", (3,))
        sharded = {}
        for name, parameter in list(model.named_parameters()):
            if dim < parameter.dim():
                owner = model.get_submodule(name.rpartition(".")[0])
                shard = parameter.chunk(3, dim)[2:] or (parameter.narrow(dim, 0, 0),)
                local = torch.full_like(shard[0], torch.nan)
                like = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
                sharded[name] = torch.nn.Parameter(
                    DTensor.from_local(local, mesh, [Shard(dim)], **like)
                )
                setattr(owner, name.rpartition(".")[2], sharded[name])
        load_weights(model, Folder(folder))
        for name, parameter in sharded.items():
            local = parameter.to_local()
            chunks = whole[name].chunk(3, dim)
            assert torch.equal(local, chunks[2]) if len(chunks) == 3 else local.numel() == 0
    finally:
        dist.destroy_process_group()
