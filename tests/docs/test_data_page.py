"""The commands of docs/data.md lead from a table of a catalog to a registered model."""

import importlib.util
import json
import shlex
import sys
import threading
from http.server import HTTPServer
from pathlib import Path

import pytest
from blocks import ROOT, blocks
from shell import lines

import tokenyard_cli

pyarrow = pytest.importorskip("pyarrow")
deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")
mlflow = pytest.importorskip("mlflow")
pytest.importorskip("unitycatalog.client", reason="unitycatalog-client is not installed")

PAGE = ROOT / "docs" / "data.md"


def catalog_handler():
    """Return the handler of test_unity_catalog.py, and the token that it takes."""
    path = ROOT / "tests" / "train" / "data" / "test_unity_catalog.py"
    spec = importlib.util.spec_from_file_location("unity_catalog_of_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Catalog, module.TOKEN


@pytest.fixture
def catalog(tmp_path, monkeypatch):
    """Serve a catalog with two tables in the current folder, and set the environment."""
    handler, token = catalog_handler()
    handler.tables = {}
    for name, step in (("articles", 3), ("held_out", 7)):
        texts = [f"{i} times {step} is {i * step}" for i in range(200)]
        table = tmp_path / "tables" / name
        deltalake.write_deltalake(str(table), pyarrow.table({"body": texts}))
        handler.tables[f"main.text.{name}"] = {
            "data_source_format": "DELTA",
            "table_id": name,
            "storage_location": table.as_uri(),
        }
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("UNITY_CATALOG_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("UNITY_CATALOG_TOKEN", token)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    yield
    server.shutdown()
    server.server_close()


def run(line, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as ended:
            tokenyard_cli.main()
    assert not ended.value.code, line


@pytest.mark.full
def test_the_commands_run_in_order(catalog, monkeypatch, capsys):
    page = blocks(PAGE)
    (config,) = (block.text for block in page if block.language == "yaml")
    Path("articles.yaml").write_text(config)
    for block in page:
        if block.language == "console" and "with a catalog" in (block.why_not or ""):
            for line in lines(block):
                run(line, monkeypatch)
    version = mlflow.MlflowClient().get_model_version("articles", "2")
    table = "uc://main.text.articles, version 0"
    assert version.tags["data.train_loader.dataset"] == table
    assert float(version.tags["eval.bits_per_byte"]) > 0
    assert table in capsys.readouterr().out
    manifest = json.loads(Path("packed/manifest.json").read_text())
    assert manifest["sources"][0]["version"] == 0
    assert {"config.json", "tokenizer.json"} <= {path.name for path in Path("exported").iterdir()}
