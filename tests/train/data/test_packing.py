"""Pack text: equal bytes after any interruption, and every changed bit is detected."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tokenyard import ConfigError, TokenyardError
from tokenyard_cli import app
from tokenyard_train.data import CorruptError, TokenFile, build_data, encoding
from tokenyard_train.data import packing as module
from tokenyard_train.data.encoding import split_chunks
from tokenyard_train.data.packing import pack
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.tokens import read_manifest

DOCUMENTS = [f"document {i}: {'word ' * (i * 37 % 200)}é\n".encode() for i in range(300)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Shrink chunks and blocks, so that a small text fills many."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 5000)
    for name in (module.__name__, "tokenyard_train.data.tokens"):
        monkeypatch.setattr(f"{name}.BLOCK_BYTES", 4096)


def packed(folder: Path, documents=DOCUMENTS, workers=1, progress=lambda done: None) -> Path:
    pack(folder, lambda: iter(documents), TokenizerConfig(), [{"name": "test"}], workers, progress)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_remote_output_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^the output folder 's3:/bucket/out' is a remote path"):
        packed(Path("s3://bucket/out"))
    assert not list(tmp_path.iterdir())


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
    assert [d for chunk in split_chunks(DOCUMENTS, 5000) for d in chunk] == DOCUMENTS
    sizes = [sum(map(len, chunk)) for chunk in split_chunks(DOCUMENTS, 5000)]
    assert all(size >= 5000 for size in sizes[:-1])


def test_the_same_bytes_from_any_number_of_workers(tmp_path):
    assert content(packed(tmp_path / "1")) == content(packed(tmp_path / "2", workers=2))


class Killed(BaseException):
    """Simulates the end of the process."""


def test_a_resumed_packing_has_the_same_bytes(tmp_path):
    whole = content(packed(tmp_path / "whole"))
    rng = random.Random(5)
    for number in range(6):
        folder = tmp_path / str(number)
        last = rng.randrange(1, 8)

        def interrupt(done, last=last):
            if done.chunks == last:
                raise Killed

        with pytest.raises(Killed):
            packed(folder, progress=interrupt)
        # Written ids that the journal does not record yet.
        with (folder / "tokens.bin").open("ab") as file:
            file.write(bytes(rng.randrange(5000)))
        with (folder / "journal.jsonl").open("a") as file:
            file.write("[12, 3")
        seen = []
        packed(folder, progress=seen.append)
        assert seen[0].chunks == last  # nothing is tokenized twice
        assert content(folder) == whole


@pytest.fixture
def big(tmp_path):
    """A file of some megabytes, so that packing takes long enough to be killed."""
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for i in range(60_000):
            file.write(json.dumps({"text": f"{i} " + "some words of text " * (i % 40)}) + "\n")
    return path


def test_a_killed_and_resumed_process_writes_the_same_bytes(tmp_path, big, monkeypatch):
    monkeypatch.undo()  # chunks of the usual size, as in the killed processes
    command = [sys.executable, "-m", "tokenyard_train", "data", "pack"]
    options = [str(big), "--workers", "1"]
    folder = tmp_path / "killed"
    kills = 0
    for chunk in (1, 4):
        with subprocess.Popen(
            [*command, str(folder), *options], stdout=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and _chunks_done(folder) < chunk:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
    for target in (folder, tmp_path / "whole"):
        result = CliRunner().invoke(app, ["data", "pack", str(target), *options])
        assert result.exit_code == 0, result.output
    assert kills == 2
    assert content(folder) == content(tmp_path / "whole")


def _chunks_done(folder: Path) -> int:
    journal = folder / "journal.jsonl"
    return journal.read_text().count("\n") - 1 if journal.exists() else 0


def test_a_flipped_bit_is_found_where_it_is_read(tmp_path):
    folder = packed(tmp_path / "p")
    tokens = folder / "tokens.bin"
    rng = random.Random(1)
    sound = tokens.read_bytes()
    for _ in range(20):
        position = rng.randrange(len(sound))
        changed = bytearray(sound)
        changed[position] ^= 1 << rng.randrange(8)
        tokens.write_bytes(changed)
        opened = TokenFile(folder)
        block = position // 4096
        with pytest.raises(
            CorruptError,
            match=rf"tokens.bin was changed after packing, in bytes {block * 4096} to ",
        ):
            opened[position // 2 : position // 2 + 1]
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
        CorruptError, match=r"tokens.bin has 100 bytes, and \d+ were packed; copy the folder again"
    ):
        TokenFile(folder)


def pack_sources(folder: Path, sources: list[dict], overwrite: bool = False) -> None:
    documents = partial(iter, DOCUMENTS)
    pack(folder, documents, TokenizerConfig(), sources, 1, lambda done: None, overwrite)


def test_only_the_same_packing_is_resumed(tmp_path):
    def interrupt(done):
        if done.chunks:
            raise Killed

    with pytest.raises(Killed):
        packed(tmp_path / "p", progress=interrupt)
    with pytest.raises(
        ConfigError, match=r"was not packed to the end; run the same tokenyard data pack again"
    ):
        TokenFile(tmp_path / "p")
    for sources, said in [
        ([{"name": "other"}], r"of other text \({'name': 'test'} is new, gone or changed\)"),
        ([{"name": "test"}, {"file": "b.txt"}], r"of other text \(b.txt is new, gone or changed\)"),
    ]:
        with pytest.raises(ConfigError, match=rf"holds an unfinished packing {said}; give the sam"):
            pack_sources(tmp_path / "p", sources)


def test_text_that_changed_in_its_middle_is_not_resumed(tmp_path):
    """Whether the journal's description of the sources shows the change or not."""
    unfinished(tmp_path / "p", chunks=3)
    changed = list(DOCUMENTS)
    changed[7] = changed[7].replace(b"document", b"DOCUMENT")
    for documents in (changed, DOCUMENTS[:3], [DOCUMENTS[0] + DOCUMENTS[1], *DOCUMENTS[2:]]):
        with pytest.raises(ConfigError, match=r"of other text \(document \d+ or one of"):
            packed(tmp_path / "p", documents=documents)
    later = [*DOCUMENTS[:200], b"another", *DOCUMENTS[200:]]  # not packed yet
    assert content(packed(tmp_path / "p", later)) == content(packed(tmp_path / "whole", later))


