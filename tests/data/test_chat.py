"""Chat messages become text by the tokenizer's template, and their special tokens tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.test_contexts import make_contexts
from tsae.config.sections import DataConfig
from tsae.data.documents import Document, read_documents
from tsae.data.labelled import ResponsePair, labelled_texts, response_pairs
from tsae.runtime.errors import TsaeError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Any) -> Any:
    """One with a template that begins with BOS, and with tokens of its own for it."""
    return make_tokenizer(chat_template=TEMPLATE, additional_special_tokens=["<|im_start|>", "<|im_end|>"])


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def written(*messages: dict[str, Any]) -> str:
    return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


DIALOGUE = [user("Quick?"), assistant("Brown.")]


@pytest.mark.parametrize("column", ["messages", "dialogue"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_dialogues_are_documents_as_the_template_writes_them(tmp_path, tokenizer, name, column):
    named = [{**user("Quick?"), "name": "someone"}, assistant("Brown.")]
    rows = [{column: DIALOGUE, "topic": "a"}, {column: named, "topic": "b"}, {column: [], "topic": "c"}, {column: None}]
    data = DataConfig(
        source=write(tmp_path / name, rows),
        label_field="topic",
        **({"text_field": column} if column == "dialogue" else {}),
    )
    text = written(*DIALOGUE)
    assert list(read_documents(data, tokenizer)) == [Document(text, "a", True), Document(text, "b", True)]


def test_text_in_parts_is_one_text(tmp_path, tokenizer):
    parts = [user([{"type": "text", "text": "Quick"}, {"type": "text", "text": " fox?"}]), assistant("Brown.")]
    [document] = read_documents(DataConfig(source=write(tmp_path / "a.jsonl", [{"messages": parts}])), tokenizer)
    assert document.text == written(user("Quick fox?"), assistant("Brown."))


def test_what_the_template_writes_is_tokens_and_what_a_text_spells_is_not(tokenizer):
    spelled = written(*DIALOGUE)
    documents = [Document(spelled, None, True), Document(spelled + " It reads.", None)]
    contexts = make_contexts(documents, tokenizer, DataConfig(source="a.jsonl", context_length=128, bos="always"))
    start, bos = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.bos_token_id
    found = {int(row.max()): tokens for row, tokens in zip(contexts.document, contexts.tokens, strict=True)}
    assert [(found[index] == start).sum() for index in (0, 1)] == [2, 0]
    assert [(tokens == bos).sum() for tokens in found.values()] == [1, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": DIALOGUE}, {"messages": [user("a"), {"from": "gpt", "value": "b"}]}], r"a.jsonl: line 2: message 2: a message with role and content, .* found the keys: from, value"),
        ([{"messages": [user(None)]}], r"line 1: message 1: a message with role and content"),
        ([{"messages": [user("a"), {"role": "judge", "content": "b"}]}], r"line 1: the tokenizer's chat template refuses this dialogue: no such role"),
        ([{"text": DIALOGUE}, {"text": ["a"]}], r"line 2: data.text_field: column 'text' holds list, not text"),
        ([{"turns": DIALOGUE}], r"line 1: data.text_field: no column 'text'; .*columns found: turns"),
    ],
)  # fmt: skip
def test_what_is_no_dialogue_is_named_by_its_line(tmp_path, tokenizer, rows, message):
    with pytest.raises(TsaeError, match=message) as raised:
        list(read_documents(DataConfig(source=write(tmp_path / "a.jsonl", rows)), tokenizer))
    assert "\n" not in str(raised.value)


def test_a_tokenizer_without_a_template_is_refused_in_a_line(tmp_path, make_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"messages": DIALOGUE}])
    with pytest.raises(TsaeError, match=r"line 1: holds chat messages, and .* tokenizer has no chat template"):
        list(read_documents(DataConfig(source=path), make_tokenizer()))
    pairs = write(tmp_path / "b.jsonl", [{"chosen": DIALOGUE, "rejected": [user("Quick?"), assistant("Red.")]}])
    with pytest.raises(TsaeError, match=r"line 1: holds chat messages, and .* tokenizer has no chat template"):
        list(response_pairs(pairs, make_tokenizer()))
    with pytest.raises(TsaeError, match=r"line 1: holds chat messages, .*; text is expected"):
        list(labelled_texts(pairs))


ASKED = [user("Quick?")]
GOOD, BAD = assistant("Brown."), assistant("Blue.")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": ASKED, "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        {"prompt": "Quick?", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        {"prompt": "Quick?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": ASKED, "chosen": "Brown.", "rejected": "Blue."},
    ],
)
def test_preferences_of_messages_have_their_answers_behind_what_both_are_asked(tmp_path, tokenizer, row, name):
    [pair] = response_pairs(write(tmp_path / name, [row]), tokenizer)
    asked = written(*ASKED) + "<|im_start|>assistant\n"
    assert pair == ResponsePair(written(*ASKED, GOOD), written(*ASKED, BAD), len(asked), True)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("The fox is", " quick.", " lazy.", ResponsePair("The fox is quick.", "The fox is lazy.", 10)),
        ("The fox", "The fox is", "The fox was", ResponsePair("The fox is", "The fox was", 7)),
        ("Human: Hi. Assistant:", " I am.", " I was.", ResponsePair("Human: Hi. Assistant: I am.", "Human: Hi. Assistant: I was.", 21)),
        ("Hi.", "Human: Hi. Assistant: I.", "Human: Hi. Assistant: You.", ResponsePair("Human: Hi. Assistant: I.", "Human: Hi. Assistant: You.")),
        ("Hi.", "Assistant: I.", "Assistant: You.", ResponsePair("Hi.Assistant: I.", "Hi.Assistant: You.", 3)),
        (None, "Human: Hi. Assistant: I.", "Human: Hi. Assistant: You.", ResponsePair("Human: Hi. Assistant: I.", "Human: Hi. Assistant: You.")),
    ],
)  # fmt: skip
def test_preferences_of_text_begin_with_their_prompt_once(tmp_path, prompt, chosen, rejected, expected):
    path = write(tmp_path / "a.jsonl", [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    assert list(response_pairs(path, None)) == [expected]


@pytest.mark.parametrize("chosen", [None, 5, ["words"], []])
def test_preferences_of_anything_else_are_named_by_their_line(tmp_path, tokenizer, chosen):
    rows = [{"chosen": "a", "rejected": "b"}, {"prompt": "c", "chosen": chosen, "rejected": "d"}]
    with pytest.raises(TsaeError, match=r"a.jsonl: line 2: expected columns: chosen and rejected, both text or both"):
        list(response_pairs(write(tmp_path / "a.jsonl", rows), tokenizer))
