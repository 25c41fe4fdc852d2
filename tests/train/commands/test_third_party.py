"""The commands work with a model and a routing algorithm of a third-party distribution."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def written(settings, tmp_path):
    """Write a config for a `model:` section; return its path."""

    def write(model: dict, **changes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings | {"model": model} | changes))
        return path

    return write


def tokenyard(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenyard_train", *arguments]
    return subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


MODELS = {
    "its model": {"name": "acme", "dim": 32, "ffn_dim": 32},
    "its model with its routing": {
        "name": "acme",
        "dim": 32,
        "ffn_dim": 32,
        "routing": "acme_choice",
    },
    "our model with its routing": {
        "name": "dbrx",
        "size": "tiny",
        "d_model": 16,
        "ffn_config": {
            "ffn_hidden_size": 16,
            "moe_router_algorithm": "acme_choice",
            "moe_router_options": {"factor": 1.5},
        },
    },
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_checks_trains_resumes_and_generates(example_plugin, written, tmp_path, model):
    run = tmp_path / "run"
    config = str(written(model, max_duration="6ba", save_interval="3ba", autoresume=True))
    checked = tokenyard(example_plugin, "check", config)
    assert checked.returncode == 0, checked.stderr
    if "acme_choice" in str(model):
        assert "acme_choice" in checked.stdout
    for duration in ("3ba", "6ba"):
        trained = tokenyard(example_plugin, "train", config, f"max_duration={duration}")
        assert trained.returncode == 0, trained.stderr
    assert "resumed after batch 3" in trained.stdout
    assert len(losses(run)) == 6
    assert losses(run)[-1] < losses(run)[0]
    options = ("--prompt", "1 times", "--max-new-tokens", "5")
    generated = tokenyard(example_plugin, "generate", str(run), *options)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("1 times")


def test_the_algorithm_is_named_where_it_is_not_installed(written):
    import os

    model = MODELS["our model with its routing"]
    refused = tokenyard(dict(os.environ), "check", str(written(model)))
    assert refused.returncode == 2
    assert "'acme_choice'" in refused.stderr


def test_only_our_models_are_converted(example_plugin, written, tmp_path):
    config = str(written(MODELS["its model"], max_duration="1ba"))
    assert tokenyard(example_plugin, "train", config).returncode == 0
    refused = tokenyard(example_plugin, "convert", str(tmp_path / "run"), str(tmp_path / "hf"))
    assert refused.returncode == 2, refused.stderr
    assert "AcmeModel has no Hugging Face form" in refused.stderr
    assert not (tmp_path / "hf").exists()
