"""MLflow shows where a model is from, and its registry gives the model back by name."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from tokenyard import ConfigError
from tokenyard_models.strict_config import parse
from tokenyard_train.commands.generate import generate
from tokenyard_train.commands.load_model import load_weights_only
from tokenyard_train.commands.options import GenerateOptions
from tokenyard_train.commands.train import train
from tokenyard_train.config.loggers import MlflowLogger
from tokenyard_train.records.environment import git_commit, versions

mlflow = pytest.importorskip("mlflow")

VARIABLES = ("TRACKING_URI", "EXPERIMENT_NAME", "EXPERIMENT_ID", "RUN_ID", "REGISTRY_URI")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Undo what the tracker sets, and what the user of the tests has set."""
    for name in (*VARIABLES, "ALLOW_FILE_STORE", "ENABLE_ARTIFACTS_PROGRESS_BAR"):
        monkeypatch.setenv(f"MLFLOW_{name}", "x")
        monkeypatch.delenv(f"MLFLOW_{name}")


@pytest.fixture
def run(config, console, tmp_path):
    """Train with options of the tracker; return the folder of the run."""

    def call(options=None, **changes):
        settings = {"loggers": {"mlflow": options or {}}, "max_duration": "2ba"}
        return train(config(**settings | changes), console).folder

    return call