def test_a_resume_with_another_column_is_refused(tmp_path, monkeypatch, tokenyard):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": d.decode(), "b": "b" * len(d)}) + "\n"
                            for d in DOCUMENTS))  # fmt: skip
    options = ["data", "pack", str(tmp_path / "p"), str(rows), "--workers", "1"]
    line = module.journal_line

    def interrupt(done, *rest):
        if done.chunks == 4:
            raise Killed
        return line(done, *rest)

    monkeypatch.setattr(module, "journal_line", interrupt)
    with pytest.raises(Killed):
        CliRunner().invoke(app, options, catch_exceptions=False)
    monkeypatch.setattr(module, "journal_line", line)
    code, _, errors = tokenyard(*options, "--text-key", "b")
    assert code == 2
    assert "other text ({'text_key': 'b'} is new, gone or changed)" in " ".join(errors.split())
    assert tokenyard(*options)[0] == 0
    assert (TokenFile(tmp_path / "p")[:] != ord("b")).mean() > 0.9


def test_a_packing_without_a_chunk_does_not_hold_its_folder(tmp_path):
    def interrupt(done):
        raise Killed

    with pytest.raises(Killed):
        packed(tmp_path / "p", progress=interrupt)
    pack_sources(tmp_path / "p", [{"name": "other"}])
    assert read_manifest(tmp_path / "p")["sources"] == [{"name": "other"}]
    assert content(tmp_path / "p")["tokens.bin"] == content(packed(tmp_path / "w"))["tokens.bin"]


def test_a_packed_folder_is_not_overwritten(tmp_path):
    folder = packed(tmp_path / "p")
    before = content(folder)
    with pytest.raises(
        ConfigError, match=r"is packed already; give another folder, or --overwrite"
    ):
        packed(folder)
    assert content(folder) == before


def test_empty_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no text to pack"):
        packed(tmp_path / "p", documents=[])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TokenyardError, match=r"file/p' cannot be written: Not a directory"):
        packed(tmp_path / "file" / "p")


def test_training_samples_of_the_folder_equal_those_of_the_text(tmp_path, config, text):
    ran = CliRunner().invoke(
        app, ["data", "pack", str(tmp_path / "p"), str(text), "--workers", "1"]
    )
    assert ran.exit_code == 0, ran.output
    by_text = build_data(config().data()).train
    packed = {"name": "text", "dataset": {"packed": str(tmp_path / "p")}}
    by_folder = build_data(config(train_loader=packed).data()).train
    assert all((by_text[i] == by_folder[i]).all() for i in range(2 * len(by_text)))


