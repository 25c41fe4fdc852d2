"""Tokenizers from Hugging Face files and tiktoken ranks."""

import base64
import json
from pathlib import Path

import pytest

from tokenyard import ConfigError
from tokenyard_models.strict_config import parse
from tokenyard_train.commands.data import parse_tokenizer
from tokenyard_train.data import BytesTokenizer, build_tokenizer
from tokenyard_train.data.build import tokenize
from tokenyard_train.data.packing import pack
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.unused_keys import check_tokenizer

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
    with pytest.raises(ConfigError, match=r"has no token '<eos>', which eos_token names; .*'</s>'"):
        build_tokenizer(TokenizerConfig(name=str(tmp_path), eos_token="<eos>"))


def test_a_path_without_a_tokenizer_is_refused(tmp_path):
    said = r"tokenizer.name is 'byte' \(looked for .*byte\); give bytes, tiktoken, the path"
    with pytest.raises(ConfigError, match=said):
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


def changed(folder: Path, tmp_path: Path, **changes: object) -> TokenizerConfig:
    """Return the config of a copy of a folder's tokenizer.json with changed keys."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= changes.pop("model", {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | changes))
    return TokenizerConfig(name=str(tmp_path), eos_token="</s>")


@pytest.mark.parametrize(
    "state",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst",
                        "stride": 0}},
        {"padding": {"strategy": {"Fixed": 5000}, "direction": "Left", "pad_to_multiple_of": None,
                     "pad_id": 0, "pad_type_id": 0, "pad_token": "</s>"}},
        {"model": {"dropout": 0.9}},
    ],
    ids=["truncation", "padding", "dropout"],
)  # fmt: skip
def test_what_training_left_in_a_tokenizer_is_off(folder, tmp_path, state):
    plain = build_tokenizer(TokenizerConfig(name=str(folder)))
    tokenizer = build_tokenizer(changed(folder, tmp_path, **state))
    assert tokenizer.encode(TEXT.encode()).tolist() == plain.encode(TEXT.encode()).tolist()


@pytest.mark.parametrize("size", [4_000_000_000, -1, "a", 1 << 70])
def test_an_id_far_beyond_the_vocabulary_is_refused(folder, tmp_path, size):
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    with pytest.raises(
        ConfigError, match=rf"is not a tokenizer: it has \d+ tokens, and one .*{size}"
    ):
        build_tokenizer(changed(folder, tmp_path, model={"vocab": vocab | {"zz": size}}))
    added = [{"id": size, "content": "zz", "special": True}]
    with pytest.raises(ConfigError, match=r"is not a tokenizer: it has \d+ tokens"):
        build_tokenizer(changed(folder, tmp_path, added_tokens=added))


@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff", b"5", b"{}", b'{"model": 5}', b""])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer.json is not a tokenizer: "):
        build_tokenizer(TokenizerConfig(name=str(tmp_path), eos_token="</s>"))


def test_an_empty_vocabulary(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"has no token '</s>', which eos_token names; give"):
        build_tokenizer(TokenizerConfig(name=str(tmp_path), eos_token="</s>"))


@pytest.mark.parametrize("config", ['{"eos_token": 5}', '{"eos_token": {"content": [1]}}'])
def test_an_end_token_that_is_no_text(folder, tmp_path, config):
    changed(folder, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"tokenizer_config.json has the eos_token .*, which is"):
        build_tokenizer(TokenizerConfig(name=str(tmp_path)))


@pytest.mark.parametrize("i", [-1, 0, 262, 99_999_999_999, 1 << 70])
def test_a_special_id_that_cannot_be(ranks, i):
    with pytest.raises(
        ConfigError, match=rf"gives '<|endoftext|>' the id {i}; .*the next free id is 263"
    ):
        build_tokenizer(tiktoken(ranks, special_tokens={"<|endoftext|>": i}))


def test_a_pattern_that_is_no_regular_expression(ranks):
    with pytest.raises(ConfigError, match=r"or the pattern is no regular expression: "):
        build_tokenizer(tiktoken(ranks, pattern="("))


def test_ids_without_a_token_have_no_text(tokenizer):
    """Padded rows of the embedding, holes, and ids of any other vocabulary."""
    ids = tokenizer.encode(b"text").tolist()
    odd = [tokenizer.vocab_size, tokenizer.vocab_size + 999, 99_999, 2**31, -1, -100]
    assert tokenizer.decode([*odd, *ids, tokenizer.end, *odd]) == "text"
    assert build_tokenizer(TokenizerConfig()).decode([*odd, *b"text", 256, 257]) == "text"


def test_documents_with_the_text_of_the_end_token_are_counted(folder, tmp_path, caplog):
    """It becomes the end id, as in transformers, or text by the option of transformers."""
    config = TokenizerConfig(name=str(folder))
    texts = [b"a </s> b", b"plain", b"</s></s>"]
    ids = tokenize(texts, build_tokenizer(config), "eval_loader.dataset")
    assert (ids == build_tokenizer(config).end).sum() == 3 + len(texts)
    assert "eval_loader.dataset: 2 documents contain the text of the end-of-document" in caplog.text
    caplog.clear()
    pack(tmp_path / "packed", lambda: iter(texts), config, [], 1, lambda done: None)
    assert "packed: 2 documents contain the text of the end-of-document token" in caplog.text
    caplog.clear()
    plain = changed(folder, tmp_path)
    options = {"eos_token": "</s>", "split_special_tokens": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    ids = tokenize(texts, build_tokenizer(plain), "eval_loader.dataset")
    assert (ids == build_tokenizer(plain).end).sum() == len(texts)
    assert build_tokenizer(plain).decode(ids.tolist()) == "a </s> bplain</s></s>"
    assert caplog.text == ""


def test_characters_that_a_tokenizer_lacks_are_counted(folder, tmp_path, caplog):
    tokenizers = pytest.importorskip("tokenizers")
    lossy = tokenizers.Tokenizer(tokenizers.models.BPE())
    lossy.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    lossy.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"])
    lossy.train_from_iterator(["plain words of text, such as the quick brown fox"], trainer)
    lossy.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(TokenizerConfig(name=str(tmp_path), eos_token="</s>"))
    texts = ["plain\n words", "the \u6771", "fox \u6771\u4eac \u00e9"]
    tokenize([text.encode() for text in texts], tokenizer, "train_loader.dataset")
    assert "train_loader.dataset: 2 documents contain characters that the tokenizer" in caplog.text
    assert r"(3 different ones, such as '\xe9' '\u4eac' '\u6771')" in caplog.text
    caplog.clear()
    for kept in (BytesTokenizer(), build_tokenizer(TokenizerConfig(name=str(folder)))):
        tokenize([text.encode() for text in texts] + [TEXT.encode()], kept, "dataset")
    assert caplog.text == ""


def words_tokenizer(folder, normalizer, pre_tokenizer):
    """Write a tokenizer of all bytes behind a normalizer that may drop text; return it."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: i for i, token in enumerate([*sorted(alphabet), "</s>"])}
    lossy = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    lossy.add_special_tokens(["</s>"])
    if normalizer is not None:
        lossy.normalizer = normalizer
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = [byte_level] if pre_tokenizer is None else [pre_tokenizer, byte_level]
    lossy.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    lossy.decoder = tokenizers.decoders.ByteLevel()
    lossy.save(str(folder / "tokenizer.json"))
    return TokenizerConfig(name=str(folder), eos_token="</s>")


