"""Every family computes what transformers computes from the same folder, and goes back to it bit by bit."""

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
    """A model of transformers', and the folder that it saved."""
    model, folder = made(MODELS[request.param]), tmp_path_factory.mktemp("published") / "model"
    model.save_pretrained(folder)
    return model, folder


def tokens():
    """Without the id that pads, whose embedding transformers does not train."""
    return torch.randint(1, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(5))


def tensors(folder):
    return {
        key: value
        for path in folder.glob("*.safetensors")
        for key, value in load_file(path).items()
    }


def test_logits_and_all_gradients_are_those_of_transformers(saved):
    theirs, folder = saved
    ours, ids = from_hf(folder), tokens()
    want, got = theirs(ids).logits, ours(ids).logits
    assert relative_error(got, want) < 1e-5
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(6))
    theirs.zero_grad()
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    held, parameters = dict(theirs.named_parameters()), dict(ours.named_parameters())
    hf_format = formats()[theirs.config.model_type]
    rows = hf_format.rows(fused=True)
    folder_map = map_folder(hf_format.name, rows, ours.config, parameters)
    seen = set()
    for name, piece in (part for parts in folder_map.values() for part in parts):
        got = piece.orient(parameters[name].grad[slices(piece.box)])
        want = held[piece.key].grad[slices(piece.file_box)]
        assert relative_error(got.reshape(want.shape), want) < 1e-5, name
        seen |= {name, piece.key}
    assert seen >= parameters.keys() | held.keys()


@pytest.mark.parametrize("family", formats())
@torch.no_grad()
def test_greedy_text_is_the_same(family, tmp_path):
    """64 tokens, ours through its cache."""
    theirs = made(MODELS[family])
    theirs.save_pretrained(tmp_path / "model")
    ours, prompt = from_hf(tmp_path / "model"), tokens()[:, :9]
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    cache, ids, found = ours.new_cache(3, 9 + 64), prompt, [prompt]
    for _ in range(64):
        ids = ours(ids, cache).logits[:, -1].argmax(-1, keepdim=True)
        found.append(ids)
    assert torch.equal(torch.cat(found, 1), want)


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_written_is_what_transformers_reads(saved, tmp_path, fused):
    """In shards of a few kilobytes, with an index; the token ids go along."""
    theirs, folder = saved
    if fused and not formats()[theirs.config.model_type].fused:
        pytest.skip("it has no fused form")
    to_hf(from_hf(folder), tmp_path / "ours", like=folder, fused=fused, shard_bytes=4000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 3
    back, ids = loaded(tmp_path / "ours", theirs.config), tokens()
    assert torch.equal(back(ids).logits, theirs(ids).logits)
    assert back.config.eos_token_id == theirs.config.eos_token_id
    again = from_hf(tmp_path / "ours")
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.parameters(), from_hf(folder).parameters(), strict=True)
    )


def test_a_round_trip_changes_no_bit(saved, tmp_path):
    """Of bfloat16, through float32."""
    theirs, _ = saved
    deepcopy(theirs).bfloat16().save_pretrained(
        tmp_path / "theirs"
    )  # which narrows buffers for good
    to_hf(
        from_hf(tmp_path / "theirs", dtype=torch.float32), tmp_path / "ours", dtype=torch.bfloat16
    )
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert from_hf(tmp_path / "ours").embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_rank_reads_its_shards(saved, dim):
    """Of the experts cut along any dimension; rank 2 of 3, without the others."""
    _, folder = saved
    whole, model = from_hf(folder), from_hf(folder)
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        mesh, cut = init_device_mesh("cpu", (3,)), {}
        for name, parameter in list(model.named_parameters()):
            if dim < parameter.dim():
                owner = model.get_submodule(name.rpartition(".")[0])
                shard = parameter.chunk(3, dim)[2:] or (parameter.narrow(dim, 0, 0),)
                local = torch.full_like(shard[0], torch.nan)
                like = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
                cut[name] = torch.nn.Parameter(
                    DTensor.from_local(local, mesh, [Shard(dim)], **like)
                )
                setattr(owner, name.rpartition(".")[2], cut[name])
        load_weights(model, Folder(folder))
        for name, parameter in cut.items():
            found = (*dict(whole.named_parameters())[name].chunk(3, dim), None, None)[2]
            assert (
                parameter.to_local().numel() == 0
                if found is None
                else torch.equal(parameter.to_local(), found)
            )
    finally:
        dist.destroy_process_group()