def test_the_commands_print_a_folder_s_content(tmp_path, text):
    run = CliRunner().invoke
    folder = str(tmp_path / "p")

    def output(*arguments):
        """Return a command's output on one line, because the folder's name may wrap it."""
        return " ".join(run(app, ["data", *arguments]).output.split())

    assert "2 documents" in output("pack", folder, str(text), "--workers", "1")
    assert "tokenizer bytes" in output("info", folder)
    assert "tokens are as they were packed" in output("verify", folder)
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


def unfinished(folder: Path, chunks: int = 5) -> Path:
    """Pack some chunks, and end as a killed process does."""

    def interrupt(done):
        if done.chunks == chunks:
            raise Killed

    with pytest.raises(Killed):
        packed(folder, progress=interrupt)
    return folder


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
@pytest.mark.parametrize("damage", ["gone", "short", "empty", "flipped"])
def test_a_packing_does_not_go_on_over_damage(tmp_path, name, damage):
    path = unfinished(tmp_path / "p") / name
    sound = path.read_bytes()
    damaged = {
        "gone": None,
        "short": sound[:-1],
        "empty": b"",
        "flipped": sound[:3] + bytes([sound[3] ^ 1]) + sound[4:],
    }[damage]
    path.unlink() if damaged is None else path.write_bytes(damaged)
    said = "was changed since it was packed, in chunk 1" if damage == "flipped" else r"records \d+"
    with pytest.raises(CorruptError, match=rf"{said}.*; copy the folder again, or pack anew"):
        packed(tmp_path / "p")
    assert not (tmp_path / "p" / "manifest.json").exists()
    assert not path.exists() or path.read_bytes() == damaged  # nothing is filled up with zeros
    pack_sources(tmp_path / "p", [{"name": "test"}], overwrite=True)
    assert content(tmp_path / "p") == content(packed(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '[1, 1000000000, 5, 5, "00", "00"]',
            r"tokens.bin has \d+ bytes, and .* records 2000000000",
        ),
        ('[1, 1000000000, 5, 5, "00"]', "holds a line that is no record of a chunk"),
        ('[6, 1, 1, 1, "00", "00"]', r"records no order of chunks|was changed"),
        ('[6, -1, 1, 1, "00", "00"]', "holds a line that is no record of a chunk"),
        ('[6, true, 1, 1, "00", "00"]', "holds a line that is no record of a chunk"),
        ("{}", "holds a line that is no record of a chunk"),
        ("nonsense", "holds a line that is not JSON"),
        ("[" * 200_000, "holds a line that is not JSON"),
        ("\udcff", "holds a line that is not JSON"),
    ],
)
def test_a_journal_is_not_believed(tmp_path, line, said):
    journal = unfinished(tmp_path / "p") / "journal.jsonl"
    with journal.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(CorruptError, match=said):
        packed(tmp_path / "p")


def test_every_flipped_bit_of_a_journal_is_found_or_changes_nothing(tmp_path):
    rng = random.Random(2)
    journal = unfinished(tmp_path / "p") / "journal.jsonl"
    before = content(tmp_path / "p")
    whole = content(packed(tmp_path / "whole"))
    for _ in range(60):
        changed = bytearray(before["journal.jsonl"])
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        for name in content(tmp_path / "p"):
            (tmp_path / "p" / name).unlink()
        for name, text in before.items():
            (tmp_path / "p" / name).write_bytes(text)
        journal.write_bytes(changed)
        try:
            packed(tmp_path / "p")
        except TokenyardError:
            continue
        assert content(tmp_path / "p") == whole


def test_one_process_packs_into_a_folder(tmp_path):
    said = []

    def second(done):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=r"is being written by .*wait until it"):
                pack(tmp_path / "p", lambda: iter(DOCUMENTS), TokenizerConfig(), [], 1,
                     lambda done: None, overwrite)  # fmt: skip
        said.append(done)

    packed(tmp_path / "p", progress=second)
    assert len(said) > 3
    assert content(tmp_path / "p") == content(packed(tmp_path / "whole"))


