"""The finetuning loader: rows, chat templates, supervised tokens and packing."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenyard import IGNORED, PADDING, ConfigError
from tokenyard_train.data import PackedDocuments, build_data
from tokenyard_train.data.finetuning.first_fit import first_fit
from tokenyard_train.data.schema import DataSettings, FinetuningLoader, TokenizerConfig

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

import tokenizers

from ..chat_folder import CHATML, write_tokenizer

MARKED = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}[{{ message.content }}]{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3's: an earlier answer loses what the last one has
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 7 + 1?"},
    {"role": "assistant", "content": "It is 8."},
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), [json.dumps(CHAT)])


MARK = "an answer \ufdd0 with a mark"


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tokenizer: str | Path, length: int = 128, seed: int = 3, **dataset) -> PackedDocuments:
    loader = FinetuningLoader(name="finetuning", dataset=dataset)
    settings = DataSettings(TokenizerConfig(name=str(tokenizer)), loader, None, length, seed, 1, -1)
    data = build_data(settings)
    assert isinstance(data.train, PackedDocuments)
    return data.train


def texts(tokenizer: Path, packed: PackedDocuments) -> list[tuple[str, str]]:
    """The whole text of each document in order, and the text of its supervised tokens."""
    decode = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    ids, targets, ends = packed.documents
    spans = [slice(a, b) for a, b in zip([0, *ends], ends)]
    return [
        tuple(decode(part, skip_special_tokens=False) for part in (ids[s], ids[s][targets[s]]))
        for s in spans
    ]


def test_a_conversation_is_what_transformers_renders(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    packed = load(folder, path=write(tmp_path / "a.jsonl", [{"messages": CHAT, "id": 7}]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    want = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert packed.documents.ids.tolist() == want
    ((whole, answers),) = texts(folder, packed)
    assert whole == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert answers == "5<|im_end|>\nIt is 8.<|im_end|>\n"


@pytest.mark.parametrize(
    ("options", "supervised"),
    [
        ({}, "5<|im_end|>\nIt is 8.<|im_end|>\n"),
        ({"target_responses": "last"}, "It is 8.<|im_end|>\n"),
        ({"target_prompts": "length>=1000"}, "5<|im_end|>\nIt is 8.<|im_end|>\n"),
    ],
)
def test_which_tokens_are_supervised(folder, tmp_path, options, supervised):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    assert texts(folder, load(folder, path=path, **options))[0][1] == supervised


def test_all_prompts_may_be_supervised_but_for_the_first_token(folder, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    packed = load(folder, path=path, target_prompts="all")
    assert packed.documents.targets.tolist() == [False] + [True] * (len(packed.documents.ids) - 1)


def test_generation_blocks_mark_answers_as_in_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    template = tmp_path / "marked.jinja"
    template.write_text(MARKED)
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    packed = load(folder, path=path, chat_template=str(template))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    want = tokenizer.apply_chat_template(
        CHAT,
        chat_template=MARKED,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert packed.documents.ids.tolist() == want["input_ids"]
    assert packed.documents.targets.tolist() == [bool(n) for n in want["assistant_masks"]]
    last = load(folder, path=path, chat_template=str(template), target_responses="last")
    assert texts(folder, last)[0][1] == "It is 8.<|im_end|>"


def test_the_last_answer_may_have_several_blocks_or_none(folder, tmp_path):
    template = tmp_path / "marked.jinja"
    options = {
        "path": write(tmp_path / "a.jsonl", [{"messages": CHAT}]),
        "target_responses": "last",
    }
    block = "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    two = "{% generation %}<think></think>{% endgeneration %}" + block
    template.write_text(MARKED.replace(block, two))
    last = load(folder, **options, chat_template=str(template))
    assert texts(folder, last)[0][1] == "<think></think>It is 8.<|im_end|>"
    first = block + "{% break %}"  # renders and marks the first answer alone
    template.write_text(MARKED.replace(block, first))
    with pytest.raises(ConfigError, match="no generation block of the chat template renders it"):
        load(folder, **options, chat_template=str(template))


def test_marks_of_answers_in_a_message_are_refused_or_kept(folder, tmp_path):
    """They are noncharacters, which a text may hold all the same."""
    template = tmp_path / "marked.jinja"
    template.write_text(MARKED)
    path = write(tmp_path / "a.jsonl", [{"messages": [*CHAT[:-1], {**CHAT[-1], "content": MARK}]}])
    with pytest.raises(ConfigError, match=r"line 1.* holds the noncharacter U\+FDD0 or U\+FDD1"):
        load(folder, path=path, chat_template=str(template))
    assert len(load(folder, path=path).documents.ids) > 0


def test_a_template_that_changes_earlier_answers(folder, tmp_path):
    template = tmp_path / "thinking.jinja"
    template.write_text(THINKING)
    options = {
        "path": write(tmp_path / "a.jsonl", [{"messages": CHAT}]),
        "chat_template": str(template),
    }
    with pytest.raises(ConfigError, match=r"line 1: .* say dataset.target_responses: last, or"):
        load(folder, **options)
    last = load(folder, target_responses="last", **options)
    assert texts(folder, last)[0][1] == "<think></think>It is 8.<|im_end|>\n"


def test_a_template_file_beside_the_tokenizer_comes_first(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>", ">"))
    packed = load(tmp_path, path=write(tmp_path / "a.jsonl", [{"messages": CHAT[1:3]}]))
    assert texts(tmp_path, packed)[0][0].startswith(">user\nWhat")


@pytest.mark.parametrize("answer", ["response", "completion"])
def test_a_prompt_and_its_response_are_plain_text(tmp_path, answer):
    packed = load("bytes", path=write(tmp_path / "a.jsonl", [{"prompt": "2+2=", answer: "4"}]))
    assert packed.documents.ids.tolist() == [*b"2+2=4", 256]
    assert packed.documents.targets.tolist() == [False] * 4 + [True] * 2


def test_instructions_and_prompts_of_messages_are_conversations(folder, tmp_path):
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"prompt": CHAT[:2], "completion": CHAT[2:3]},
    ]
    packed = load(folder, path=write(tmp_path / "a.jsonl", rows))
    assert texts(folder, packed) == [
        (
            "<|im_start|>user\nAdd.\n\n2 and 2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
            "4<|im_end|>\n",
        ),
        (
            "<|im_start|>user\nGreet.<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n",
            "Hi<|im_end|>\n",
        ),
        (
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n"
            "<|im_start|>assistant\n5<|im_end|>\n",
            "5<|im_end|>\n",
        ),
    ]


def test_every_kind_of_file_gives_the_same_documents(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    from pyarrow import parquet

    rows = [{"messages": CHAT}, {"messages": CHAT[1:3]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    sources = [
        {"path": write(tmp_path / "a.jsonl", rows)},
        {"path": str(tmp_path / "a.jsonl.gz")},
        {"path": str(tmp_path / "a.json")},
        {"path": str(tmp_path / "a.parquet")},
        {"hf_name": str(tmp_path / "saved")},
    ]
    identities = {load(folder, **source).identity() for source in sources}
    assert len(identities) == 1


CHAT_ERRORS = [
    ([], "messages is no list of messages"),
    (CHAT[:2], "the last message is from 'user'; it must be from 'assistant'"),
    (CHAT[2:], "message 1 is from 'assistant' where system or developer or user must follow"),
    (CHAT[1:3] + CHAT[2:3], "message 3 is from 'assistant' where user or tool must follow"),
    ([CHAT[1], CHAT[0]], "message 2 is from 'system' where assistant must follow"),
    ([{"role": "human", "content": "x"}], "message 1 is from 'human' where system or"),
    ([{"from": "human", "value": "x"}], "message 1 has no role; give role and content"),
    (
        [CHAT[1], {"role": "assistant", "content": " \n"}],
        "'assistant', is empty; leave the row out",
    ),
    ([CHAT[1], {"role": "assistant", "content": 5}], "'assistant', is int, not text"),
    ([CHAT[1], CHAT[2] | {"weight": 0}], "'assistant', has the weight 0, which is not read"),
    ([CHAT[1], CHAT[2] | {"train": False}], "'assistant', has the train False, which is not read"),
]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        *(({"messages": messages}, said) for messages, said in CHAT_ERRORS),
        ({"prompt": "x", "response": ""}, "its response is empty; leave the row out"),
        ({"prompt": None, "response": "y"}, "its prompt is null, not text"),
        ({"instruction": "x", "input": 0, "output": "y"}, "its instruction's input is int, not"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "preferences are not trained on"),
        ({"conversations": []}, "has conversations; a row has messages, prompt and response, or"),
        ({"prompt": "x", "response": "y\ud800"}, "has a lone surrogate, which is not text"),
        ([1], "is no object with columns; a row has messages"),
    ],
)
def test_a_wrong_row_is_one_sentence_with_file_and_row(folder, tmp_path, row, said):
    good = {"messages": CHAT}
    path = write(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(ConfigError) as raised:
        load(folder, path=path)
    message = str(raised.value)
    assert f"train_loader.dataset.path: {path} line 2" in message
    assert said in message
    assert "\n" not in message


def test_without_a_template_a_conversation_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="line 1 is a conversation, and the tokenizer has no"):
        load("bytes", path=write(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    with pytest.raises(ConfigError, match=r"chat_template is .*, which is no file; give one of"):
        load("bytes", path=str(tmp_path / "a.jsonl"), chat_template=str(tmp_path))
    bare = shutil.copytree(folder, tmp_path / "tokenizer")
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": ["x"]}))
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        load(bare, path=str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for %}", "is not a chat template"),
        ("{{ raise_exception('No system role.') }}", "line 1: the chat template refuses it: No sy"),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses it: access to attribute"),
        ("hello", "its answers have no tokens; look at the chat template"),
    ],
)
def test_a_template_is_rendered_in_a_sandbox(folder, tmp_path, source, said):
    template = tmp_path / "t.jinja"
    template.write_text(source)
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(ConfigError) as raised:
        load(folder, path=path, chat_template=str(template))
    assert said in str(raised.value)


def test_a_row_longer_than_the_window(tmp_path, caplog):
    rows = [{"prompt": "x", "response": "y" * n} for n in (14, 15, 3)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConfigError, match="line 2 has 16 tokens, of which 16 are supervised"):
        load("bytes", length=15, path=path)
    assert len(load("bytes", length=16, path=path).documents.ends) == 3
    packed = load("bytes", length=15, path=path, overlong="drop")
    assert len(packed.documents.ends) == 2
    assert "1 rows are longer than max_seq_len; dropped" in caplog.text


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"packing_ratio": 2.5}, "needs no ratio; say auto"),
        ({"decoder_only_format": False}, "an encoder-decoder model is not supported"),
        ({"target_prompts": "some"}, "give none, all, or length>= and a number"),
        ({"hf_name": "x"}, "it has path and hf_name"),
    ],
)
def test_keys_without_a_meaning_are_refused(option, said):
    with pytest.raises(ValueError, match=said):
        FinetuningLoader(name="finetuning", dataset={"path": "a.jsonl"} | option)


def test_a_key_of_another_location_is_refused(folder):
    with pytest.raises(ConfigError, match=r"dataset.split is 'train', .* path; .* is for hf_name"):
        load(folder, path="a.jsonl", split="train")


@given(sizes=st.lists(st.integers(0, 20), max_size=60))
def test_first_fit_is_first_fit(sizes):
    room: list[int] = []
    want = []
    for size in sizes:
        row = next((i for i, free in enumerate(room) if free >= size), len(room))
        if row == len(room):
            room.append(20)
        room[row] -= size
        want.append(row)
    assert first_fit(sizes, 20).tolist() == want


@pytest.fixture
def packed(tmp_path):
    """Rows of 32 tokens from 50 documents of bytes."""
    sizes = np.random.default_rng(0).integers(1, 25, 50)
    rows = [{"prompt": f"{i:02}", "response": "y" * n} for i, n in enumerate(sizes)]
    return load("bytes", length=32, path=write(tmp_path / "a.jsonl", rows))


def test_an_epoch_has_every_document_once_and_whole(packed):
    seen = []
    (batch,) = packed.microbatches(0, len(packed), 0, 1, len(packed))
    ids, targets, documents = batch
    for row, numbers in enumerate(documents.ids):
        for number in range(int(numbers.max()) + 1):
            here = numbers == number
            assert documents.positions[row, here].tolist() == list(range(int(here.sum())))
            kept = targets[row, here]
            assert kept[:1].tolist() == [IGNORED]  # a prompt
            assert kept[2:].tolist()[:-1] == ids[row, here][3:].tolist()
            assert kept[-1] == 256
            seen.append(bytes(ids[row, here][:2].tolist()).decode())
    assert sorted(seen) == [f"{i:02}" for i in range(50)]
    assert (targets[documents.ids == PADDING] == IGNORED).all()
    assert batch.count_tokens() == (packed.tokens, packed.supervised)
    assert packed.describe().startswith(f"50 documents, {packed.tokens:,} tokens, of which")


def test_shapes_depend_on_the_number_of_rows_alone(packed):
    shapes = set()
    for step in range(8):
        (batch,) = packed.microbatches(step, 3, 0, 1, 3)
        shapes.add((batch.documents.offsets.shape, batch.documents.longest))
        assert batch.documents.offsets.diff().max() <= batch.documents.longest
    assert len(shapes) == 1


def test_samples_do_not_depend_on_ranks_or_microbatches(packed):
    whole = [packed.microbatches(step, 4, 0, 1, 4)[0].ids for step in range(20)]
    for step, rows in enumerate(whole):
        shares = [packed.microbatches(step, 4, rank, 2, 1) for rank in range(2)]
        again = [part.ids for pair in zip(*shares) for part in pair]
        assert torch.equal(torch.cat(again), rows)
    epochs = torch.cat(whole).split(len(packed))
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist())
    assert epochs[0].tolist() != epochs[1].tolist()


def test_packing_is_drawn_from_the_seed(packed, tmp_path):
    path = str(tmp_path / "a.jsonl")
    again = load("bytes", length=32, path=path)
    other = load("bytes", length=32, seed=4, path=path)
    in_order = load("bytes", length=32, path=path, shuffle=False)
    rows = [p.batch(range(4)).ids.tolist() for p in (packed, again, other, in_order)]
    assert rows[0] == rows[1] != rows[2]
    assert bytes(rows[3][0][:2]) == b"00"
    assert packed.identity() == other.identity()


ANSWER = {"role": "assistant", "content": "It is 8."}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add_up"}}]}


@pytest.mark.parametrize(
    ("messages", "template", "said"),
    [
        (CHAT, "{% for m in messages if m.role != 'system' %}{{ m.content }};{% endfor %}",
         "content of message 1"),
        ([CHAT[1], ANSWER | {"reasoning_content": "I add them."}], CHATML,
         "reasoning_content of message 2"),
        ([CHAT[1], CALL | {"content": ""}], CHATML, "a tool call of message 2"),
        ([CHAT[1], ANSWER], "{% for m in messages %}{{ m.content|upper }};{% endfor %}",
         "content of message 1"),
    ],
)  # fmt: skip
def test_a_template_that_leaves_out_text_is_named(
    folder, tmp_path, messages, template, said, caplog
):
    path = write(tmp_path / "a.jsonl", [{"messages": messages}] * 3)
    (tmp_path / "t.jinja").write_text(template)
    load(folder, path=path, chat_template=str(tmp_path / "t.jinja"))
    (record,) = caplog.records
    assert record.getMessage() == (
        "train_loader.dataset: the chat template leaves out or changes a text of 3 conversations, "
        f"such as {said} of train_loader.dataset.path: {path} line 1"
    )


def test_a_template_that_renders_all_text_is_not_named(folder, tmp_path, caplog):
    """Stripped, or quoted as JSON, too."""
    quoted = "{% for m in messages %}{{ m.content|trim|tojson }}{{ m.tool_calls }};{% endfor %}"
    (tmp_path / "t.jinja").write_text(quoted)
    spoken = {"role": "user", "content": ' say "hi"\n\u00e9 '}
    rows = [{"messages": CHAT}, {"messages": [spoken, ANSWER]}, {"messages": [spoken, CALL]}]
    load(folder, path=write(tmp_path / "a.jsonl", rows), chat_template=str(tmp_path / "t.jinja"))
    assert caplog.text == ""


def test_columns_that_are_not_read_are_named_once(folder, tmp_path, caplog):
    rows = [
        {"messages": CHAT, "tools": None, "id": 0, "prompt": "x"},
        {"instruction": "add", "input": "1 2", "output": "3", "system": "Be short.", "history": []},
        {"prompt": "1 +", "response": " 2", "completion": " 3", "messages_of": None},
    ]
    load(folder, path=write(tmp_path / "a.jsonl", rows))
    (record,) = caplog.records
    assert record.getMessage() == (
        "train_loader.dataset: columns that are not read: completion, prompt, system"
    )


def test_characters_that_a_tokenizer_lacks_in_conversations_are_counted(tmp_path, caplog):
    vocab = {character: i for i, character in enumerate("abc ")} | {"</s>": 4}
    lossy = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    lossy.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    rows = [{"prompt": "ab\u00e9", "response": "c"}, {"prompt": "ab", "response": "c\u00e9"}]
    load(tmp_path, path=write(tmp_path / "a.jsonl", rows))
    assert "train_loader.dataset: 2 prompts and answers contain characters" in caplog.text
