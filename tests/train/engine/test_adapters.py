"""Checkpoints of a LoRA run hold adapters and their states alone, and name the base."""

import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tokenyard.tolerance import relative_error
from tokenyard_models import to_hf
from tokenyard_models.hf import Folder
from tokenyard_train.checkpoint import CheckpointError, read_meta
from tokenyard_train.commands.convert import convert
from tokenyard_train.commands.generate import generate
from tokenyard_train.commands.load_model import load_trained, load_weights_only
from tokenyard_train.commands.options import ConvertOptions, GenerateOptions, RoutingOptions
from tokenyard_train.commands.routing import measure
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config
from tokenyard_train.engine.base import base_digest
from tokenyard_train.engine.resume import start_from
from tokenyard_train.engine.state import Position

from .test_resume import resumed, saved

MIXTRAL = {"name": "mixtral", "size": "tiny", "hidden_size": 32, "intermediate_size": 24}
LORA = {"rank": 4, "targets": "*", "train_also": ["*norm*"], "dropout": 0.1}
QUIET = Console(quiet=True)


@pytest.fixture
def base(settings, tmp_path):
    """A Hugging Face folder of random weights in bfloat16."""
    settings = settings | {"model": MIXTRAL, "max_duration": "1ba"}
    run = train(read_config(settings | {"save_folder": str(tmp_path / "first")}), QUIET).folder
    to_hf(load_weights_only(run).model, tmp_path / "base", dtype=torch.bfloat16)
    shutil.rmtree(run)
    return tmp_path / "base"


@pytest.fixture
def tuning(settings, base):
    """A config that fine-tunes `base`, with a checkpoint after every second step."""
    changes = {"load_path": f"hf://{base}", "tokenizer": {"name": "bytes"}, "lora": LORA}
    changes |= {"optimizer": {"name": "adamw", "lr": 0.01}, "save_interval": "2ba"}
    changes |= {"scheduler": {"name": "constant_with_warmup"}}
    return {key: value for key, value in (settings | changes).items() if key != "model"}


def tensors_of(checkpoint):
    return {n: t for file in checkpoint.glob("*.safetensors") for n, t in load_file(file).items()}


def change_one_number(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors[name][5, 7] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("precision", ["fp32", "bf16_master"])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(tuning, tmp_path, precision):
    tuning |= {"precision": precision}
    whole = train(read_config(tuning), QUIET)
    parts = tuning | {"save_folder": str(tmp_path / "b"), "autoresume": True}
    train(read_config(parts | {"max_duration": "2ba"}), QUIET)
    resumed = train(read_config(parts), QUIET)
    assert resumed.train_loss == whole.train_loss
    first, second = (tensors_of(run.folder / "ba6") for run in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_checkpoint_holds_what_is_trained_alone(tuning):
    tuning |= {"lora": LORA | {"rank": 32}}
    checkpoint = train(read_config(tuning), QUIET).folder / "ba6"
    tensors = tensors_of(checkpoint)
    trained = [name for name in tensors if name.startswith("model.")]
    assert trained
    assert all(".adapter." in name or "norm" in name for name in trained)
    assert len(tensors) == 3 * len(trained)  # and two moments of each
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert size <= 1.1 * sum(tensor.nbytes for tensor in tensors.values())


def test_every_command_finds_the_base(tuning, base, text, tmp_path):
    run = train(read_config(tuning), QUIET).folder
    ids = torch.randint(0, 257, (2, 20))
    want = load_trained(run, "cpu").model.eval()(ids).logits
    assert not torch.equal(load_trained(base, "cpu", "fp32").model(ids).logits, want)
    convert(ConvertOptions(run, tmp_path / "merged"), QUIET)
    merged = load_trained(tmp_path / "merged", "cpu").model(ids).logits
    assert relative_error(merged, want) < 5e-6
    prompt = (["3 times"], 3, 0.0)
    text_of_run = generate(GenerateOptions(run, *prompt, device="cpu"))
    routing = RoutingOptions(run, text, 64, out=tmp_path / "out", device="cpu")
    assert measure(routing)[0]

    moved = base.rename(tmp_path / "moved")
    with pytest.raises(
        CheckpointError, match=r"ba6 holds adapters alone, and their base .*base does not exist"
    ):
        generate(GenerateOptions(run, *prompt, device="cpu"))
    again = generate(GenerateOptions(run, *prompt, device="cpu", base=moved))
    assert again == text_of_run


def test_another_base_is_an_error(tuning, base):
    run = train(read_config(tuning | {"max_duration": "2ba"}), QUIET).folder
    change_one_number(base)
    sentence = r"ba2 holds adapters of a base with other weights than hf://.*/base has now"
    with pytest.raises(CheckpointError, match=sentence):
        train(read_config(tuning | {"autoresume": True}), QUIET)
    with pytest.raises(CheckpointError, match=sentence):
        load_trained(run, "cpu")


def test_a_run_may_go_on_from_adapters(tuning, base, tmp_path):
    """The base of the second run is that of the first, and so are model and adapters."""
    first = train(read_config(tuning), QUIET)
    model = load_trained(first.folder, "cpu").model
    del tuning["lora"], tuning["max_seq_len"], tuning["tokenizer"]
    tuning |= {"load_path": str(first.folder), "save_folder": str(tmp_path / "b")}
    still = {"max_duration": "1ba", "optimizer": {"name": "adamw", "lr": 1e-30}}
    second = train(read_config(tuning | still), QUIET)
    assert read_meta(second.folder / "ba1")["base"]["path"] == f"hf://{base}"
    again = dict(load_trained(second.folder, "cpu").model.named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in model.named_parameters())


def test_adapters_of_initial_weights_and_of_a_run(settings, tmp_path):
    lora = settings | {"lora": {"rank": 2}, "max_duration": "2ba"}
    run = train(read_config(lora), QUIET).folder
    base = read_meta(run / "ba2")["base"]
    assert (base["path"], base["seed"]) == (None, 17)
    load_trained(run, "cpu")

    whole = train(read_config(settings | {"save_folder": str(tmp_path / "b")}), QUIET).folder
    lora |= {"load_path": str(whole), "save_folder": str(tmp_path / "c")}
    run = train(read_config(lora | {"precision": "bf16_master"}), QUIET).folder
    assert read_meta(run / "ba2")["base"]["path"] == str(whole / "ba6")
    load_trained(run, "cpu")


def test_the_digest_depends_on_every_number_and_not_on_the_precision(base):
    def digest():
        models = [load_trained(base, "cpu", precision).model for precision in (None, "fp32")]
        for model in models:
            model.requires_grad_(False)
        one, other = map(base_digest, models)
        assert one == other
        return one

    before = digest()
    change_one_number(base)
    assert digest() != before
    assert Folder(base).keys


def test_a_checkpoint_that_holds_the_base_too_is_a_start_and_not_resumed(build):
    """Older versions wrote such checkpoints."""
    lora = {"lora": {"rank": 2}}
    run = build(**lora)
    saved(run, Position(batch=2))
    with pytest.raises(
        CheckpointError, match=r"ba2 of an older version holds the base .*load_path"
    ):
        resumed(build(**lora, autoresume=True))
    other = build(**lora, seed=5)
    start_from(other.model, str(run.folder), other.config)
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), run.model.parameters()))
