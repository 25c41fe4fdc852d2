"""Tokenizers from Hugging Face files and tiktoken ranks."""

import base64
import json
from pathlib import Path

import pytest

from tokenyard import ConfigError
from tokenyard_models.strict_config import parse
from tokenyard_train.commands.data import parse_tokenizer
from tokenyard_train.data import build_tokenizer
from tokenyard_train.data.schema import TokenizerConfig

TEXT = "The café — naïve ✓ 東京 costs 3.50 €.\n\tdef f(x):\n        return x ** 2\n" * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a byte-level BPE tokenizer, in the layout of transformers."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A file of tiktoken ranks: all bytes, and a few merges."""
    pytest.importorskip("tiktoken")
    merges = [b"th", b"re", b"\xc3\xa9", b"caf", b"ca", b"  ", b"ret"]
    lines = [
        base64.b64encode(t).decode() + f" {i}"
        for i, t in enumerate([bytes([b]) for b in range(256)] + merges)
    ]
    path = tmp_path_factory.mktemp("tiktoken") / "ranks.tiktoken"
    path.write_text("\n".join(lines) + "\n")
    return path


def tiktoken(ranks: Path, **changes: object) -> TokenizerConfig:
    kwargs = {
        "file": str(ranks),
        "pattern": r"\w+|\s+|[^\w\s]+",
        "special_tokens": {"<|endoftext|>": 263},
    }
    return parse(TokenizerConfig, {"name": "tiktoken", "kwargs": kwargs | changes})


@pytest.fixture(params=["folder", "file", "tiktoken"])
def tokenizer(request, folder, ranks):
    configs = {
        "folder": TokenizerConfig(name=str(folder)),
        "file": TokenizerConfig(name=str(folder / "tokenizer.json"), eos_token="</s>"),
        "tiktoken": tiktoken(ranks),
    }
    return build_tokenizer(configs[request.param])


def test_text_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT.encode())
    assert tokenizer.decode(ids.tolist()) == TEXT
    assert tokenizer.decode([*ids.tolist(), tokenizer.end]) == TEXT
    assert len(ids) < len(TEXT.encode())
    assert 0 <= ids.max() < tokenizer.vocab_size


def test_bytes_are_counted_exactly_at_any_window_end(tokenizer):
    ids = tokenizer.encode(TEXT.encode())
    for cut in (1, 7, len(ids) // 2, len(ids)):
        assert tokenizer.bytes_in(ids[:cut]) + tokenizer.bytes_in(ids[cut:]) == len(TEXT.encode())


def test_identity_tells_tokenizers_apart(folder, ranks, tmp_path):
    changed = tmp_path / "tokenizer.json"
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 400, "content": "<more>"})
    changed.write_text(json.dumps(content))
    configs = [
        TokenizerConfig(),
        TokenizerConfig(name=str(folder)),
        TokenizerConfig(name=str(changed), eos_token="</s>"),
        tiktoken(ranks),
    ]
    assert len({build_tokenizer(config).identity for config in configs}) == 4
    assert (
        build_tokenizer(configs[1]).identity
        == build_tokenizer(TokenizerConfig(name=str(folder))).identity
    )


def test_a_special_token_s_text_in_a_document_is_plain_text(ranks):
    tokenizer = build_tokenizer(tiktoken(ranks))
    assert tokenizer.end not in tokenizer.encode(b"a <|endoftext|> b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"special_tokens": {}}, r"special_tokens must hold '<\|endoftext\|>'"),
        ({"pattern": None}, r"kwargs.file: needs tokenizer.kwargs.pattern beside it"),
        ({"file": "nowhere"}, r"kwargs.file: 'nowhere' does not exist"),
        (
            {"file": None, "encoding_name": "cl200k"},
            r"'cl200k', which is unknown to tiktoken; encodings: .*cl100k_base",
        ),
        (
            {"file": None},
            r"tokenizer.kwargs is missing; give encoding_name, model_name, or file and pattern",
        ),
    ],
)
def test_an_unavailable_tiktoken_encoding_is_refused(ranks, change, said):
    with pytest.raises(ConfigError, match=said):
        build_tokenizer(tiktoken(ranks, **change))


def test_a_tokenizer_that_does_not_say_how_a_document_ends(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(
        ConfigError,
        match=r"must say how a document ends, and has no token for it; give .*eos_token",
    ):
        build_tokenizer(TokenizerConfig(name=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"has no token '<eos>'; give tokenizer.eos_token"):
        build_tokenizer(TokenizerConfig(name=str(tmp_path), eos_token="<eos>"))


def test_a_path_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"tokenizer.name is 'byte'; give bytes, tiktoken, or the path"
    ):
        build_tokenizer(TokenizerConfig(name="byte"))
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json is not a tokenizer: "):
        build_tokenizer(TokenizerConfig(name=str(tmp_path)))


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ConfigError,
        match=r'needs tokenizers, which is not installed; pip install "tokenyard-train\[data',
    ):
        build_tokenizer(TokenizerConfig(name=str(tmp_path)))


def test_the_option_of_data_pack():
    assert parse_tokenizer("bytes", None) == TokenizerConfig()
    assert parse_tokenizer("some/folder", "</s>") == TokenizerConfig(
        name="some/folder", eos_token="</s>"
    )
    assert parse_tokenizer("tiktoken:cl100k_base", None).kwargs.encoding_name == "cl100k_base"
