"""A key of another program is answered with the key here."""

import re

import pytest

from tokenyard import ConfigError
from tokenyard_models.config_errors import sections
from tokenyard_models.families._definition import _SYNONYMS
from tokenyard_train.config import read_config
from tokenyard_train.config.habits import HABITS
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.build_model import build_model

SIZES = {
    "dbrx": {"d_model": 64, "n_layers": 1},
    "mpt_causal_lm": {"d_model": 64},
    "mixtral": {"hidden_size": 64},
    "olmoe": {"hidden_size": 64},
    "qwen3_moe": {"hidden_size": 64},
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 1e-3}, "learning_rate is not a known key; write optimizer.lr"),
        ({"lr": 1e-3}, "lr is not a known key; write optimizer.lr"),
        ({"optimizer": {"learning_rate": 1e-3}}, "learning_rate is not .*; write optimizer.lr"),
        ({"epochs": 3}, "epochs is not a known key; write max_duration: 3ep for 3 epochs"),
        (
            {"batch_size": 8},
            "write global_train_batch_size, the sequences of a step ",
        ),
        ({"num_experts": 8}, "num_experts is not a known key; write it below model"),
        ({"lora": {"r": 8}}, "lora.r is not a known key; write lora.rank"),
        ({"lora": {"target_modules": ["q_proj"]}}, "write lora.targets: all-linear, or patterns"),
        ({"max_duraton": 3}, r"^max_duraton is not a known key \(did you mean 'max_duration'\?\)$"),
    ],
)
def test_the_error_names_the_key_here(settings, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_config(settings | changes)


def test_every_habit_is_unknown_and_names_keys_that_exist():
    """The words of an answer that look like keys are keys."""
    for name, answer in HABITS.items():
        path = re.match(r"[a-z_]+(\.[a-z_]+)*", answer)[0]
        assert name not in TrainConfig.model_fields
        if path != "it":
            read_key(path.split("."))


def read_key(path, section=TrainConfig):
    """Raise KeyError unless the keys of a path exist. Keys of a model and a loader depend on it."""
    field = section.model_fields[path[0]]
    if path[1:] and path[0] not in ("model", "train_loader"):
        read_key(path[1:], next(sections(field.annotation)))


@pytest.mark.parametrize("name", SIZES)
def test_a_model_names_its_own_key(config, name):
    """For each synonym that a family does not declare, the error has the key of that family."""
    model = {"name": name, "size": "tiny", **SIZES[name]}
    schema = type(build_model(config(model=model))[1]).schema
    answers = schema.habits("model")
    unknown = [word for names in _SYNONYMS for word in names if word not in schema.model_fields]
    assert set(unknown) <= answers.keys()
    for word in ("num_experts", "n_routed_experts", "moe_top_k", "n_embd", "num_layers"):
        if word not in schema.model_fields:
            with pytest.raises(
                ConfigError, match=rf"^model.{word} is not a known key; write model\."
            ):
                build_model(config(model=model | {word: 2}))
