"""Small whole runs: their output, and that a killed run ends like an undisturbed one."""

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
from safetensors.torch import load_file

from tokenyard import ConfigError
from tokenyard_train import Callback
from tokenyard_train.checkpoint import CheckpointError, read_meta
from tokenyard_train.commands.generate import generate
from tokenyard_train.commands.options import GenerateOptions
from tokenyard_train.commands.train import train
from tokenyard_train.engine import signals as stopping
from tokenyard_train.engine.signals import Stopped
from tokenyard_train.records.metrics import TIMINGS

from ..conftest import MODEL

WHOLE = {
    "eval_interval": "3ba",
    "save_interval": "2ba",
    "save_num_checkpoints_to_keep": 2,
    "callbacks": {
        "ngram_baselines": {},
        "generate_callback": {"prompts": ["1 times"], "max_new_tokens": 9},
    },
}


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """The bits of every tensor; the files' headers have no fixed order."""
    return {
        name: tensor.numpy().tobytes()
        for shard in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }


def test_a_run_leaves_metrics_checkpoints_pictures_and_a_summary(config, console):
    result = train(config(**WHOLE), console)
    found = records(result.folder)
    assert [r["kind"] for r in found] == [
        "baselines",
        *["train"] * 3,
        "eval",
        *["train"] * 3,
        "eval",
    ]
    assert [r["batch"] for r in found if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["bits_per_byte"] == result.bits_per_byte < found[4]["bits_per_byte"]
    assert len(found[1]["load"]) == 2
    assert sorted(p.name for p in result.folder.iterdir()) == [
        "ba4",
        "ba6",
        "experts.png",
        "loss.png",
        "metrics.jsonl",
    ]
    assert all(
        (result.folder / name).read_bytes()[:4] == b"\x89PNG"
        for name in ("loss.png", "experts.png")
    )


def test_what_a_run_prints(config, capsys):
    train(config(**WHOLE), Console(width=140))
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
    lines = [
        json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()
    ]
    per_token = {
        round(r["flops_per_s"] * 96 / (r["tokens_per_s"] * 96))
        for r in lines
        if r["kind"] == "train"
    }
    assert max(per_token) - min(per_token) < 0.01 * max(per_token)


def test_a_dense_model_trains_too(config, console):
    model = {"name": "mpt_causal_lm", "size": "tiny", "d_model": 16}
    assert train(config(model=model), console).bits_per_byte > 0


def test_a_folder_that_holds_a_run_is_not_overwritten_unless_asked(config, console):
    first = train(config(), console)
    with pytest.raises(
        ConfigError,
        match="holds a run already; set autoresume: true to go on with it, save_overwrite",
    ):
        train(config(), console)
    assert train(config(save_overwrite=True), console).train_loss == first.train_loss
    assert len(records(first.folder)) == 7


def test_a_finished_run_resumed_changes_nothing(config, console):
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
def test_mistakes_end_before_anything_is_written(config, console, tmp_path, changes, sentence):
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

    first, again, other = (text(1.0, seed) for seed in (1, 1, 2))
    assert first == again != other
    greedy = {text(0.0, seed) for seed in (1, 2)}
    assert len(greedy) == 1


def test_generation_needs_a_run_and_room(config, console, tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint; give the folder of a run"):
        generate(GenerateOptions(tmp_path / "nothing", ["x"]))
    folder = train(config(), console).folder
    with pytest.raises(
        ConfigError, match="the prompt has 24 tokens and the model's max_seq_len is 24"
    ):
        generate(GenerateOptions(folder, ["x" * 24]))


class TestKilled:
    """SIGKILL at a random step, then autoresume, ends like an undisturbed run."""

    BATCHES = 14

    def start(self, path: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "tokenyard_train", "train", str(path)]
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )

    def config(self, settings: dict, tmp_path: Path, name: str) -> Path:
        jitter = MODEL | {
            "ffn_config": MODEL["ffn_config"]
            | {"moe_jitter_eps": 0.05, "moe_bias_update_rate": 0.01}
        }
        changes = {
            "model": jitter,
            "max_duration": f"{self.BATCHES}ba",
            "save_interval": "3ba",
            "autoresume": True,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump(settings | WHOLE | changes | {"save_folder": str(tmp_path / name)})
        )
        return path

    def test_ends_bit_identical_to_an_undisturbed_run(self, settings, tmp_path):
        undisturbed = self.start(self.config(settings, tmp_path, "undisturbed"))
        assert undisturbed.wait(timeout=120) == 0
        path = self.config(settings, tmp_path, "killed")
        metrics = tmp_path / "killed" / "metrics.jsonl"
        at = random.randrange(
            2, self.BATCHES + 2
        )  # lines, the baselines' and evaluations' included
        process = self.start(path)
        while process.poll() is None and (
            not metrics.exists() or metrics.read_text().count("\n") < at
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        with metrics.open("a") as file:
            file.write('{"kind": "tra')  # a line cut short by the kill
        assert self.start(path).wait(timeout=120) == 0
        assert records(tmp_path / "killed") == records(tmp_path / "undisturbed")
        ends = [tmp_path / name / f"ba{self.BATCHES}" for name in ("killed", "undisturbed")]
        assert tensors(ends[0]) == tensors(ends[1])
        assert read_meta(ends[0])["optimizer_steps"] == read_meta(ends[1])["optimizer_steps"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_a_run_after_the_step_with_what_it_has_done_saved(config, console, number):
    """A launcher may pass on what the rank got itself; that is one request."""

    class Ask(Callback):
        def batch_end(self, run, record):
            if run.batch == 2:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="after batch 3 of 6, which is saved"):
        train(config(), console, [Ask()])
    assert signal.getsignal(number) == before


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(config, console):
    """As ``nohup`` does for SIGHUP."""

    class Ask(Callback):
        def batch_end(self, run, record):
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(config(), console, [Ask()]).batches == 6
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_request_ends_a_run_at_once(config, console, monkeypatch):
    ended = []
    monkeypatch.setattr(stopping, "_SAME_REQUEST", 0.005)
    monkeypatch.setattr(stopping.signal, "raise_signal", ended.append)

    class Ask(Callback):
        def batch_end(self, run, record):
            if run.batch == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(config(), console, [Ask()])
    assert ended == [signal.SIGTERM]


def test_a_run_is_called_trained_only_when_its_last_checkpoint_verifies(config, capsys):
    class Spoil(Callback):
        def saved(self, run, checkpoint):
            shard = next(checkpoint.glob("*.safetensors"))
            shard.write_bytes(shard.read_bytes()[:-1] + b"?")

    with pytest.raises(CheckpointError, match="was changed since it was saved"):
        train(config(), Console(width=140), [Spoil()])
    assert "trained for" not in capsys.readouterr().out


def test_equal_runs_are_asked_of_torch_only_while_training(config, console):
    """`deterministic_mode` is Composer's name for it."""

    class Look(Callback):
        def batch_end(self, run, record):
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

    train(config(deterministic_mode=True), console, [Look()])
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_cannot_be_repeated_is_refused_by_name(config, console, monkeypatch):
    """kthvalue's gradient uses atomics on a GPU. On a CPU the test raises torch's error itself."""

    class Atomics(Callback):
        def batch_end(self, run, record):
            raise RuntimeError(
                "kthvalue CUDA does not have a deterministic implementation, but you set "
                "'torch.use_deterministic_algorithms(True)'."
            )

    with pytest.raises(
        ConfigError,
        match="no deterministic implementation of kthvalue CUDA here; change what uses it",
    ):
        train(config(deterministic=True), console, [Atomics()])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(
        ConfigError, match="CUBLAS_WORKSPACE_CONFIG is ':0:0'; unset it, or give :4096:8"
    ):
        train(config(deterministic=True), console)
