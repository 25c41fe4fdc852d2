"""An upcycled folder computes what the dense one does, here and in transformers."""

import json

import pytest
import torch
from hf_models import DENSE, VOCABULARY, llama, made, mixtral
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tokenyard import ConfigError
from tokenyard.tolerance import relative_error
from tokenyard_models import Upcycling, WeightsError, from_hf, upcycle

COPIED = Upcycling(4, 2)
GRANULAR = Upcycling(20, 10, 5)
SPLIT = Upcycling(5, 5, 5)


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
    "upcycling", [COPIED, Upcycling(3, 1), GRANULAR, Upcycling(10, 5, 5), SPLIT], ids=str
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@torch.no_grad()
def test_the_function_is_kept(dense, tmp_path, family, upcycling):
    """A token takes whole groups; weights are rounded, since 5 is not a power of two."""
    hf_model, folder = dense(DENSE[family])
    upcycled = upcycle(folder, tmp_path / "moe", upcycling, shard_bytes=4000)
    moe = upcycled.config.moe
    assert upcycling.keeps_function
    assert (moe.num_experts, moe.top_k) == (upcycling.num_experts, upcycling.top_k)
    want = hf_model(tokens()).logits
    model = from_hf(tmp_path / "moe")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation="eager")
    assert relative_error(model(tokens()).logits, want) < 1e-6
    assert relative_error(back(tokens()).logits, want) < 1e-6


@torch.no_grad()
def test_an_incomplete_group_changes_the_function(dense, tmp_path):
    hf_model, folder = dense(DENSE["llama"])
    upcycling = Upcycling(5, 2, 5)
    upcycle(folder, tmp_path / "moe", upcycling)
    assert not upcycling.keeps_function
    got = from_hf(tmp_path / "moe")(tokens()).logits
    assert relative_error(got, hf_model(tokens()).logits) > 0.1
    router = tensors(tmp_path / "moe")["model.layers.0.block_sparse_moe.gate.weight"]
    # With equal rows, the router would always choose the same slices.
    assert len(router.unique(dim=0)) == 5


def test_copies_and_slices_have_the_bits_of_the_layer(dense, tmp_path):
    """Router rows differ between groups. Granularity 2 scales bfloat16 without rounding."""
    model, folder = dense(llama())
    model.bfloat16().save_pretrained(folder)
    upcycle(folder, tmp_path / "copied", COPIED)
    upcycle(folder, tmp_path / "sliced", Upcycling(8, 4, 2))
    whole, copied, sliced = (tensors(f) for f in (folder, tmp_path / "copied", tmp_path / "sliced"))
    for name, dense_name, dim, scale in (
        ("w1", "gate", 0, 1),
        ("w3", "up", 0, 1),
        ("w2", "down", 1, 2),
    ):
        layer = whole[f"model.layers.1.mlp.{dense_name}_proj.weight"]
        for e in range(4):
            assert torch.equal(
                copied[f"model.layers.1.block_sparse_moe.experts.{e}.{name}.weight"], layer
            )
        for e in range(8):
            part = sliced[f"model.layers.1.block_sparse_moe.experts.{e}.{name}.weight"]
            assert torch.equal(part, layer.chunk(2, dim)[e % 2] * scale)
    router = sliced["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(router[::2], router[1::2])
    assert len(router.unique(dim=0)) == 4
    rest = {key for key in whole if ".mlp." not in key}
    assert all(torch.equal(whole[key], sliced[key]) for key in rest)
    assert sliced.keys() == rest | {key for key in sliced if "block_sparse_moe" in key}


def test_the_tokenizer_and_token_ids_are_copied(dense, tmp_path):
    _, folder = dense(DENSE["qwen3"])
    upcycle(folder, tmp_path / "moe", COPIED)
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["eos_token_id"] == 3


@torch.no_grad()
def test_the_seed_sets_the_routers(dense, tmp_path):
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
    def test_contradicting_numbers(self, numbers, sentence):
        with pytest.raises(ConfigError) as caught:
            Upcycling(*numbers)
        assert str(caught.value) == sentence

    def refused(self, folder, target, upcycling, error):
        with pytest.raises(error) as caught:
            upcycle(folder, target, upcycling)
        assert not target.exists()
        return str(caught.value)

    def test_a_width_that_cannot_be_sliced(self, dense, tmp_path):
        _, folder = dense(llama())
        message = self.refused(folder, tmp_path / "moe", Upcycling(6, 3, 3), ConfigError)
        assert message == (
            "granularity is 3, which does not divide the width of the dense layers, 20; "
            "these do: 1, 2, 4, 5, 10, 20"
        )

    def test_a_model_that_has_experts(self, dense, tmp_path):
        _, folder = dense(mixtral())
        message = self.refused(folder, tmp_path / "moe", COPIED, WeightsError)
        assert (
            message
            == f"{folder} holds a mixtral, which has experts; upcycled are: llama, mistral, qwen3"
        )

    def test_a_tensor_that_is_missing(self, dense, tmp_path):
        """The error comes before anything is written."""
        _, folder = dense(llama())
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
        message = self.refused(folder, tmp_path / "moe", COPIED, WeightsError)
        assert message.startswith(
            f"{folder} lacks model.layers.2.input_layernorm.weight and 8 others"
        )
        assert [p.name for p in tmp_path.iterdir()] == ["dense"]

    def test_a_target_that_exists(self, dense, tmp_path):
        _, folder = dense(llama())
        with pytest.raises(WeightsError, match="exists already; give the name of a new folder"):
            upcycle(folder, folder, COPIED)


@pytest.mark.parametrize("beside", [500000.0, 10000.0])
@torch.no_grad()
def test_rope_parameters_without_a_base_take_the_one_beside_them(dense, beside):
    """transformers reads them the same way."""
    _, folder = dense(llama())
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {
        "rope_theta": beside,
        "rope_parameters": {"rope_type": "default"},
    }
    path.write_text(json.dumps(config))
    hf_model = AutoModelForCausalLM.from_pretrained(folder)
    model = from_hf(folder)
    assert model.config.rope_theta == beside
    assert relative_error(model(tokens()).logits, hf_model(tokens()).logits) < 1e-6


class TestTargets:
    """A target that cannot be made gives an error, and no file of the user is lost."""

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
