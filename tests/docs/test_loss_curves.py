"""The settings whose loss is compared are what a user's config can say."""

import loss_curves
import pytest

from tokenyard_train.config import load_config


@pytest.mark.parametrize("name", loss_curves.SETS)
def test_settings_of_a_set_are_different_configs(name):
    settings = loss_curves.SETS[name]
    configs = {
        setting: load_config(loss_curves.CONFIG, [*loss_curves.SIZE, *overrides])
        for setting, overrides in settings.items()
    }
    assert all(not any(vars(config.callbacks).values()) for config in configs.values())
    dumps = {config.model_dump_json() for config in configs.values()}
    assert len(dumps) == len(settings)
