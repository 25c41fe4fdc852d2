"""A tiktoken encoding as the tokenizer.json of an exported folder."""

import base64
import json
import os
import random
import sysconfig
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
from rich.console import Console

pytest.importorskip("tiktoken")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers", minversion="5.14")

import tokenizers
from transformers import AutoTokenizer

from tokenyard import ConfigError
from tokenyard_train.commands.export_tokenizer import (
    _copy_tokenizer,
    _like_trained,
    _write_tokenizer,
)
from tokenyard_train.commands.generate import generate
from tokenyard_train.commands.options import GenerateOptions
from tokenyard_train.commands.tokenizer_json import _byte_characters, tiktoken_tokenizer
from tokenyard_train.commands.train import train
from tokenyard_train.data import build_tokenizer
from tokenyard_train.data.schema import TiktokenKwargs, TokenizerConfig
from tokenyard_train.data.tiktoken_tokenizer import TiktokenTokenizer

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "r50k": r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k": rf"""[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}?"""
    rf"""|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}?|\p{{N}}{{1,3}}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "anything": r"[\s\S]{1,40}",
    "only letters": r"\p{L}+",
}
TEXTS = [
    "",
    " ",
    "don't  DON'T we'll\r\n\r\n\t x  ",
    "1 12 123 1234 123456789 ٣٤٥ ½",
    "Größe 東京 नमस्ते 👩\u200d👩\u200d👧 e\u0301 \u2581\u00a0\u3000",
    "def f(x):\n        return x**2  # <|endoftext> <|end|>\n" * 3,
]


def write_ranks(path, tokens):
    """Write tokens as a file of ranks and return its path."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def sources():
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_text(errors="replace") for path in sorted(folder.glob("*.py"))[:20]]


@pytest.fixture(scope="module")
def ranks(sources, tmp_path_factory):
    """A file of 1,000 ranks that the `tokenizers` library learned from source code."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sources, trainer)
    bytes_of = {character: byte for byte, character in enumerate(_byte_characters())}
    vocabulary = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(bytes_of[character] for character in token) for token, _ in vocabulary]
    return write_ranks(tmp_path_factory.mktemp("ranks") / "r.tiktoken", tokens)


def both(ranks, pattern, special):
    """Return a tiktoken encoding, and what its tokenizer.json loads as."""
    ours = TiktokenTokenizer(
        TiktokenKwargs(file=str(ranks), pattern=pattern, special_tokens=special)
    )
    return ours, tokenizers.Tokenizer.from_str(json.dumps(tiktoken_tokenizer(ours)))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_same_ids(ranks, sources, name):
    special = {"<|endoftext|>": 1005, "<|pad|>": 1002}  # with holes between
    ours, written = both(ranks, PATTERNS[name], special)
    for text in [*TEXTS, *sources]:
        ids = ours.encode(text.encode()).tolist()
        assert written.encode(text).ids == ids
        assert written.decode(ids) == ours.decode(ids)
    assert {token: written.token_to_id(token) for token in special} == special
    assert written.get_vocab_size() == 1002


@pytest.mark.parametrize("seed", range(8))
def test_the_same_ids_for_random_ranks(tmp_path, seed):
    """Some tokens are reached by several merges, and some by none."""
    draw = random.Random(seed)
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < 300:
        parts = tokens[97:100] + tokens[256:]
        merged = draw.choice(parts) + draw.choice(parts)
        token = draw.choice([merged, bytes(draw.choices(b"abc", k=5))])
        tokens += [token] * (token not in tokens)
    ranks = write_ranks(tmp_path / "r.tiktoken", tokens)
    ours, written = both(ranks, PATTERNS["anything"], {"<|endoftext|>": 300})
    for _ in range(30):
        text = "".join(draw.choices("abc", k=40))
        assert written.encode(text).ids == ours.encode(text.encode()).tolist()


def test_a_pattern_that_means_something_else_is_refused(ranks):
    """To tiktoken, a digit such as one half is no part of a word."""
    with pytest.raises(
        ConfigError, match=r"no tokenizer\.json can express .*the pattern '\\\\w\+'"
    ):
        both(ranks, r"\w+", {"<|endoftext|>": 1000})