DROPPING = {
    "strip": (lambda t: (t.normalizers.Strip(), None), "'  two  w' became 'two  wor'"),
    "collapse": (
        lambda t: (t.normalizers.Replace(t.Regex(r"\s+"), " "), None),
        "'  two  wo' became ' two word'",
    ),
    "split": (
        lambda t: (None, t.pre_tokenizers.WhitespaceSplit()),
        "'  two  w' became 'twowords'",
    ),
}


@pytest.mark.parametrize("kind", DROPPING)
def test_spaces_that_a_tokenizer_drops_are_counted(tmp_path, caplog, kind):
    make, example = DROPPING[kind]
    config = words_tokenizer(tmp_path, *make(pytest.importorskip("tokenizers")))
    texts = [b"  two  words  "] * 40
    said = f"3 of 3 compared documents differ from the text of their ids ({example})"
    tokenize(texts, build_tokenizer(config), "train_loader.dataset")
    assert f"train_loader.dataset: {said}" in caplog.text
    caplog.clear()
    pack(tmp_path / "packed", lambda: iter(texts), config, [], 1, lambda done: None)
    assert f"packed: {said}" in caplog.text
    assert len(caplog.records) == 1


def test_text_that_a_tokenizer_keeps_is_not_counted(tmp_path, tokenizer, caplog):
    """Special tokens in a text and a long document that is compared in part, too."""
    kept = build_tokenizer(words_tokenizer(tmp_path, None, None))
    texts = [b" a\t\r\n \n b ", "\u00e9\u6771\ufffd".encode() * 30_000, b"", TEXT.encode()]
    for each in (kept, tokenizer):
        for text in texts:
            tokenize([text], each, "dataset")
    assert caplog.text == ""
    tokenize([b"a </s>b"], kept, "dataset")
    assert [r.getMessage().partition(",")[0] for r in caplog.records] == [
        "dataset: 1 documents contain the text of the end-of-document token"
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [*lines[:-1], lines[-1].rpartition(" ")[0] + " 3"], "two tokens of one id"),
        (lambda lines: lines[4:], "no token for 4 of the 256 bytes"),
        (lambda lines: [], "no token for 256 of the 256 bytes"),
    ],
)
def test_ranks_that_are_not_whole(ranks, tmp_path, change, said):
    """tiktoken would panic, perhaps at a later text."""
    (tmp_path / "bad").write_text("\n".join(change(ranks.read_text().splitlines())) + "\n")
    with pytest.raises(ConfigError, match=rf"kwargs.file: .*bad has {said}; copy the file again"):
        build_tokenizer(tiktoken(ranks, file=str(tmp_path / "bad")))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"file": "x", "encoding_name": "gpt2"}, "has file 'x' and encoding_name 'gpt2'; give one"),
        (
            {"encoding_name": "gpt2", "model_name": "gpt-4"},
            "has encoding_name 'gpt2' and model_name 'gpt-4'; give one of them",
        ),
        (
            {"encoding_name": "gpt2", "pattern": "x"},
            ".pattern is 'x', which has no effect beside encoding_name; .* it is for file",
        ),
    ],
)
def test_options_of_tiktoken_that_exclude_each_other(kwargs, said):
    config = parse(TokenizerConfig, {"name": "tiktoken", "kwargs": kwargs})
    with pytest.raises(ConfigError, match=rf"tokenizer.kwargs ?{said}"):
        check_tokenizer(config)
