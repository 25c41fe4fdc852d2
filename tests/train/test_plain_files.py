"""Pipes and devices in place of files are refused at once, by every reader and writer."""

import os

import pytest

from tokenyard import TokenyardError
from tokenyard_models.hf import Folder
from tokenyard_train.data import TokenFile
from tokenyard_train.data.packing import PACKED_FILES, pack
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.sources.files import describe_file
from tokenyard_train.data.sources.mds_index import read_index
from tokenyard_train.records.metrics import Metrics

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(params=["pipe", "device"])
def odd(request):
    """Put something that is no file in a place."""

    def put(path):
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")

    return put


def packed(folder):
    pack(folder, lambda: iter([b"some text"] * 9), TokenizerConfig(), [], 1, lambda done: None)
    return folder


@pytest.mark.parametrize("name", ["manifest.json", "tokens.bin", "documents.bin"])
def test_a_packed_folder(tmp_path, odd, name):
    folder = packed(tmp_path / "p")
    assert (folder / name).exists()
    odd(folder / name)
    with pytest.raises(TokenyardError, match=rf"{name} is not a plain file; delete it"):
        TokenFile(folder).verify()


@pytest.mark.parametrize("name", sorted(PACKED_FILES))
def test_a_folder_to_pack_into(tmp_path, odd, name):
    folder = tmp_path / "p"
    folder.mkdir()
    odd(folder / name)
    with pytest.raises(TokenyardError, match="is not a plain file"):
        packed(folder)


def test_the_metrics_of_a_run(tmp_path, odd):
    odd(tmp_path / "metrics.jsonl")
    with pytest.raises(TokenyardError, match=r"metrics\.jsonl is not a plain file"):
        Metrics(tmp_path / "metrics.jsonl")


def test_an_index_of_mds_shards(tmp_path, odd):
    odd(tmp_path / "index.json")
    with pytest.raises(TokenyardError, match=r"index\.json is not a plain file"):
        read_index(tmp_path, "train_loader.dataset.local")


def test_a_shard_that_is_packed(tmp_path, odd):
    odd(tmp_path / "shard.00000.mds.gz")
    with pytest.raises(TokenyardError, match=r"mds\.gz is not a plain file"):
        describe_file(tmp_path / "shard.00000.mds.gz", "SOURCE")


def test_weights_of_a_hugging_face_folder(tmp_path, odd):
    (tmp_path / "config.json").write_text("{}")
    odd(tmp_path / "model.safetensors")
    with pytest.raises(TokenyardError, match=r"model\.safetensors is not a plain file"):
        Folder(tmp_path)
