"""A packed folder: the same bytes however it came to be, and no changed bit goes unseen."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tokenyard import ConfigError, TokenyardError
from tokenyard_cli import app
from tokenyard_train.data import CorruptError, TokenFile, build_data
from tokenyard_train.data import packing as module
from tokenyard_train.data.encoding import chunks
from tokenyard_train.data.packing import pack
from tokenyard_train.data.schema import Tokenizer

DOCUMENTS = [f"document {i}: {'word ' * (i * 37 % 200)}é\n".encode() for i in range(300)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks and blocks of a size that a small text fills many of."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 5000)
    for name in (module.__name__, "tokenyard_train.data.tokens"):
        monkeypatch.setattr(f"{name}.BLOCK_BYTES", 4096)


def packed(folder: Path, documents=DOCUMENTS, workers=1, progress=lambda done: None) -> Path:
    pack(folder, lambda: iter(documents), Tokenizer(), [{"name": "test"}], workers, progress)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_are_read_back_with_their_ends(tmp_path):
    tokens = TokenFile(packed(tmp_path / "p"))
    starts = [0, *tokens.ends[:-1].tolist()]
    read = [
        tokens[a : b - 1].astype(np.uint8).tobytes() for a, b in zip(starts, tokens.ends.tolist())
    ]
    assert read == DOCUMENTS
    assert (tokens[:][tokens.ends.astype(np.int64) - 1] == 256).all()
    assert len(tokens) == sum(map(len, DOCUMENTS)) + len(DOCUMENTS)


def test_chunks_depend_on_the_text_alone():
    assert [d for chunk in chunks(DOCUMENTS, 5000) for d in chunk] == DOCUMENTS
    sizes = [sum(map(len, chunk)) for chunk in chunks(DOCUMENTS, 5000)]
    assert all(size >= 5000 for size in sizes[:-1])


def test_the_same_bytes_from_any_number_of_workers(tmp_path):
    assert content(packed(tmp_path / "1")) == content(packed(tmp_path / "2", workers=2))


class Killed(BaseException):
    """Stands for the end of the process."""


def test_an_interrupted_packing_goes_on_to_the_same_bytes(tmp_path):
    whole = content(packed(tmp_path / "whole"))
    rng = random.Random(5)
    for number in range(6):
        folder, left = tmp_path / str(number), rng.randrange(1, 8)

        def interrupt(done, left=left):
            if done.chunks == left:
                raise Killed

        with pytest.raises(Killed):
            packed(folder, progress=interrupt)
        with (folder / "tokens.bin").open(
            "ab"
        ) as file:  # what was written, but not yet vouched for
            file.write(bytes(rng.randrange(5000)))
        with (folder / "journal.jsonl").open("a") as file:
            file.write("[12, 3")
        seen = []
        packed(folder, progress=seen.append)
        assert seen[0].chunks == left  # nothing is tokenized twice
        assert content(folder) == whole


@pytest.fixture
def big(tmp_path):
    """Some megabytes of text in a file, so that a process takes a while to pack it."""
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for i in range(60_000):
            file.write(json.dumps({"text": f"{i} " + "some words of text " * (i % 40)}) + "\n")
    return path


def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path, big):
    command = [sys.executable, "-m", "tokenyard_train", "data", "pack"]
    options = [str(big), "--workers", "1"]
    subprocess.run([*command, str(tmp_path / "whole"), *options], check=True, capture_output=True)
    folder, kills = tmp_path / "killed", 0
    for chunk in (1, 3, 4):
        with subprocess.Popen(
            [*command, str(folder), *options], stdout=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and _chunks_done(folder) < chunk:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
    subprocess.run([*command, str(folder), *options], check=True, capture_output=True)
    assert kills == 3
    assert content(folder) == content(tmp_path / "whole")


def _chunks_done(folder: Path) -> int:
    journal = folder / "journal.jsonl"
    return journal.read_text().count("\n") - 1 if journal.exists() else 0


def test_a_flipped_bit_is_found_where_it_is_read(tmp_path):
    folder = packed(tmp_path / "p")
    tokens = folder / "tokens.bin"
    rng, sound = random.Random(1), tokens.read_bytes()
    for _ in range(20):
        place = rng.randrange(len(sound))
        changed = bytearray(sound)
        changed[place] ^= 1 << rng.randrange(8)
        tokens.write_bytes(changed)
        opened, block = TokenFile(folder), place // 4096
        with pytest.raises(
            CorruptError,
            match=rf"tokens.bin was changed after packing, in bytes {block * 4096} to ",
        ):
            opened[place // 2 : place // 2 + 1]
        with pytest.raises(CorruptError):
            opened.verify()
        before = opened[: block * 2048]  # the blocks before it are sound
        assert before.tobytes() == sound[: block * 4096]


@pytest.mark.parametrize("name", ["documents.bin", "hashes.bin", "manifest.json"])
def test_the_other_files_are_checked_too(tmp_path, name):
    folder = packed(tmp_path / "p")
    changed = bytearray((folder / name).read_bytes())
    changed[len(changed) // 2] ^= 1
    (folder / name).write_bytes(changed)
    with pytest.raises(
        (CorruptError, ConfigError), match=r"was changed after packing|is not a manifest"
    ):
        TokenFile(folder).verify()


def test_a_truncated_file_is_found_when_it_is_opened(tmp_path):
    folder = packed(tmp_path / "p")
    os.truncate(folder / "tokens.bin", 100)
    with pytest.raises(
        CorruptError, match=r"tokens.bin has 100 bytes, and \d+ were packed; copy the folder anew"
    ):
        TokenFile(folder)


def test_only_the_same_packing_is_gone_on_with(tmp_path):
    def interrupt(done):
        if done.chunks:
            raise Killed

    with pytest.raises(Killed):
        packed(tmp_path / "p", progress=interrupt)
    with pytest.raises(
        ConfigError, match=r"was not packed to the end; run the same tokenyard data pack again"
    ):
        TokenFile(tmp_path / "p")
    with pytest.raises(
        ConfigError, match=r"holds an unfinished packing of other text or by another tokenizer"
    ):
        pack(
            tmp_path / "p",
            lambda: iter(DOCUMENTS),
            Tokenizer(),
            [{"name": "other"}],
            1,
            lambda done: None,
        )


def test_what_is_there_is_not_overwritten(tmp_path):
    folder = packed(tmp_path / "p")
    before = content(folder)
    with pytest.raises(
        ConfigError, match=r"is packed already; give another folder, or --overwrite"
    ):
        packed(folder)
    assert content(folder) == before


def test_no_text_is_no_packing(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no text to pack"):
        packed(tmp_path / "p", documents=[])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TokenyardError, match=r"file/p cannot be written: Not a directory"):
        packed(tmp_path / "file" / "p")


def test_training_reads_the_folder_as_it_reads_the_text(tmp_path, config, text):
    ran = CliRunner().invoke(
        app, ["data", "pack", str(tmp_path / "p"), str(text), "--workers", "1"]
    )
    assert ran.exit_code == 0, ran.output
    by_text = build_data(config().data()).train
    packed = {"name": "text", "dataset": {"packed": str(tmp_path / "p")}}
    by_folder = build_data(config(train_loader=packed).data()).train
    assert all((by_text[i] == by_folder[i]).all() for i in range(2 * len(by_text)))


def test_the_commands_say_what_a_folder_holds(tmp_path, text):
    run = CliRunner().invoke
    folder = str(tmp_path / "p")

    def said(*arguments):
        """In one line, however long the folder's name makes them."""
        return " ".join(run(app, ["data", *arguments]).output.split())

    assert "2 documents" in said("pack", folder, str(text), "--workers", "1")
    assert "tokenizer bytes" in said("info", folder)
    assert "tokens are as they were packed" in said("verify", folder)
    assert (
        run(app, ["data", "pack", folder, str(text), "--overwrite", "--workers", "1"]).exit_code
        == 0
    )
    (tmp_path / "p" / "mine").touch()
    with pytest.raises(
        ConfigError, match=r"--overwrite deletes a packed folder, and .* holds something else: mine"
    ):
        run(app, ["data", "pack", folder, str(text), "--overwrite"], catch_exceptions=False)


def test_another_tokenizer_s_folder_is_refused(tmp_path, config, monkeypatch):
    folder = packed(tmp_path / "p")
    monkeypatch.setattr("tokenyard_train.data.tokenizer.BytesTokenizer.identity", "other")
    with pytest.raises(
        ConfigError,
        match=r"packed '.*' was packed by the tokenizer bytes, and the config's is other",
    ):
        build_data(config(train_loader={"name": "text", "dataset": {"packed": str(folder)}}).data())
