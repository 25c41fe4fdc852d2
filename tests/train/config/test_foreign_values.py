"""Paths as people write them, blank keys, and names of LLM Foundry."""

from pathlib import Path

import pytest

from tokenyard import ConfigError
from tokenyard_models import WeightsError
from tokenyard_train.config import TrainConfig, load_config, read_config
from tokenyard_train.data.paths import local_path

BASE = {
    "model": {"name": "mixtral", "size": "tiny"},
    "train_loader": {"name": "text", "dataset": {"path": "text.txt"}},
    "global_train_batch_size": 4,
    "max_duration": "3ba",
    "device": "cpu",
}
PATH_KEYS = (
    "save_folder",
    "load_path",
    "tokenizer.name",
    "tokenizer.kwargs.file",
    "train_loader.dataset.path",
    "train_loader.dataset.packed",
    "train_loader.dataset.local",
    "train_loader.dataset.hf_name",
    "train_loader.dataset.streams.a.path",
    "eval_loader.dataset.path",
    "loggers.tensorboard.log_dir",
)


def with_key(path: str, value: object) -> dict:
    """Return BASE with one key set, at any depth. A location replaces the others."""
    section = {**BASE}
    top = section
    *parents, last = path.split(".")
    for name in parents:
        default = {"name": "text"} if name == "eval_loader" else {}
        section[name] = dict(section.get(name, default))
        section = section[name]
    if path.startswith("train_loader.dataset."):
        top["train_loader"]["dataset"].pop("path", None)
    section[last] = value
    return top


def value_of(config: TrainConfig, path: str) -> object:
    value = config
    for name in path.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


@pytest.mark.parametrize("path", PATH_KEYS)
@pytest.mark.parametrize(
    "remote", ["s3://bucket/run", "gs://b", "dbfs:/Volumes/x", "azure://c/x", "file:///x", "S3:/x"]
)
def test_a_remote_path_is_one_sentence(path, remote):
    with pytest.raises(ConfigError) as raised:
        read_config(with_key(path, remote))
    said = str(raised.value)
    assert path.replace(".streams.a.", ".streams.") in said
    assert f"'{remote}' is a remote path, and only local folders and files are read" in said


@pytest.mark.parametrize("path", [key for key in PATH_KEYS if not key.startswith("tokenizer")])
def test_the_home_folder_is_expanded(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read_config(with_key(path, "~/x y"))
    assert value_of(config, path) == str(tmp_path / "x y")


def test_a_list_of_paths_and_a_folder_of_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read_config(with_key("train_loader.dataset.path", ["~/a", "b"]))
    assert value_of(config, "train_loader.dataset.path") == [str(tmp_path / "a"), "b"]
    with pytest.raises(WeightsError, match=r"^(?!.*~).*is no folder"):
        read_config(BASE | {"load_path": "hf://~/nowhere"})


@pytest.mark.parametrize("path", ["run", "./s3:/x", "a b", "C:/x", "s3:", "~x/y", "/a/~/b", ""])
def test_other_paths_are_local(path):
    if path != "~x/y":  # another user's home folder, if there is such a user
        assert local_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        *(name for name in TrainConfig.model_fields if name not in BASE),
        "tokenizer.kwargs",
        "tokenizer.name",
        "optimizer.lr",
        "scheduler.t_max",
        "algorithms.gradient_clipping",
        "train_loader.dataset.remote",
        "train_loader.dataset.streams",
        "train_loader.dataset.hf_kwargs",
        "train_loader.num_workers",
        "callbacks.generate_callback.kwargs",
        "callbacks.lr_monitor",
        "loggers.wandb",
    ],
)
def test_a_blank_key_is_an_absent_key(path):
    data = with_key(path, None)
    data["train_loader"]["dataset"] = data["train_loader"]["dataset"] | {"path": "text.txt"}
    config = read_config(data)
    if path != "callbacks.generate_callback.kwargs":
        assert config == read_config(BASE)


def test_a_blank_key_that_is_needed_is_missing():
    with pytest.raises(ConfigError, match="max_duration"):
        read_config(BASE | {"max_duration": None})


def test_null_in_the_model_section_keeps_its_meaning():
    model = {"name": "dbrx", "size": "tiny", "attn_config": {"clip_qkv": None}}
    assert read_config(BASE | {"model": model}).model["attn_config"] == {"clip_qkv": None}


def test_the_data_section_of_llm_foundry(tmp_path):
    dataset = {"path": str(Path("text.txt")), "remote": None, "split": "train"}
    config = read_config(BASE | {"train_loader": {"name": "text", "dataset": dataset}})
    assert config.train_loader.dataset.path == "text.txt"


@pytest.mark.parametrize(
    ("path", "value", "instead"),
    [
        ("model.name", "hf_t5", "encoder-decoder models are not here"),
        ("optimizer.name", "clip_lion", "say decoupled_lionw"),
        ("eval_loader.name", "denoising", "only whole documents are read here; say name: text"),
    ],
)
def test_names_of_llm_foundry_are_answered_before_spelling(path, value, instead):
    with pytest.raises(ConfigError) as raised:
        read_config(with_key(path, value))
    said = str(raised.value)
    assert f"{path} is '{value}', a name of LLM Foundry; " in said
    assert instead in said
    assert "did you mean" not in said


@pytest.mark.parametrize("uri", ["s3://me:pass99@b/x", "az://c/x?sig=pass99"])
def test_an_error_repeats_no_secret_of_an_override(tmp_path, uri):
    (tmp_path / "config.yaml").write_text("model: {name: dbrx, size: tiny}\n")
    override = f"train_loader={{name: text, dataset: {{delta: '{uri}'}}}}"
    with pytest.raises(ConfigError, match=r"delta is .*\*\*\*") as caught:
        load_config(tmp_path / "config.yaml", [override])
    assert "pass99" not in str(caught.value)
