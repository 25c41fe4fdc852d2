"""What can be known before the first step is said before it, by `check` and by `train`."""

import importlib.util
import json
import logging

import pytest

from tokenyard import ConfigError
from tokenyard_train import Callback, train
from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.commands.check import check
from tokenyard_train.config import parse_span
from tokenyard_train.config.scheduler import SchedulerConfig
from tokenyard_train.engine.schedule import check_schedule

LONG = "this prompt is longer than twenty-four bytes"


class Refuser(Callback):
    """A callback that cannot do its work in any run."""

    def check(self, config, model, data):
        assert next(model.parameters()).device.type == "meta"
        raise ConfigError(f"callbacks.refuser needs {data.tokenizer.vocab_size} eyes")


@pytest.mark.parametrize("command", [train, check])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"callbacks": {"generate_callback": {"prompts": ["a", LONG]}}},
            r"callbacks\.generate_callback\.prompts: the prompt has 44 tokens .* 24; shorten",
        ),
        ({"loggers": {"wandb": {}}}, r"loggers\.wandb needs wandb, which is not installed; pip"),
        ({"loggers": {"mlflow": {}}}, r"loggers\.mlflow needs mlflow, which is not installed; pip"),
    ],
)
def test_what_callbacks_and_trackers_cannot_do(
    config, console, tmp_path, monkeypatch, command, changes, sentence
):
    find = importlib.util.find_spec
    gone = ("wandb", "mlflow")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a)
    )
    with pytest.raises(ConfigError, match=sentence):
        command(config(**changes), console)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [train, check])
def test_a_cuda_graph_without_a_gpu(config, console, tmp_path, command):
    with pytest.raises(ConfigError, match="cuda_graph is true, and device is cpu; give auto"):
        command(config(cuda_graph=True), console)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [train, check])
@pytest.mark.parametrize(
    ("path", "sentence"),
    [("nowhere", "'.*nowhere' does not exist"), ("file", "is a file, not a folder; give a check")],
)
def test_a_load_path_that_is_no_folder(config, console, tmp_path, command, path, sentence):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=sentence):
        command(config(load_path=str(tmp_path / path)), console)


@pytest.mark.parametrize("command", [train, check])
def test_a_mixture_has_no_ngram_baselines(config, console, settings, text, tmp_path, command):
    streams = {"a": {"path": str(text / "a.txt")}, "b": {"path": str(text / "b.txt")}}
    loader = {"name": "text", "dataset": {"streams": streams}}
    with pytest.raises(ConfigError, match=r"callbacks\.ngram_baselines counts one text"):
        command(config(train_loader=loader, callbacks={"ngram_baselines": {}}), console)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [train, check])
def test_every_callback_is_asked(config, console, tmp_path, monkeypatch, command):
    target = (
        "tokenyard_train.commands.train" if command is train else "tokenyard_train.commands.check"
    )
    monkeypatch.setattr(f"{target}.build_callbacks", lambda config: [Refuser()])
    with pytest.raises(ConfigError, match="refuser needs 257 eyes"):
        command(config(), console)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "alpha", "warmup", "end", "sentences"),
    [
        ("cosine_with_warmup", 0, 0, 8, []),
        ("cosine_with_warmup", 0, 2, 8, []),
        ("cosine_with_warmup", 0, 0, 4, ["the last 4 have a learning rate of 0"]),
        ("cosine_with_warmup", 0.1, 0, 4, []),
        ("linear_decay_with_warmup", 0, 0, 1, ["the last 7 have"]),
        ("constant_with_warmup", 0, 2, 4, []),
        ("constant_with_warmup", 0, 8, 8, ["never reaches optimizer.lr"]),
        ("cosine_with_warmup", 0, 20, 8, ["never reaches optimizer.lr"]),
        ("cosine_with_warmup", 0, 10**9, 8, ["never reaches optimizer.lr"]),
        ("cosine_with_warmup", 0, 5, 4, ["stays at its peak"]),
        ("cosine_with_warmup", 0.1, 4, 4, ["stays at its peak"]),
    ],
)
def test_schedules_that_make_no_sense(name, alpha, warmup, end, sentences):
    spans = {"t_warmup": f"{warmup}ba", "t_max": f"{end}ba"}
    said = check_schedule(SchedulerConfig(name=name, alpha_f=alpha, **spans), warmup, end, 8)
    assert len(said) == len(sentences)
    for sentence, part in zip(said, sentences):
        assert part in sentence
        assert str(parse_span(spans["t_max" if "last" in part else "t_warmup"])) in sentence


@pytest.mark.parametrize("command", [train, check])
@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"eval_interval": "2ba"}, "eval_interval"),
        ({"eval_first": True}, "eval_first"),
        ({"eval_interval": "2ba", "eval_first": True}, "eval_interval and eval_first"),
        ({"eval_interval": None}, None),
        ({"eval_interval": "2ba", "train_loader": {"name": "python_stdlib"}}, None),
    ],
)
def test_an_evaluation_without_held_out_text_is_a_warning(
    config, console, caplog, command, changes, keys
):
    given = {"eval_interval": None, "eval_loader": None, "max_duration": "1ba"}
    command(config(**given | changes), console)
    if keys is None:
        assert "held-out" not in caplog.text
    else:
        said = f"{keys}: no effect, because there is no held-out text; give eval_loader"
        assert said in caplog.text


@pytest.mark.parametrize("command", [train, check])
def test_a_schedule_that_makes_no_sense_is_a_warning(config, console, caplog, command):
    with caplog.at_level(logging.WARNING, "tokenyard"):
        command(config(scheduler={"t_max": "4ba"}), console)
    assert any("scheduler.t_max is 4ba" in message for message in caplog.messages)


def test_the_first_line_and_check_name_the_tokenizer(config, console, capsys):
    console.quiet = False
    model = {"name": "mixtral", "size": "tiny", "vocab_size": 300}
    check(config(model=model), console)
    assert "tokenizer" in (said := console.export_text())
    assert "bytes, 257 ids, vocabulary of the model 300" in said
    train(config(model=model, max_duration="1ba"), console)
    first = console.export_text().replace("\n", " ")
    assert "tokenizer bytes, 257 ids, vocabulary of the model 300" in " ".join(first.split())


@pytest.mark.parametrize("content", ["{", "[1]", '{"tensorboard": 5}', "[" * 100000, "\x00"])
def test_damaged_identities_of_trackers_are_a_warning(tmp_path, caplog, content):
    from tokenyard_train.records.trackers._build import IDENTITIES, _identities

    (tmp_path / IDENTITIES).write_text(content)
    assert _identities(tmp_path) == {}
    assert "trackers.json is damaged; the run gets new ids" in caplog.text
    (tmp_path / IDENTITIES).write_text(json.dumps({"tensorboard": "x"}))
    assert _identities(tmp_path) == {"tensorboard": "x"}


@pytest.mark.parametrize("command", [train, check])
def test_a_world_size_without_a_launcher_is_explained(config, console, monkeypatch, command):
    settings = config()  # before several processes share its batch
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = (
        r"parallel.strategy is 'single', which is for one rank, and 2 were started; give fsdp "
        r"or ddp, or unset WORLD_SIZE if no launcher set it$"
    )
    with pytest.raises(ConfigError, match=said):
        command(settings, console)
