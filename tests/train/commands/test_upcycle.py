"""Upcycle a dense folder, train the MoE model, and convert it back."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import yaml

pytest.importorskip("transformers", minversion="5.14")

from transformers import AutoModelForCausalLM, LlamaConfig

from tokenyard_models import from_hf

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny Llama saved by transformers, for bytes."""
    torch.manual_seed(4)
    config = LlamaConfig(
        **SIZES,
        vocab_size=257,
        max_position_embeddings=128,
        eos_token_id=256,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("published") / "llama"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_upcycled_trained_and_exported(tokenyard, settings, dense, tmp_path):
    """Experts start as slices of the dense layer, with copies, and differ after training."""
    shape = ("--num-experts", "8", "--top-k", "4", "--granularity", "2")
    code, said, errors = tokenyard("upcycle", str(dense), str(tmp_path / "moe"), *shape)
    assert (code, errors) == (0, "")
    assert f"it computes what {dense} does, up to rounding" in said
    assert "mixtral, " in said
    before = from_hf(tmp_path / "moe").blocks[1].ffn
    assert torch.equal(before.experts.up[0], before.experts.up[2])
    assert torch.equal(before.router.weight[0], before.router.weight[1])
    changes = {"load_path": f"hf://{tmp_path / 'moe'}", "max_duration": "6ba"}
    changes |= {"tokenizer": {"name": "bytes"}}
    tuning = {key: value for key, value in (settings | changes).items() if key != "model"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tuning))
    assert tokenyard("train", str(tmp_path / "config.yaml"))[0] == 0
    assert tokenyard("convert", str(tmp_path / "run"), str(tmp_path / "tuned"))[0] == 0
    after = from_hf(tmp_path / "tuned").blocks[1].ffn
    assert len(after.experts.up.detach().unique(dim=0)) == 8
    assert len(after.router.weight.detach().unique(dim=0)) == 8
    assert (
        type(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")).__name__
        == "MixtralForCausalLM"
    )


def test_it_says_when_the_function_is_not_kept(tokenyard, dense, tmp_path):
    shape = ("--num-experts", "8", "--top-k", "3", "--granularity", "8")
    said = tokenyard("upcycle", str(dense), str(tmp_path / "moe"), *shape)[1]
    assert "does not compute what" in said
    assert "tokens take 3 slices, and 8 make a layer" in said


def test_a_run_is_to_be_converted_first(tokenyard, settings, dense, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings | {"max_duration": "1ba"}))
    tokenyard("train", str(tmp_path / "config.yaml"))
    run = tmp_path / "run"
    code, _, errors = tokenyard(
        "upcycle", str(run), str(tmp_path / "moe"), "--num-experts", "2", "--top-k", "1"
    )
    assert code == 2
    assert (
        f"{run} is a run's; first write it as a folder: tokenyard convert {run} FOLDER --to hf"
        in errors
    )


def test_a_mistake_is_one_sentence(tokenyard, dense, tmp_path):
    code, _, errors = tokenyard(
        "upcycle", str(dense), str(tmp_path / "moe"), "--num-experts", "2", "--top-k", "3"
    )
    assert (code, errors) == (2, "error: top_k is 3 but num_experts is 2; choose from 1 to 2\n")
    assert not (tmp_path / "moe").exists()
