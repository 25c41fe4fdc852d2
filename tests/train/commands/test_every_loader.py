"""Every command that loads a checkpoint uses all of its tensors, or names those that differ."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tokenyard_train.checkpoint import CheckpointError, read_meta, write_checkpoint
from tokenyard_train.commands.convert import convert
from tokenyard_train.commands.generate import generate
from tokenyard_train.commands.options import ConvertOptions, GenerateOptions, RoutingOptions
from tokenyard_train.commands.routing import measure
from tokenyard_train.commands.train import train

from ..conftest import MODEL

NAME = "model.blocks.0.ffn.router.weight"


@pytest.fixture
def run(config, console):
    """The folder of a run of one step."""
    return train(config(max_duration="1ba"), console).folder


def missing(tensors):
    del tensors[NAME]
    return r"it lacks model\.blocks\.0\.ffn\.router\.weight;"


def extra(tensors):
    tensors["model.blocks.9.ffn.router.score_bias"] = torch.zeros(4)
    return r"it holds model\.blocks\.9\.ffn\.router\.score_bias, which"


def renamed(tensors):
    tensors["model.blocks.0.gate.weight"] = tensors.pop(NAME)
    return r"it lacks model\.blocks\.0\.ffn.*, and it holds model\.blocks\.0\.gate\.weight, which"


def wrong_shape(tensors):
    tensors[NAME] = tensors[NAME][:, :-1].contiguous()
    return r".*router\.weight has the shape \[4, 15\] there, and \[4, 16\] here"


def wrong_dtype(tensors):
    tensors[NAME] = tensors[NAME].bfloat16()
    return r".*router\.weight has the dtype torch\.bfloat16 there, and torch\.float32 here"


def adapters(tensors):
    tensors["model.blocks.0.ffn.experts.adapter.up_a"] = torch.zeros(4, 2, 16)
    return r"it holds LoRA adapters .*adapter\.up_a.*give the same lora section, or merge"


def load_path(run, config, console, text):
    folder = run.with_name("other")
    train(config(load_path=str(run), save_folder=str(folder), max_duration="1ba"), console)


def autoresume(run, config, console, text):
    train(config(autoresume=True, max_duration="2ba"), console)


def run_generate(run, config, console, text):
    generate(GenerateOptions(run, ["3 times"], 2, 0.0, device="cpu"))


def run_routing(run, config, console, text):
    measure(RoutingOptions(run, text, 64, out=run.with_name("out"), device="cpu"))


def run_convert(run, config, console, text):
    convert(ConvertOptions(run, run.with_name("hf")), console)


CHANGES = (missing, extra, renamed, wrong_shape, wrong_dtype, adapters)
LOADERS = (load_path, autoresume, run_generate, run_routing, run_convert)


def tensors_of(checkpoint):
    tensors = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_names_every_difference(run, config, console, text, loader):
    meta = read_meta(run / "ba1")
    original = tensors_of(run / "ba1")
    for change in CHANGES:
        tensors = dict(original)
        sentence = rf"checkpoint .*ba1 is of another model: {change(tensors)}"
        write_checkpoint(run, "ba1", tensors, meta, keep=-1)
        with pytest.raises(CheckpointError, match=sentence):
            loader(run, config, console, text)
    write_checkpoint(run, "ba1", original, meta, keep=-1)
    loader(run, config, console, text)


WITH_LORA = {"lora": {"rank": 4, "alpha": 64}, "optimizer": {"lr": 0.05}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "it holds LoRA adapters that the config's model does not have"),
        (
            {"lora": {"rank": 4, "alpha": 64, "targets": ["up"]}},
            "it holds LoRA adapters .*attention",
        ),
        ({"lora": {"rank": 2, "alpha": 32}}, "has the shape"),
        ({"lora": {"rank": 4, "alpha": 16}}, "lora.alpha / lora.rank 16, and the config's is 4"),
        ({"model": MODEL | {"n_layers": 1}, "lora": {"rank": 4, "alpha": 64}}, r"model\.blocks\.1"),
    ],
)
def test_a_run_that_starts_from_a_lora_run_keeps_its_adapters(
    config, console, tmp_path, changes, sentence
):
    train(config(max_duration="2ba", **WITH_LORA), console)
    new = {"save_folder": str(tmp_path / "b"), "load_path": str(tmp_path / "run")}
    with pytest.raises(CheckpointError, match=sentence):
        train(config(**new, **changes), console)


def test_the_same_lora_section_goes_on_where_the_run_ended(config, console, tmp_path):
    ended = train(config(max_duration="30ba", **WITH_LORA), console)
    still = {"optimizer": {"lr": 1e-9}, "max_duration": "1ba", "lora": WITH_LORA["lora"]}
    again = train(
        config(save_folder=str(tmp_path / "b"), load_path=str(tmp_path / "run"), **still), console
    )
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert again.train_loss < first["loss"] - 0.2
    assert again.bits_per_byte == pytest.approx(ended.bits_per_byte, abs=1e-4)