def exported(tokenyard, config, folder, ranks, pattern):
    """Train one batch with a tiktoken tokenizer; return the exported folder and the errors."""
    kwargs = {"file": str(ranks), "pattern": pattern, "special_tokens": {"<|endoftext|>": 1005}}
    model = {"name": "mixtral", "size": "tiny", "hidden_size": 32, "intermediate_size": 24}
    tokenizer = {"name": "tiktoken", "kwargs": kwargs}
    train(config(max_duration="1ba", model=model, tokenizer=tokenizer), Console(quiet=True))
    code, _, errors = tokenyard("convert", str(folder / "run"), str(folder / "exported"))
    assert code == 0
    return folder / "exported", errors


def test_an_exported_run_of_tiktoken_brings_its_tokenizer(tokenyard, config, ranks, tmp_path):
    pattern = PATTERNS["cl100k"]
    folder, errors = exported(tokenyard, config, tmp_path, ranks, pattern)
    assert errors == ""
    options = {"prompt": ["3 times", "\u00e9"], "max_new_tokens": 9, "device": "cpu"}
    assert generate(GenerateOptions(folder, **options)) == generate(
        GenerateOptions(tmp_path / "run", **options)
    )
    ours, _ = both(ranks, pattern, {"<|endoftext|>": 1005})
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == 1005
    for text in [*TEXTS, "a <|endoftext|> b"]:
        assert theirs(text)["input_ids"] == ours.encode(text.encode()).tolist()


def test_a_tokenizer_that_cannot_be_written_is_named(tokenyard, config, ranks, tmp_path, caplog):
    folder, errors = exported(tokenyard, config, tmp_path, ranks, r"\w+")
    assert not (folder / "tokenizer.json").exists()
    said = errors + caplog.text
    assert "written without its tokenizer: no tokenizer.json can express" in said
    assert "give generate a tokenizer by --tokenizer" in said


def test_a_tokenizer_without_a_limit_is_copied(tmp_path):
    """transformers writes a model_max_length of 1e30."""
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    (source / "tokenizer.json").write_text("{}")
    options = {"model_max_length": int(1e30), "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(options))
    _copy_tokenizer(TokenizerConfig(name=str(source), eos_token="<end>"), target)
    written = json.loads((target / "tokenizer_config.json").read_text())
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    assert written == options | named


def test_the_text_of_the_end_token_is_text_to_an_exported_tokenizer_of_bytes(tmp_path):
    text = "a <|endoftext|> b"
    end = _write_tokenizer(TokenizerConfig(), tmp_path)
    ours = build_tokenizer(TokenizerConfig(name=str(tmp_path)))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == list(text.encode())
    assert ours.encode(text.encode()).tolist() == list(text.encode())
    assert theirs.eos_token_id == ours.end == end == 256
    assert theirs.decode([97, 256], skip_special_tokens=True) == ours.decode([97, 256]) == "a"


@pytest.mark.parametrize("path", ["folder", "file", "folder of the weights"])
def test_what_training_switched_off_is_not_exported(tmp_path, sources, path):
    """Dropout would give other ids on every call."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(dropout=0.5))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        sources,
        tokenizers.trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.enable_truncation(4)
    bpe.enable_padding(length=300, pad_id=0, pad_token="</s>")
    bpe.save(str(source / "tokenizer.json"))
    options = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(options))
    config = TokenizerConfig(name=str(source / "tokenizer.json" if path == "file" else source))
    ids = build_tokenizer(config).encode(sources[0][:2000].encode()).tolist()
    assert len(ids) > 300
    if path == "folder of the weights":
        with _like_trained(source) as folder:
            theirs = AutoTokenizer.from_pretrained(folder)
    else:
        _copy_tokenizer(config, target)
        theirs = AutoTokenizer.from_pretrained(target)
    assert theirs(sources[0][:2000])["input_ids"] == ids
