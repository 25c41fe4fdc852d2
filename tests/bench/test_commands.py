"""The subcommands of `tokenyard bench`, as a user runs them."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tokenyard import ConfigError, TokenyardError
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


def test_layer_writes_a_table_json_and_a_plot(bench):
    out, printed = bench(
        "layer", "--shape", "64,16,24,4,2", "--dtype", "fp32", "--peers", "none", "--repetitions", 3
    )
    assert "T 64, D 16, F 24, E 4, K 2; fp32, natural routing" in printed
    content = json.loads((out / "layer.json").read_text())
    assert {r["contestant"] for r in content["records"]} == {"dense", "cpu", "torch"}
    assert content["machine"]["versions"]["torch"]
    assert (out / "layer.png").read_bytes().startswith(b"\x89PNG")


def test_layer_says_what_it_does(bench):
    shape = ("--shape", "64,16,24,4,2", "--dtype", "fp32", "--repetitions", 6)
    _, printed = bench("layer", *shape, "--backends", "cpu", "--peers", "none")
    lines = printed.splitlines()
    assert lines[:2] == ["64,16,24,4,2, fp32, natural routing", "  checking cpu ..."]
    rounds = [f"  timing 2 calls in turns, round {i} of 8 (2 to warm up) ..." for i in (1, 3, 5, 7)]
    assert lines[2:6] == rounds


@pytest.mark.parametrize("command", ["layer", "kernels", "routing"])
def test_a_folder_that_cannot_be_made_is_refused_before_a_measurement(
    bench, tmp_path, command, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("tokenyard_bench.sweep.make_case", None)
    with pytest.raises(TokenyardError, match="file/out' cannot be written: Not a directory"):
        bench(command, "--shape", "64,16,24,4,2", out=tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_busy_machine_is_a_warning(bench, monkeypatch, caplog):
    shape = ("--shape", "64,16,24,4,2", "--dtype", "fp32", "--repetitions", 3)
    for load, warnings in ((1e9, 1), (0.0, 0)):
        caplog.clear()
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        bench("routing", *shape, "--backends", "torch", "--device", "cpu")
        assert len([r for r in caplog.records if "load of this machine" in r.message]) == warnings


def test_kernels_prints_every_piece_and_what_the_profiler_saw(bench):
    out, printed = bench(
        "kernels",
        "--shape",
        "64,16,24,4,2",
        "--dtype",
        "fp32",
        "--backends",
        "cpu",
        "--repetitions",
        3,
    )
    records = json.loads((out / "kernels.json").read_text())["records"]
    pieces = {r["piece"]: r for r in records if "piece" in r}
    assert list(pieces)[:6] == ["router", "plan", "permute", "up", "activation", "down"]
    assert {n for n, r in pieces.items() if r["best"] == "dense matmul"} == {
        "up", "down", "d activation", "d down", "d input", "d up",
    }  # fmt: skip
    (layer,) = [r for r in records if "layer" in r]
    assert any("mm" in kernel["name"] for kernel in layer["kernels"])
    assert "gaps" in printed


def test_routing_prints_every_work_beside_a_copy(bench):
    options = ("--dtype", "fp32", "--repetitions", 3, "--backends", "torch,cuda")
    out, printed = bench("routing", "--shape", "64,16,24,4,2", *options)
    records = json.loads((out / "routing.json").read_text())["records"]
    timed = {r["work"]: r for r in records if r["note"] is None}
    moves = ["permute", "permute backward", "unpermute", "unpermute backward"]
    assert list(timed) == ["plan", *moves, "router", "router backward", "choose", "choose backward"]
    assert timed["permute"]["bytes"] == 4 * (64 * 16 + 64 * 2 * 16)  # x once, and each of its rows
    assert {r["backend"] for r in timed.values()} == {"torch"}
    assert "share of its bandwidth" in printed
    assert "permutation cuda: 'cuda' computes on a GPU" in printed


def test_routing_of_an_unknown_backend(bench):
    with pytest.raises(
        ConfigError, match=r"--backends 'troch' is unknown \(did you mean 'torch'\?\); installed: "
    ):
        bench("routing", "--shape", "64,16,24,4,2", "--backends", "troch")


def test_compare_of_a_file_with_itself_finds_nothing(bench):
    out, _ = bench(
        "layer", "--shape", "64,16,24,4,2", "--dtype", "fp32", "--peers", "none", "--repetitions", 3
    )
    result = CliRunner().invoke(
        app, ["bench", "compare", str(out / "layer.json"), str(out / "layer.json")]
    )
    assert "6 of 6 times did not change beyond the noise" in result.output


SMALL = ("--shape", "8,8,8,4,2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--dtype", "fp23"),
            r"--dtype 'fp23' is unknown \(did you mean 'fp32'\?\); known are: bf16",
        ),
        (("--routing", "zip"), r"--routing 'zip' is unknown \(did you mean 'zipf'\?\)"),
        (("--device", "tpu"), r"--device is 'tpu'; give cpu, cuda, cuda:N or auto"),
        ((*SMALL, "--backends", "tritn"), r"'tritn' is unknown .did you mean 'triton'"),
        ((*SMALL, "--backends", "all:save=fp8"), r"'all:save=fp8', and backends differ in their"),
        ((*SMALL, "--backends", "torch,cpu:foo=1"), r"foo is 1, and 'cpu' has no such option"),
        ((*SMALL, "--peers", "x"), r"--peers 'x' is unknown; known are: grouped_mm"),
        (("--shape", "8,8,8,2,4"), r"top_k is 4 but num_experts is 2"),
        (
            ("--device", "cpu", "--launches"),
            r"--launches is for a GPU, and --device is 'cpu'; leave it out",
        ),
        (
            ("--device", "cpu", "--held", 8),
            r"--held is for a GPU, and --device is 'cpu'; leave it out",
        ),
    ],
)
def test_bad_options_are_one_sentence(bench, arguments, said):
    with pytest.raises(TokenyardError, match=said):
        bench("layer", *arguments)


def test_neither_trainer_nor_models_nor_pydantic_is_needed(tmp_path):
    code = f"""
import sys
from pathlib import Path
sys.modules |= dict.fromkeys(("tokenyard_train", "tokenyard_models", "pydantic"))  # not importable
from rich.console import Console
from tokenyard_bench.commands import run_layer
from tokenyard_bench.options import LayerOptions
case = dict(shapes=["8,8,8,4,2"], dtypes=["fp32"], device="cpu", repetitions=3)
options = LayerOptions(**case, backends="cpu", peers="none", out=Path({str(tmp_path)!r}))
run_layer(options, Console(quiet=True))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    (dense, cpu) = json.loads((tmp_path / "layer.json").read_text())["records"]
    assert (dense["contestant"], cpu["contestant"], cpu["note"]) == ("dense", "cpu", None)


def test_the_command_line_does_not_import_torch_for_help():
    code = (
        "import sys\n"
        "sys.argv = ['tokenyard', 'bench', 'layer', '--help']\n"
        "from tokenyard_cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "unwanted = {'torch', 'tokenyard_train', 'tokenyard_models'}\n"
        "assert not unwanted & set(sys.modules), unwanted & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--repetitions" in done.stdout
