"""`tokenyard bench train`, as a user runs it."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from tokenyard import ConfigError
from tokenyard_cli import app


@pytest.fixture
def bench(tmp_path):
    """Run a subcommand; return its output folder and what it printed."""

    def call(*arguments, out=tmp_path / "out"):
        result = CliRunner().invoke(app, ["bench", *map(str, arguments), "--out", str(out)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return out, result.output

    return call


@pytest.fixture
def config(settings, tmp_path):
    """A small config file. Like Mixtral, its model has rotary swiglu experts in every layer."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_train_shows_where_a_step_goes(bench, config, settings, tmp_path):
    out, printed = bench("train", config, "--steps", 3)
    (record,) = json.loads((out / "train.json").read_text())["records"]
    assert list(record["shares"]) == ["data", "forward", "backward", "optimizer", "rest"]
    assert sum(record["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert record["tokens_per_s"] == pytest.approx(
        1e3 * 4 * 24 / record["step_ms"]["median"], rel=1e-3
    )
    assert "where our step's time goes" in printed
    kinds = record["kinds"]
    assert {"matmuls", "attention", "elementwise", "routing", "copies", "optimizer", "host"} == {
        *kinds
    }
    assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1, abs=2e-3)
    assert all(kind["ms"] > 0 for kind in kinds.values())
    assert record["host_ms"] == kinds["host"]["ms"]
    assert "kind of work" in printed
    assert not (tmp_path / "run").exists()  # nothing is kept


def test_train_beside_transformers_has_the_same_size_and_learns_alike(bench, config):
    pytest.importorskip("transformers")
    out, _ = bench("train", config, "--steps", 3, "--peers", "both", "--peer-dtype", "bf16")
    records = json.loads((out / "train.json").read_text())["records"]
    assert [r["contestant"] for r in records] == [
        "tokenyard",
        "transformers-eager",
        "transformers-grouped_mm",
    ]
    assert len({r["parameters"] for r in records}) == 1
    assert [r["weights"] for r in records] == ["float32", "bfloat16", "bfloat16"]
    for record in records:
        assert 3 < record["loss"] < 7  # nats per token of 257 ids, after a few steps


def test_train_beside_a_variant_of_the_config(bench, config):
    """Both train on the same batches, and the variant has its own sizes."""
    variant = "model.ffn_config.ffn_hidden_size=32"
    out, _ = bench("train", config, "--steps", 3, "--variant", variant, "--variant", "seed=18")
    ours, wider, other = json.loads((out / "train.json").read_text())["records"]
    assert [r["contestant"] for r in (ours, wider, other)] == ["tokenyard", variant, "seed=18"]
    assert ours["parameters"] == other["parameters"] < wider["parameters"]
    assert len({ours["loss"], wider["loss"], other["loss"]}) == 3
    flops = [r["flops_per_s"] / r["tokens_per_s"] for r in (ours, wider, other)]
    assert flops[1] > 1.1 * flops[0]
    assert flops[0] == pytest.approx(flops[2], rel=1e-3)


@pytest.mark.parametrize(
    ("variants", "error"),
    [
        (["deterministic=true"], "changes deterministic, which all models of a benchmark share"),
        (["seed=18", "seed=18"], "--variant seed=18 is given twice"),
    ],
)
def test_train_refuses_a_variant_without_effect(bench, config, variants, error):
    arguments = [part for variant in variants for part in ("--variant", variant)]
    with pytest.raises(ConfigError, match=error):
        bench("train", config, *arguments)


def test_train_refuses_a_peer_that_does_not_exist(bench, config):
    with pytest.raises(
        ConfigError, match=r"--peers 'mixtral' is unknown; known are: transformers-eager"
    ):
        bench("train", config, "--peers", "mixtral")


def test_peers_of_a_run_with_lora_have_the_same_adapters(bench, settings, tmp_path):
    pytest.importorskip("peft")
    path = tmp_path / "lora.yaml"
    model = {"name": "mixtral", "size": "tiny", "hidden_size": 32, "intermediate_size": 24}
    path.write_text(yaml.safe_dump(settings | {"model": model, "lora": {"rank": 4}}))
    arguments = ["--steps", 3, "--peers", "transformers-grouped_mm", "--apart"]
    out, _ = bench("train", path, *arguments, "activation_checkpointing=true")
    ours, theirs = json.loads((out / "train.json").read_text())["records"]
    assert theirs["parameters"] == ours["parameters"]
    assert 0 < theirs["trained"] == ours["trained"] < ours["parameters"] / 2
    assert 4 < theirs["loss"] < 7


def test_train_refuses_a_peer_of_adapters_that_peft_does_not_have(bench, config):
    with pytest.raises(ConfigError, match=r"lora needs a model\.name such as mixtral"):
        bench("train", config, "--peers", "transformers-eager", "lora={rank: 4}")
