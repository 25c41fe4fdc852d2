"""Tables of Unity Catalog, with its published REST API served by this file.

The server itself is not to be had from a package index.
"""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tokenyard import ConfigError
from tokenyard_models.strict_config import parse
from tokenyard_train.commands.train import train
from tokenyard_train.data.schema import Source, TextDataset
from tokenyard_train.data.sources import read_documents
from tokenyard_train.data.sources.unity_catalog import resolve

pyarrow = pytest.importorskip("pyarrow")
deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")
pytest.importorskip("unitycatalog.client", reason="unitycatalog-client is not installed")

TOKEN = "dapi-a-secret-token"
API = "/api/2.1/unity-catalog"
SECRETS = {"access_key_id": "AK", "secret_access_key": "a-secret-key", "session_token": "ST"}


class Catalog(BaseHTTPRequestHandler):
    """Answers as the published API does: tables, and temporary credentials for a table."""

    tables: dict[str, dict] = {}
    credentials: dict = {"aws_temp_credentials": SECRETS, "expiration_time": 1}

    def do_GET(self):
        name = self.path.partition("?")[0].removeprefix(f"{API}/tables/")
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, {"error_code": "UNAUTHENTICATED", "message": "Token has expired"})
        elif name == "main.text.hidden":
            self.answer(403, {"error_code": "PERMISSION_DENIED", "message": "no SELECT"})
        elif name == "main.text.broken":
            self.answer(500, {"message": f"cannot look up {TOKEN}"})
        elif name == "main.text.foreign":
            self.answer(200, {"data_source_format": "NEWER", "storage_location": "/t"})
        elif name == "main.text.nothing":
            self.answer(200, None)
        elif name in self.tables:
            self.answer(200, self.tables[name])
        else:
            self.answer(404, {"error_code": "TABLE_NOT_FOUND", "message": "Table not found"})

    def do_POST(self):
        assert self.path == f"{API}/temporary-table-credentials"
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert wanted == {"table_id": "id-of-cloud", "operation": "READ"}
        self.answer(200, self.credentials)

    def answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def table(tmp_path):
    content = pyarrow.table({"text": [f"{i} times 3 is {i * 3}" for i in range(60)]})
    deltalake.write_deltalake(str(tmp_path / "table"), content)
    return tmp_path / "table"


@pytest.fixture
def catalog(table, monkeypatch):
    """The address of a catalog with a Delta table, a view, a CSV table and a table on S3."""
    delta = {"data_source_format": "DELTA", "table_id": "id-of-articles"}
    Catalog.tables = {
        "main.text.articles": delta | {"storage_location": table.as_uri()},
        "main.text.view": {"table_type": "EXTERNAL"},
        "main.text.csv": {"data_source_format": "CSV", "storage_location": table.as_uri()},
        "main.text.gone": delta | {"storage_location": f"{table.as_uri()}/gone"},
        "main.text.cloud": delta | {"table_id": "id-of-cloud", "storage_location": "s3://b/t"},
    }
    server = HTTPServer(("127.0.0.1", 0), Catalog)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name in ("DATABRICKS_HOST", "DATABRICKS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UNITY_CATALOG_URL", address)
    monkeypatch.setenv("UNITY_CATALOG_TOKEN", TOKEN)
    yield address
    server.shutdown()
    server.server_close()


def read(name):
    return list(read_documents(Source(delta=f"uc://main.text.{name}"), "dataset"))


def test_a_table_is_read_by_its_name(catalog, table):
    assert read("articles") == list(read_documents(Source(delta=str(table)), "dataset"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("none", "the catalog has no such table"),
        ("hidden", "the user of UNITY_CATALOG_TOKEN has no permission to read it; ask its owner"),
        ("broken", r"the server answers 500: .*cannot look up \*\*\*"),
        (
            "foreign",
            "gives no description of a table that unitycatalog-client understands: .*NEWER",
        ),
        ("nothing", "gives no description of a table .*: the answer is empty"),
        ("view", "has no storage, as a view has none"),
        (
            "gone",
            "is in file://.*/gone, as the catalog says, and this machine finds no Delta table",
        ),
        ("csv", "has the format CSV, and only Delta tables are read"),
    ],
)
def test_refusals_are_one_sentence(catalog, name, sentence):
    with pytest.raises(ConfigError, match=rf"^dataset.delta 'uc://.*{sentence}") as caught:
        read(name)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_an_expired_token_and_a_missing_server_are_named(catalog, monkeypatch):
    monkeypatch.setenv("UNITY_CATALOG_TOKEN", "dapi-old")
    with pytest.raises(ConfigError, match="may have expired; set UNITY_CATALOG_TOKEN") as caught:
        read("articles")
    assert "dapi-old" not in str(caught.value)
    monkeypatch.setenv("UNITY_CATALOG_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 does not answer: "):
        read("articles")
    monkeypatch.delenv("UNITY_CATALOG_URL")
    with pytest.raises(ConfigError, match="needs a server; set UNITY_CATALOG_URL or DATABRICKS_H"):
        read("articles")


def test_cloud_storage_gets_short_lived_credentials(catalog):
    storage = resolve("uc://main.text.cloud", "delta")
    assert (storage.location, storage.options) == (
        "s3://b/t",
        {
            "AWS_ACCESS_KEY_ID": "AK",
            "AWS_SECRET_ACCESS_KEY": "a-secret-key",
            "AWS_SESSION_TOKEN": "ST",
        },
    )
    assert "a-secret-key" not in repr(storage)


def test_a_cloud_without_credentials_is_refused(catalog, monkeypatch):
    google = {"gcp_oauth_token": {"oauth_token": "a-google-token"}}
    monkeypatch.setattr(Catalog, "credentials", google)
    with pytest.raises(ConfigError, match="gives no credentials of S3 or Azure") as caught:
        read("cloud")
    assert "a-google-token" not in str(caught.value)


def test_a_token_reaches_no_file_and_no_log(catalog, config, console, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    loader = {"name": "text", "dataset": {"delta": "uc://main.text.articles"}}
    loggers = {"tensorboard": {}}
    folder = train(config(train_loader=loader, max_duration="1ba", loggers=loggers), console).folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "run.json" for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in caplog.text
    saved = json.loads((folder / "ba1" / "run.json").read_text())["config"]
    assert saved["train_loader"]["dataset"]["delta"] == "uc://main.text.articles"
    assert saved["train_loader"]["dataset"]["version"] == 0


@pytest.mark.parametrize("name", ["uc://articles", "uc://a.b.c.d", "uc://me:secret@a.b.c"])
def test_names_have_three_parts(name):
    with pytest.raises(ConfigError, match=r"give uc:// and a name catalog.schema.table"):
        parse(TextDataset, {"delta": name})
