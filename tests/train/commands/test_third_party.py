"""The commands work with a model and a routing algorithm of a third-party distribution.

tests/core/test_example_plugin.py imports the same distribution in other processes.
"""

import json
from pathlib import Path

import pytest
import yaml

from tokenyard import default_registry


@pytest.fixture
def installed(example_plugin, monkeypatch):
    """Make the example plugin visible in this process, to a new registry."""
    monkeypatch.syspath_prepend(example_plugin["PYTHONPATH"])
    default_registry.cache_clear()
    yield
    default_registry.cache_clear()


@pytest.fixture
def written(settings, tmp_path):
    """Write a config for a `model:` section; return its path."""

    def write(model: dict, **changes) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings | {"model": model} | changes))
        return str(path)

    return write


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


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_checks_trains_resumes_and_generates(tokenyard, written, tmp_path, model):
    run = tmp_path / "run"
    config = written(model, max_duration="6ba", save_interval="3ba", autoresume=True)
    code, output, errors = tokenyard("check", config)
    assert (code, errors) == (0, "")
    if "acme_choice" in str(model):
        assert "acme_choice" in output
    for duration in ("3ba", "6ba"):
        code, output, errors = tokenyard("train", config, f"max_duration={duration}")
        assert (code, errors) == (0, "")
    assert "resumed after batch 3" in output
    assert len(losses(run)) == 6
    assert losses(run)[-1] < losses(run)[0]
    options = ("--prompt", "1 times", "--max-new-tokens", "5")
    code, output, errors = tokenyard("generate", str(run), *options)
    assert (code, errors) == (0, "")
    assert output.startswith("1 times")


def test_an_algorithm_that_is_not_installed_is_named(tokenyard, written):
    code, _, errors = tokenyard("check", written(MODELS["our model with its routing"]))
    assert code == 2
    assert "routing algorithm 'acme_choice' is unknown" in errors
    assert "installed: expert_choice, sinkhorn, token_rounding, topk" in errors


@pytest.mark.usefixtures("installed")
def test_a_misspelt_option_of_an_algorithm_is_one_sentence(tokenyard, written):
    config = written(MODELS["our model with its routing"])
    option = "model.ffn_config.moe_router_options.factr=2.0"
    code, _, errors = tokenyard("check", config, option)
    assert (code, errors) == (
        2,
        "error: 'factr' is not an option of the routing algorithm 'acme_choice' "
        "(did you mean 'factor'?); known are: factor\n",
    )


@pytest.mark.usefixtures("installed")
def test_a_misspelt_algorithm_is_one_sentence(tokenyard, written):
    config = written(MODELS["our model with its routing"])
    code, _, errors = tokenyard(
        "check", config, "model.ffn_config.moe_router_algorithm=acme_choise"
    )
    assert (code, errors) == (
        2,
        "error: routing algorithm 'acme_choise' is unknown (did you mean 'acme_choice'?); "
        "installed: acme_choice, expert_choice, sinkhorn, token_rounding, topk\n",
    )


@pytest.mark.usefixtures("installed")
def test_only_our_models_are_converted(tokenyard, written, tmp_path):
    config = written(MODELS["its model"], max_duration="1ba")
    assert tokenyard("train", config)[0] == 0
    code, _, errors = tokenyard("convert", str(tmp_path / "run"), str(tmp_path / "hf"))
    assert code == 2
    assert "AcmeModel has no Hugging Face form" in errors
    assert not (tmp_path / "hf").exists()
