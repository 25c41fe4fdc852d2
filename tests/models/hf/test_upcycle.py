"""A dense model's folder, upcycled, computes what it did: by our reading, and by transformers'."""

import json

import pytest
import torch
from hf_models import DENSE, VOCABULARY, llama, made, mixtral
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tokenyard import ConfigError
from tokenyard.tolerance import relative_error
from tokenyard_models import Upcycling, WeightsError, from_hf, upcycle

COPIED, GRANULAR, SPLIT = Upcycling(4, 2), Upcycling(20, 10, 5), Upcycling(5, 5, 5)


@pytest.fixture
def dense(tmp_path):
    """Save a dense model by transformers; return it and its folder."""

    def saved(config):
        model = made(config)
        model.save_pretrained(tmp_path / "dense")
        (tmp_path / "dense" / "tokenizer.json").write_text("{}")
        return model, tmp_path / "dense"

    return saved


def tokens():
    return torch.randint(1, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(5))


def tensors(folder):
    return {
        key: value
        for path in folder.glob("*.safetensors")
        for key, value in load_file(path).items()
    }


@pytest.mark.parametrize(
    "how", [COPIED, Upcycling(3, 1), GRANULAR, Upcycling(10, 5, 5), SPLIT], ids=str
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@torch.no_grad()
def test_the_function_is_kept(dense, tmp_path, family, how):
    """Where a token takes whole groups; granularity 5 is no power of two, so the weights are rounded."""
    theirs, folder = dense(DENSE[family])
    model = upcycle(folder, tmp_path / "moe", how, shard_bytes=4000)
    assert how.keeps_function
    assert (model.config.moe.num_experts, model.config.moe.top_k) == (how.num_experts, how.top_k)
    want, ours = theirs(tokens()).logits, from_hf(tmp_path / "moe")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation="eager")
    assert relative_error(ours(tokens()).logits, want) < 1e-6
    assert relative_error(back(tokens()).logits, want) < 1e-6


@torch.no_grad()
def test_slices_that_make_no_whole_group_are_another_function(dense, tmp_path):
    theirs, folder = dense(DENSE["llama"])
    how = Upcycling(5, 2, 5)
    upcycle(folder, tmp_path / "moe", how)
    assert not how.keeps_function
    assert relative_error(from_hf(tmp_path / "moe")(tokens()).logits, theirs(tokens()).logits) > 0.1
    router = tensors(tmp_path / "moe")["model.layers.0.block_sparse_moe.gate.weight"]
    assert (
        len(router.unique(dim=0)) == 5
    )  # each slice has its own row, or the same ones were always taken


def test_every_copy_is_bitwise_the_layer_and_every_slice_is_a_part_of_it(dense, tmp_path):
    """In bfloat16, whose down product a power of two scales without rounding; routers differ from group to group."""
    model, folder = dense(llama())
    model.bfloat16().save_pretrained(folder)
    upcycle(folder, tmp_path / "copied", COPIED)
    upcycle(folder, tmp_path / "sliced", Upcycling(8, 4, 2))
    whole, copied, sliced = (tensors(f) for f in (folder, tmp_path / "copied", tmp_path / "sliced"))
    for ours, theirs, dim, scale in (
        ("w1", "gate", 0, 1),
        ("w3", "up", 0, 1),
        ("w2", "down", 1, 2),
    ):
        layer = whole[f"model.layers.1.mlp.{theirs}_proj.weight"]
        for e in range(4):
            assert torch.equal(
                copied[f"model.layers.1.block_sparse_moe.experts.{e}.{ours}.weight"], layer
            )
        for e in range(8):
            found = sliced[f"model.layers.1.block_sparse_moe.experts.{e}.{ours}.weight"]
            assert torch.equal(found, layer.chunk(2, dim)[e % 2] * scale)
    router = sliced["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(router[::2], router[1::2])
    assert len(router.unique(dim=0)) == 4
    rest = {key for key in whole if ".mlp." not in key}
    assert all(torch.equal(whole[key], sliced[key]) for key in rest)
    assert sliced.keys() == rest | {key for key in sliced if "block_sparse_moe" in key}


def test_the_tokenizer_and_token_ids_go_along(dense, tmp_path):
    _, folder = dense(DENSE["qwen3"])
    upcycle(folder, tmp_path / "moe", COPIED)
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["eos_token_id"] == 3


@torch.no_grad()
def test_the_seed_is_that_of_the_routers(dense, tmp_path):
    _, folder = dense(llama())
    routers = []
    for seed in (1, 1, 2):
        target = tmp_path / f"{len(routers)}"
        upcycle(folder, target, Upcycling(4, 2, seed=seed))
        routers.append(tensors(target)["model.layers.0.block_sparse_moe.gate.weight"])
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])