def the_run(uri, experiment="tokenyard"):
    client = mlflow.MlflowClient(tracking_uri=str(uri))
    (logged,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return client, logged


def test_a_run_has_its_config_versions_commit_and_pictures(drawn, run, tmp_path):
    folder = run({"tags": {"team": "one"}})
    client, logged = the_run((tmp_path / "mlruns").as_uri())
    names = {file.path for file in client.list_artifacts(logged.info.run_id)}
    assert names == {"config.yaml", "loss.png", "experts.png"}
    assert logged.data.tags["version.torch"] == torch.__version__
    assert logged.data.tags.get("mlflow.source.git.commit") == git_commit()
    assert logged.data.tags["team"] == "one"
    text = client.download_artifacts(logged.info.run_id, "config.yaml", str(tmp_path))
    config = yaml.safe_load(Path(text).read_text())
    saved = json.loads((folder / "ba2" / "run.json").read_text())["config"]
    assert config == saved | {"backends": config["backends"]}
    assert saved["backends"]["experts"] == "auto"
    assert config["backends"]["experts"] == logged.data.params["backends.experts"] != "auto"


def test_the_load_of_experts_is_a_picture_unless_metrics_are_wanted(run, tmp_path):
    run()
    _, logged = the_run((tmp_path / "mlruns").as_uri())
    assert "train/routing/0/entropy" in logged.data.metrics
    assert not [name for name in logged.data.metrics if name.startswith("train/load")]
    run({"per_expert": True, "experiment_name": "each"}, save_folder=str(tmp_path / "b"))
    _, logged = the_run((tmp_path / "mlruns").as_uri(), "each")
    assert len([name for name in logged.data.metrics if name.startswith("train/load/")]) == 8


def test_the_environment_names_server_experiment_and_run(run, tmp_path, monkeypatch):
    elsewhere = (tmp_path / "elsewhere").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    run()
    assert not (tmp_path / "mlruns").exists()
    client, logged = the_run(elsewhere, "theirs")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment("by id"))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    run(save_folder=str(tmp_path / "b"))
    _, logged = the_run(elsewhere, "by id")
    begun = client.create_run(logged.info.experiment_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", begun.info.run_id)
    run(save_folder=str(tmp_path / "c"))
    assert "train/loss" in client.get_run(begun.info.run_id).data.metrics


def prompts(model):
    return GenerateOptions(model, ["3 times "], max_new_tokens=8, temperature=0, device="cpu")


def check_registered(folder, uri, monkeypatch):
    """Compare a registered model with the run that it is from."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    version = client.get_model_version("yard", "1")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (score,) = (r["bits_per_byte"] for r in records if r["kind"] == "eval")
    identity = json.loads((folder / "ba2" / "run.json").read_text())["data"]
    assert float(version.tags["eval.bits_per_byte"]) == score
    assert version.tags["digest.train_loader.dataset"] == identity["train_loader.dataset"]
    assert version.run_id == json.loads((folder / "trackers.json").read_text())["mlflow"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    named = Path("models:/yard/1")
    assert generate(prompts(named)) == generate(prompts(folder))
    expected = load_weights_only(folder).model.state_dict()
    weights = load_weights_only(named).model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


MIXTRAL = {"name": "mixtral", "size": "tiny"}


def test_the_trained_model_is_registered_and_loaded_by_name(run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = run({"register": "yard"}, model=MIXTRAL)
    assert not list(Path().iterdir())  # such as a database of MLflow's default
    check_registered(folder, (tmp_path / "mlruns").as_uri(), monkeypatch)
    for name in ("models:/yard", "models:yard/1", "models:/yard/1/2"):
        with pytest.raises(
            ConfigError, match=r"names no model of .*; give models:/NAME/VERSION or"
        ):
            generate(prompts(Path(name)))
    with pytest.raises(ConfigError, match=r"^models:/none/1 cannot be downloaded from file:.*none"):
        generate(prompts(Path("models:/none/1")))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match=r"models:/yard/1 names a model .*; set MLFLOW_TRACKING_"):
        generate(prompts(Path("models:/yard/1")))


def test_a_table_is_named_by_its_version(run, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")
    table = tmp_path / "table"
    content = pyarrow.table({"text": ["3 times 4 is 12"] * 40})
    deltalake.write_deltalake(str(table), content)
    run({"register": "yard"}, train_loader={"name": "text", "dataset": {"delta": str(table)}})
    version = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri()).get_model_version(
        "yard", "1"
    )
    assert version.tags["data.train_loader.dataset"] == f"{table}, version 0"


def test_a_sharded_model_can_be_registered(tokenyard, settings, tmp_path):
    """A strategy may replace the class of a model."""
    path = tmp_path / "config.yaml"
    loggers = {"mlflow": {"register": "yard"}}
    path.write_text(yaml.safe_dump(settings | {"loggers": loggers, "model": MIXTRAL}))
    code, _, error = tokenyard("check", str(path), "parallel.strategy=ddp", "--nproc", "2")
    assert (code, error) == (0, "")


def test_a_model_that_cannot_be_registered_is_a_warning(run, caplog, monkeypatch):
    def refuse(*_):
        raise ConnectionError("gone")

    monkeypatch.setattr("tokenyard_train.callbacks.register._convert", refuse)
    folder = run({"register": "yard"})
    assert "Registration failed after the last step (ConnectionError: gone)" in caplog.text
    assert (folder / "ba2").is_dir()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"register": "a/b"}, "register is 'a/b': give a name without"),
        ({"tracking_uri": "https://me:secret@host"}, "give that by MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_options_are_validated(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse(MlflowLogger, options)


def test_versions_and_commit_are_those_of_this_process(tmp_path, monkeypatch):
    assert versions()["python"] == ".".join(map(str, sys.version_info[:3]))
    git = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None
    (tmp_path / "a").write_text("1")
    for arguments in (["init", "-q"], ["add", "a"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    clean = git_commit()
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert git_commit() == f"{clean}-dirty"


@pytest.fixture
def server(tmp_path):
    """The address of an MLflow server with a database and a registry."""
    if not all(map(find_spec, ("flask", "sqlalchemy", "alembic"))):
        pytest.skip("the server needs the package mlflow, and only mlflow-skinny is installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stores = ("--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db")
    stores += ("--artifacts-destination", str(tmp_path / "artifacts"))
    command = [sys.executable, "-m", "mlflow", "server", *stores, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def wait_for(url, process):
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.5)
    raise TimeoutError(url)


@pytest.mark.full
def test_a_server_registers_the_model_and_gives_it_back(run, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    folder = run({"register": "yard"}, model=MIXTRAL)
    check_registered(folder, server, monkeypatch)
    client, logged = the_run(server)
    assert {"config.yaml", "model"} <= {
        file.path for file in client.list_artifacts(logged.info.run_id)
    }
