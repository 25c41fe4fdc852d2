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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--settings", "amp_bf16", "fp16"], "--settings 'fp16' is none of states; give some of"),
        (["--seeds", "1", "2", "1"], "give each of them once"),
        (["--steps", "0"], "--steps is 0; give 1 or more"),
        (["--device", "cuda:0"], "torch finds no CUDA GPU here; give cpu"),
    ],
)
def test_mistakes_are_refused_before_a_run_starts(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(loss_curves.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loss_curves.subprocess, "Popen", None)
    line = ["loss_curves.py", "states", "out.json", "--device", "cpu", *arguments]
    monkeypatch.setattr(loss_curves.sys, "argv", line)
    with pytest.raises(SystemExit, match="2"):
        loss_curves.main()
    assert sentence in capsys.readouterr().err


def test_a_file_in_no_folder_is_refused_before_the_runs(monkeypatch, capsys, tmp_path):
    line = ["loss_curves.py", "states", str(tmp_path / "no" / "out.json"), "--device", "cpu"]
    monkeypatch.setattr(loss_curves.sys, "argv", line)
    monkeypatch.setattr(loss_curves.subprocess, "Popen", None)
    with pytest.raises(SystemExit, match="2"):
        loss_curves.main()
    assert "does not exist; make it first" in capsys.readouterr().err
