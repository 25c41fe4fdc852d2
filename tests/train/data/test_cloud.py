"""Delta tables in cloud storage, whose secrets come from the environment and stay there."""

import logging
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest

from tokenyard import ConfigError
from tokenyard_train.commands.train import train
from tokenyard_train.data.schema import Source
from tokenyard_train.data.sources import describe_source, read_documents
from tokenyard_train.hide_secrets import hide_secrets

pyarrow = pytest.importorskip("pyarrow")
deltalake = pytest.importorskip("deltalake", reason="deltalake is not installed")

SECRET = "a/secret+key"
CONTENT = pyarrow.table({"text": [f"{i} times 3 is {i * 3}" for i in range(60)]})


def read(location):
    return list(read_documents(Source(delta=location), "dataset"))


def test_secrets_of_the_environment_are_hidden(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", f"{SECRET}-and-more")
    monkeypatch.setenv("SOME_KEY", "s3")
    monkeypatch.setenv("TOKENYARD_EXPERTS", "triton")
    assert hide_secrets(f"{SECRET}-and-more of s3") == "*** of s3"
    assert hide_secrets("https://me:word@host/triton") == "https://***@host/triton"
    assert hide_secrets("?k=a%2Fsecret%2Bkey") == "?k=***"
    signed = "GET https://a.blob.core.windows.net/t?sv=2024&sig=ab%3D"  # of the catalog
    assert hide_secrets(signed) == "GET https://a.blob.core.windows.net/t?sv=2024&sig=***"


def test_an_error_of_the_storage_is_one_sentence_without_secrets(monkeypatch):
    def refuse(*_, **__):
        raise OSError(f"start {'x' * 500}\n  {SECRET} denied")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(deltalake, "DeltaTable", refuse)
    with pytest.raises(
        ConfigError,
        match=r"start x+ \.\.\. x+ \*\*\* denied; its credentials come "
        r"from the environment: AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACC",
    ):
        read("s3://bucket/table")


@pytest.fixture
def bucket(monkeypatch):
    """Serve the bucket ``s3://bucket`` by moto, and set the environment for it."""
    if find_spec("moto") is None:
        pytest.skip("moto is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    # A process of its own: pyarrow waits for the storage with the lock of this interpreter.
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    variables = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        make_bucket(f"{address}/bucket", server)
        yield "s3://bucket"
    finally:
        server.terminate()
        server.wait(20)


def make_bucket(url, server):
    """Make a bucket once the server listens."""
    request = urllib.request.Request(url, data=b"", method="PUT")
    request.add_header(
        "Authorization", "AWS4-HMAC-SHA256 Credential=me/1/us-east-1/s3/aws4_request"
    )
    for _ in range(240):
        try:
            urllib.request.urlopen(request, timeout=20)
            return
        except urllib.error.URLError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.5)
    raise TimeoutError(url)


@pytest.mark.full
def test_a_table_on_s3_is_read_by_the_environment(bucket, config, console, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    location = f"{bucket}/table"
    deltalake.write_deltalake(location, CONTENT)
    deltalake.write_deltalake(str(tmp_path / "table"), CONTENT)
    assert read(location) == read(f"s3a://{bucket[5:]}/table") == read(str(tmp_path / "table"))
    assert describe_source(Source(delta=location, version=0), "dataset")[1]["files"] == 1
    loader = {"name": "text", "dataset": {"delta": location}}
    folder = train(config(train_loader=loader, max_duration="1ba"), console).folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(location.encode() in path.read_bytes() for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in caplog.text
    for place, sentence in (
        (f"{bucket}/none", "is no Delta table; give a folder that holds a _delta_log"),
        (
            "s3://none/table",
            r"cannot be opened: NoSuchBucket: The specified bucket does not exist;",
        ),
    ):
        with pytest.raises(ConfigError, match=rf"^dataset.delta '{place}' {sentence}") as caught:
            read(place)
        assert "\n" not in str(caught.value)