class TestMistakes:
    @pytest.mark.parametrize(
        ("numbers", "sentence"),
        [
            ((4, 5), "top_k is 5 but num_experts is 4; choose from 1 to 4"),
            (
                (6, 4, 4),
                "granularity is 4, which does not divide num_experts 6; these do: 1, 2, 3, 6",
            ),
            ((0, 1), "num_experts is 0; it must be at least 1"),
        ],
    )
    def test_numbers_that_do_not_go_together(self, numbers, sentence):
        with pytest.raises(ConfigError) as caught:
            Upcycling(*numbers)
        assert str(caught.value) == sentence

    def refused(self, folder, target, how, error):
        with pytest.raises(error) as caught:
            upcycle(folder, target, how)
        assert not target.exists()
        return str(caught.value)

    def test_a_width_that_cannot_be_sliced_so(self, dense, tmp_path):
        _, folder = dense(llama())
        said = self.refused(folder, tmp_path / "moe", Upcycling(6, 3, 3), ConfigError)
        want = "granularity is 3, which does not divide the width of the dense layers, 20; these do: 1, 2, 4, 5, 10, 20"
        assert said == want

    def test_a_model_that_has_experts(self, dense, tmp_path):
        _, folder = dense(mixtral())
        said = self.refused(folder, tmp_path / "moe", COPIED, WeightsError)
        assert (
            said
            == f"{folder} holds a mixtral, which has experts; upcycled are: llama, mistral, qwen3"
        )

    def test_a_tensor_that_is_missing(self, dense, tmp_path):
        """Before anything is written."""
        _, folder = dense(llama())
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
        said = self.refused(folder, tmp_path / "moe", COPIED, WeightsError)
        assert said.startswith(f"{folder} lacks model.layers.2.input_layernorm.weight and 8 others")
        assert [p.name for p in tmp_path.iterdir()] == ["dense"]

    def test_a_target_that_exists(self, dense, tmp_path):
        _, folder = dense(llama())
        with pytest.raises(WeightsError, match="exists already; give the name of a new folder"):
            upcycle(folder, folder, COPIED)


@pytest.mark.parametrize("beside", [500000.0, 10000.0])
@torch.no_grad()
def test_rope_parameters_without_a_base_take_the_one_beside_them(dense, beside):
    """As transformers reads them."""
    _, folder = dense(llama())
    path = folder / "config.json"
    told = json.loads(path.read_text()) | {
        "rope_theta": beside,
        "rope_parameters": {"rope_type": "default"},
    }
    path.write_text(json.dumps(told))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert from_hf(folder).config.rope_theta == beside
    assert relative_error(from_hf(folder)(tokens()).logits, theirs(tokens()).logits) < 1e-6


class TestTargets:
    """What cannot be made is said, and nothing of the user's is lost."""

    def test_a_folder_of_that_name_unfinished(self, dense, tmp_path):
        _, folder = dense(llama())
        (tmp_path / "moe.unfinished").mkdir()
        (tmp_path / "moe.unfinished" / "mine").touch()
        with pytest.raises(
            WeightsError, match=r"moe.unfinished is left of a write that was cut off, or yours"
        ):
            upcycle(folder, tmp_path / "moe", COPIED)
        assert (tmp_path / "moe.unfinished" / "mine").exists()

    def test_below_a_file(self, dense):
        _, folder = dense(llama())
        with pytest.raises(
            WeightsError, match="cannot be made: Not a directory; give the name of a new folder"
        ):
            upcycle(folder, folder / "config.json" / "x", COPIED)
