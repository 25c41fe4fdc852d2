"""Small whole runs: files, output, signals, and a killed run that resumes to the same end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tokenyard import ConfigError
from tokenyard_train import Callback
from tokenyard_train.checkpoint import CheckpointError, read_meta
from tokenyard_train.commands.generate import generate
from tokenyard_train.commands.options import GenerateOptions
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config
from tokenyard_train.engine import signals as stopping
from tokenyard_train.engine.signals import Stopped

from ..conftest import MODEL
from ..run_files import records, tensors

WHOLE = {
    "eval_interval": "3ba",
    "save_interval": "2ba",
    "save_num_checkpoints_to_keep": 2,
    "callbacks": {
        "ngram_baselines": {},
        "generate_callback": {"prompts": ["1 times"], "max_new_tokens": 9},
    },
}


def test_a_run_writes_metrics_checkpoints_pictures_and_a_summary(config, capsys, drawn):
    result = train(config(**WHOLE), Console(width=140))
    lines = records(result.folder)
    half = ["train"] * 3 + ["eval"]
    assert [r["kind"] for r in lines] == ["baselines", *half, *half]
    assert [r["batch"] for r in lines if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["bits_per_byte"] == result.bits_per_byte < lines[4]["bits_per_byte"]
    assert len(lines[1]["load"]) == 2
    pictures = ["experts.png", "loss.png"]
    names = sorted(path.name for path in result.folder.iterdir())
    assert names == ["ba4", "ba6", *pictures, "metrics.jsonl"]
    for name in pictures:
        assert (result.folder / name).read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    for part in (
        "dbrx: ",
        "backends: router torch",
        "held-out loss",
        "unigram model",
        "bigram model",
        "1 times",
        "batch 6/6",
    ):
        assert part in printed


def test_tokens_per_second_and_flops_agree(config, console):
    result = train(config(), console)
    text = (result.folder / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    # From seconds: a slow machine's few tokens per second are rounded. Seconds have four decimals,
    # so each step bounds the FLOPs of a token.
    steps = [(r["flops_per_s"] / 96, r["seconds"]) for r in lines if r["kind"] == "train"]
    least = max(flops * (seconds - 0.00006) for flops, seconds in steps)
    assert least <= min(flops * (seconds + 0.00006) for flops, seconds in steps)


def test_a_dense_model_trains_too(config, console):
    model = {"name": "mpt_causal_lm", "size": "tiny", "d_model": 16}
    assert train(config(model=model), console).bits_per_byte > 0


def test_save_overwrite_is_needed_to_replace_a_run(config, console):
    first = train(config(), console)
    sentence = "holds a run already; set autoresume: true to resume it, save_overwrite"
    with pytest.raises(ConfigError, match=sentence):
        train(config(), console)
    assert train(config(save_overwrite=True), console).train_loss == first.train_loss
    assert len(records(first.folder)) == 7


def test_resuming_a_finished_run_changes_nothing(config, console):
    first = train(config(**WHOLE), console)
    before = records(first.folder)
    assert train(config(**WHOLE, autoresume=True), console).bits_per_byte == first.bits_per_byte
    assert records(first.folder) == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_duration": "5tok", "global_train_batch_size": 4}, None),
        (
            {"max_duration": "0.001ep"},
            "max_duration is 0.001ep, which is less than one batch of 96 tokens",
        ),
        (
            {"model": {"name": "dbrxx"}},
            r"model backend 'dbrxx' is unknown \(did you mean 'dbrx'\?\)",
        ),
        ({"backends": {"experts": "tritn"}}, "experts backend 'tritn' is unknown"),
        (
            {"parallel": {"strategy": "fsd"}},
            "strategy backend 'fsd' is unknown .did you mean 'fsdp'",
        ),
        (
            {"parallel": {"expert_parallel": 2}},
            "'single' keeps all experts in one process, and expert_parallel is 2",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    config, console, tmp_path, changes, sentence
):
    if sentence is None:
        assert train(config(**changes), console).batches == 1
        return
    with pytest.raises(Exception, match=sentence):
        train(config(**changes), console)
    assert not (tmp_path / "run").exists()


def test_generation_from_a_run_is_repeatable_by_seed(config, console):
    folder = train(config(), console).folder

    def text(temperature, seed):
        options = GenerateOptions(folder, ["2 times"], 12, temperature, seed)
        return generate(options)[0]

    assert text(1.0, 1) == text(1.0, 1) != text(1.0, 2)
    greedy = {text(0.0, seed) for seed in (1, 2)}
    assert len(greedy) == 1


def test_generation_needs_a_run_and_a_short_prompt(config, console, tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint; give the folder of a run"):
        generate(GenerateOptions(tmp_path / "nothing", ["x"]))
    folder = train(config(), console).folder
    sentence = "the prompt has 24 tokens and the model's max_seq_len is 24"
    with pytest.raises(ConfigError, match=sentence):
        generate(GenerateOptions(folder, ["x" * 24]))


def killed_run(settings: dict, folder: Path, lines: int) -> None:
    """Train in a subprocess; send SIGKILL once the metrics file has so many lines."""
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings | {"save_folder": str(folder)}))
    metrics = folder / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenyard_train", "train", str(config)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= lines:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    with metrics.open("a") as file:
        file.write('{"kind": "tra')  # a line that the kill cut short


def test_a_killed_run_resumes_to_the_same_end(settings, console, tmp_path, one_thread):
    """Weights, optimizer state and metrics are bit-identical to those of a run without the kill."""
    batches = 14
    routing = {"moe_jitter_eps": 0.05, "moe_bias_update_rate": 0.01}
    settings |= WHOLE | {
        "model": MODEL | {"ffn_config": MODEL["ffn_config"] | routing},
        "max_duration": f"{batches}ba",
        "save_interval": "3ba",
        "autoresume": True,
    }
    killed = tmp_path / "killed"
    whole = tmp_path / "whole"
    # Any step: the file also has the lines of the baselines and of evaluations.
    killed_run(settings, killed, lines=random.randrange(2, batches + 2))
    for folder in (killed, whole):
        train(read_config(settings | {"save_folder": str(folder)}), console)
    assert records(killed) == records(whole)
    ends = [folder / f"ba{batches}" for folder in (killed, whole)]
    assert tensors(ends[0]) == tensors(ends[1])
    assert read_meta(ends[0])["optimizer_steps"] == read_meta(ends[1])["optimizer_steps"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_a_run_after_the_step_and_saves(config, console, number):
    """A launcher may forward a signal that the rank also received. Both are one request."""

    class SendTwice(Callback):
        def batch_end(self, run, record):
            if run.batch == 2:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="after batch 3 of 6, which is saved"):
        train(config(), console, [SendTwice()])
    assert signal.getsignal(number) == before


def test_an_ignored_signal_stays_ignored(config, console):
    """``nohup`` ignores SIGHUP for its command."""

    class Send(Callback):
        def batch_end(self, run, record):
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(config(), console, [Send()]).batches == 6
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_request_ends_a_run_at_once(config, console, monkeypatch):
    ended = []
    monkeypatch.setattr(stopping, "_SAME_REQUEST", 0.005)
    monkeypatch.setattr(stopping.signal, "raise_signal", ended.append)

    class SendTwice(Callback):
        def batch_end(self, run, record):
            if run.batch == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(config(), console, [SendTwice()])
    assert ended == [signal.SIGTERM]


def test_the_summary_is_printed_only_if_the_last_checkpoint_verifies(config, capsys):
    class Corrupt(Callback):
        def saved(self, run, checkpoint):
            shard = next(checkpoint.glob("*.safetensors"))
            shard.write_bytes(shard.read_bytes()[:-1] + b"?")

    with pytest.raises(CheckpointError, match="was changed since it was saved"):
        train(config(), Console(width=140), [Corrupt()])
    assert "trained for" not in capsys.readouterr().out


def test_deterministic_algorithms_are_on_only_while_training(config, console):
    """`deterministic_mode` is Composer's name of `deterministic`."""

    class Check(Callback):
        def batch_end(self, run, record):
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

    train(config(deterministic_mode=True), console, [Check()])
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_nondeterministic_operator_is_named(config, console, monkeypatch):
    """On a GPU the gradient of kthvalue uses atomics. Here a callback raises torch's error."""

    class Atomics(Callback):
        def batch_end(self, run, record):
            raise RuntimeError(
                "kthvalue CUDA does not have a deterministic implementation, but you set "
                "'torch.use_deterministic_algorithms(True)'."
            )

    sentence = "no deterministic implementation of kthvalue CUDA here; change what uses it"
    with pytest.raises(ConfigError, match=sentence):
        train(config(deterministic=True), console, [Atomics()])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    sentence = "CUBLAS_WORKSPACE_CONFIG is ':0:0'; unset it, or give :4096:8"
    with pytest.raises(ConfigError, match=sentence):
        train(config(deterministic=True), console)


@pytest.mark.parametrize("folder", [".", "run"])
def test_a_run_is_not_written_among_its_text(config, text, folder):
    """A resume would read its metrics as text."""
    with pytest.raises(ConfigError, match=r"is in the folder \w+_loader.dataset.path '.*text'"):
        train(config(save_folder=str(text / folder)), Console(quiet=True))
    assert not (text / folder / "metrics.jsonl").exists()
