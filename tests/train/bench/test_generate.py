"""`tokenyard bench generate`, as a user runs it."""

import json
import time

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tokenyard import ConfigError, TokenyardError
from tokenyard_cli import app
from tokenyard_train.bench import generate, generate_peer
from tokenyard_train.commands.load_model import load_trained


@pytest.fixture
def bench(settings, tmp_path):
    """Run the command on a small config; return its records and what it printed."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))

    def call(*options):
        sizes = ["--prompt-tokens", 4, "--new-tokens", 16, "--batch", 1, "--batch", 2]
        arguments = ["generate", config, *sizes, "--out", tmp_path / "out", *options]
        result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "out" / "generate.json").read_text())[
            "records"
        ], result.output

    return call


def test_each_entrant_generates_for_each_number_of_prompts(bench):
    pytest.importorskip("transformers")
    names = "transformers-eager,transformers-tokenyard,transformers-eager"  # one is named twice
    records, printed = bench("--batch", 2, "--peers", names)
    assert [(record["contestant"], record["batch"]) for record in records] == [
        ("tokenyard", 1),
        ("tokenyard", 2),
        ("transformers-eager", 1),
        ("transformers-eager", 2),
        ("transformers-tokenyard", 1),
        ("transformers-tokenyard", 2),
    ]
    for record in records:
        of_request = 1e3 * record["batch"] * 16 / record["request_ms"]
        assert record["tokens_per_s"] == pytest.approx(of_request, rel=0.02)
    assert "ms a token" in printed


def test_the_measured_weights_have_the_dtypes_of_a_run_that_is_loaded(config, trained):
    """With amp_bf16, those of experts are converted once, and not for each token."""
    loaded = load_trained(trained, "cpu").model
    measured = generate._model(config(precision="amp_bf16", device="cpu"))
    ours, those = (
        {name: parameter.dtype for name, parameter in model.named_parameters()}
        for model in (measured, loaded)
    )
    assert ours == those


def test_a_peer_that_fails_or_takes_too_long_has_the_reason_in_its_row(bench, monkeypatch):
    def build(config, meta, name):
        def run(prompts, new_tokens):
            if len(prompts) == 1:
                raise ValueError("no kernel [/for] this\nand its stack")
            time.sleep(60)

        return run

    monkeypatch.setattr(generate_peer, "_peer", build)
    records, printed = bench("--peers", "transformers-eager", "--peer-limit", 1)
    assert [record.get("error") for record in records] == [
        None,
        None,
        "ValueError: no kernel [/for] this",
        "took more than 1 s",
    ]
    assert "transformers-eager, prompts 1: ValueError: no kernel [/for] this" in printed
    assert "transformers-eager, prompts 2: took more than 1 s" in printed


def test_a_peer_that_cannot_be_built_has_the_reason_in_each_row(bench, monkeypatch):
    def build(config, meta, name):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(generate_peer, "_peer", build)
    records, _ = bench("--peers", "transformers-eager")
    errors = [record.get("error") for record in records]
    assert errors == [None, None, *["OutOfMemoryError: no memory"] * 2]


def test_a_run_that_is_stopped_leaves_the_records_that_it_measured(bench, monkeypatch, tmp_path):
    def build(config, meta, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_peer, "_peer", build)
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        bench("--peers", "transformers-eager")
    records = json.loads((tmp_path / "out" / "generate.json").read_text())["records"]
    assert [(record["contestant"], record["batch"]) for record in records] == [
        ("tokenyard", 1),
        ("tokenyard", 2),
    ]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--peers", "vllm"], "--peers.*vllm"),
        (
            ["device=cpu", "--peers", "transformers-eager-compiled"],
            "compiles generation on a GPU only; on cpu give transformers-eager",
        ),
        (
            ["lora.rank=2", "--peers", "transformers-eager"],
            "--peers of bench generate have no adapters; give lora=null",
        ),
        (
            ["model.ffn_config.uniform_expert_assignment=true", "--peers", "transformers-eager"],
            "uniform_expert_assignment is True, and --peers always route by their router; set",
        ),
        (["--new-tokens", 90], "--new-tokens 90 are 94 tokens, and max_seq_len is 24; give fewer"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, options, error):
    with pytest.raises(ConfigError, match=error):
        bench(*options)


@pytest.mark.parametrize("command", ["generate", "train"])
def test_a_folder_that_cannot_be_made_is_refused_before_a_model_is_built(
    settings, tmp_path, command, monkeypatch
):
    monkeypatch.setattr(f"tokenyard_train.bench.commands.bench_{command}", None)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    result = CliRunner().invoke(app, ["bench", command, str(config), "--out", str(out)])
    assert isinstance(result.exception, TokenyardError)
    assert f"--out {str(out)!r} cannot be written: Not a directory" in str(result.exception)