@pytest.mark.timeout(60)
def test_an_error_of_a_worker_is_reported_as_itself(tmp_path):
    """Also if the next chunk is sent after the worker has ended."""
    chunks = iter([document * 2000] for document in DOCUMENTS)
    missing = TokenizerConfig(name=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        list(encoding.encode_chunks(chunks, missing, 2))


def _processes(marker: str) -> list[int]:
    """Return the processes whose command line or parent's has a marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes()
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if marker.encode() in environment and state != "Z":
            found.append(int(path.name))
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("killed", [1, 2], ids=["one", "all"])
def test_killed_workers_are_an_error_at_any_moment(monkeypatch, killed):
    """Chunks fill the pipes many times over, so workers are killed while they write."""
    workers = []
    start = encoding._Worker.__init__

    def remember(worker, config):
        start(worker, config)
        workers.append(worker)

    monkeypatch.setattr(encoding._Worker, "__init__", remember)
    chunks = iter([document * 2000] for document in DOCUMENTS)
    encoded = encoding.encode_chunks(chunks, TokenizerConfig(), 2)
    next(encoded)
    for worker in workers[:killed]:
        worker.process.kill()
    with pytest.raises(TokenyardError, match=r"was killed, .* with --workers 1 to resume"):
        list(encoded)
    assert not any(worker.process.is_alive() for worker in workers)


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_no_process_stays_when_the_parent_is_killed(tmp_path, big):
    command = [sys.executable, "-m", "tokenyard_train", "data", "pack", str(tmp_path / "p")]
    marker = f"PACKING_TEST={tmp_path}"
    environment = os.environ | dict([marker.split("=", 1)])
    with subprocess.Popen(
        [*command, str(big), "--workers", "2"], stdout=subprocess.DEVNULL, env=environment
    ) as process:
        while process.poll() is None and _chunks_done(tmp_path / "p") < 1:
            time.sleep(0.01)
        assert process.poll() is None
        assert len(_processes(marker)) >= 3
        process.kill()
    deadline = time.monotonic() + 20
    while _processes(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _processes(marker)


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_a_worker_that_is_killed_while_it_answers_leaves_nobody_waiting():
    """Its answer fills the pipe, so that it waits in the middle of it."""
    worker, other = (encoding._Worker(TokenizerConfig()) for _ in range(2))
    try:
        for each in (worker, other):
            each.send([b"x" * (4 << 20)])
        pid = worker.process.pid
        _wait_until(lambda: worker.connection.poll() and _state(pid) == "S")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(encoding._WorkerDiedError):
            worker.receive()
        assert other.receive().text_bytes == 4 << 20
    finally:
        worker.close()
        other.close()


def _state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "hashes.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "deep", "not UTF-8"])
def test_a_damaged_packed_folder_is_one_sentence(tmp_path, name, damage, tokenyard):
    folder = packed(tmp_path / "p")
    path = folder / name
    sound = path.read_bytes()
    damages = {"empty": b"", "cut": sound[:-3], "deep": b"[" * 200_000, "not UTF-8": b"\xff\xfe"}
    path.unlink() if damage == "gone" else path.write_bytes(damages[damage])
    code, _, stderr = tokenyard("data", "verify", str(folder))
    assert code != 0
    assert "Traceback" not in stderr
    assert str(folder) in stderr.replace("\n", "")


def test_flipped_bits_of_a_manifest_are_one_sentence(tmp_path):
    path = packed(tmp_path / "p") / "manifest.json"
    sound = path.read_bytes()
    for position in range(len(sound)):
        path.write_bytes(
            sound[:position]
            + bytes([sound[position] ^ 0x80 >> position % 8])
            + sound[position + 1 :]
        )
        with pytest.raises((CorruptError, ConfigError)):
            TokenFile(tmp_path / "p").verify()


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", "O"), ("dtype", "<f4"), ("tokens", -1), ("tokens", 1e30), ("tokens", True),
     ("documents", None), ("vocab_size", "x"), ("vocab_size", 70_000), ("sources", 5),
     ("format", [])],
)  # fmt: skip
def test_a_forged_manifest_is_refused(tmp_path, key, value):
    path = packed(tmp_path / "p") / "manifest.json"
    manifest = json.loads(path.read_text()) | {key: value}
    manifest.pop("digest")
    manifest["digest"] = module.manifest_digest(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises((CorruptError, ConfigError), match=rf"has {key} |has dtype "):
        TokenFile(tmp_path / "p")


def test_packed_ids_outside_the_vocabulary_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenyard_train.data.tokenizer.BytesTokenizer.vocab_size", 100)
    with pytest.raises(ConfigError, match=r"tokens.bin holds id \d+, and the tokenizer has 100"):
        TokenFile(packed(tmp_path / "p")).verify()


@pytest.mark.parametrize("folder", ["a" * 400, "a\0b"])
def test_a_folder_name_that_cannot_be(folder):
    with pytest.raises(ConfigError, match=r"is not a packed folder"):
        TokenFile(folder)
