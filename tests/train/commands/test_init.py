"""`tokenyard init` writes a commented config that `check` and `train` accept."""

import json
import re

import pytest
import torch
import yaml

from tokenyard import default_registry
from tokenyard_models import to_hf
from tokenyard_models.strict_config import parse
from tokenyard_train.commands.init import _MODELS
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.build_model import build_model

from ..chat_folder import write_tokenizer

SHORT = ("max_duration=2ba", "device=cpu")
CHAT = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", _MODELS)
def test_the_config_of_each_model_passes_check(tokenyard, text, name):
    code, said, errors = tokenyard("init", "my.yaml", "--model", name, "--data", str(text))
    assert (code, errors) == (0, "")
    assert said == "wrote my.yaml; next: tokenyard check my.yaml\n"
    code, said, errors = tokenyard("check", "my.yaml", *SHORT)
    assert (code, errors) == (0, "")
    model = "dbrx" if name == "quickstart" else name
    assert re.search(rf"name +{model}\n", re.sub(r" +\n", "\n", said))


@pytest.mark.parametrize("name", _MODELS)
def test_the_commented_keys_exist(tokenyard, config, name):
    """The file is valid with all of them, and those of the model have their defaults."""
    tokenyard("init", "my.yaml", "--model", name)
    with open("my.yaml") as file:
        written = file.read()
    # not those of another loader, which three spaces set off
    uncommented = re.sub(r"^( *)# (?=[a-z_]+: )", r"\1", written, flags=re.MULTILINE)
    assert uncommented.count("\n# ") < written.count("\n# ")
    parse(TrainConfig, yaml.safe_load(uncommented))
    tiny, full = (yaml.safe_load(text)["model"] for text in (written, uncommented))
    assert build_model(config(model=tiny))[1].config == build_model(config(model=full))[1].config


def test_the_quickstart_trains(tokenyard):
    assert tokenyard("init")[0] == 0
    code, _, errors = tokenyard("train", "config.yaml", *SHORT, "global_train_batch_size=2")
    assert (code, errors) == (0, "")


def test_a_finetune_trains(tokenyard, tmp_path):
    model = default_registry().choose("model", "qwen3_moe").backend.load()
    torch.manual_seed(0)
    to_hf(model({"size": "tiny", "vocab_size": 400}), tmp_path / "a base")
    write_tokenizer(tmp_path / "a base", [json.dumps(CHAT)])
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    said = tokenyard("init", "tune.yaml", "--finetune", "--base", "a base", "--data", "chats.jsonl")
    assert said[0] == 0
    code, out, errors = tokenyard("train", "tune.yaml", *SHORT, "global_train_batch_size=1")
    assert (code, errors) == (0, "")
    assert "trainable: " in out
    tokenyard("init", "again.yaml", "--finetune", "--base", "hf://a base")
    assert yaml.safe_load((tmp_path / "again.yaml").read_text())["load_path"] == "hf://a base"
    assert (tmp_path / "runs" / "tune" / "ba2").is_dir()


def test_nothing_is_overwritten(tokenyard, tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    code, _, errors = tokenyard("init")
    sentence = "error: config.yaml exists already; give the name of a new file\n"
    assert (code, errors) == (2, sentence)
    assert (tmp_path / "config.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--model", "qwen3"), "--model 'qwen3' is unknown .did you mean 'qwen3_moe'"),
        (("--finetune", "--model", "dbrx"), "--model has no effect with --finetune"),
        (("--base", "folder"), "--base has no effect without --finetune"),
        (("no-folder/my.yaml",), "no-folder/my.yaml is in the folder no-folder, which does not"),
    ],
)
def test_mistakes_write_nothing(tokenyard, tmp_path, options, sentence):
    code, _, errors = tokenyard("init", *options)
    assert code == 2
    assert re.match(f"error: {sentence}", errors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a run: #1", "-x", "ü.yaml"])
def test_the_run_name_is_a_folder_name(tokenyard, name):
    tokenyard("init", "--", name)
    with open(name) as file:
        parse(TrainConfig, yaml.safe_load(file))
