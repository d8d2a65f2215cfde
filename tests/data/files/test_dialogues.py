"""Dialogues as other projects write them become the same examples, and what they were taken for is told."""

import json

import numpy as np
import pytest
from conftest import small_config

from jaxlm.data.examples import Examples
from jaxlm.data.files.tables import read_examples
from jaxlm.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def read(path, *records, task="sft", columns=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_examples(str(path), task, columns)[0]


def refused(path, *records, task="sft"):
    with pytest.raises(DataError) as error:
        read(path, *records, task=task)
    return str(error.value)


TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
ALPACA = {"instruction": "add", "input": "1 2", "output": "3"}
SFT = [
    ({"id": 1, "conversations": TURNS}, {"messages": [user("hi"), says("hello")]}, "ShareGPT"),
    (
        {"conversations": TURNS, "system": "be"},
        {"messages": [{"role": "system", "content": "be"}, user("hi"), says("hello")]},
        "ShareGPT",
    ),
    (
        {"conversation": [user("hi"), says("hello")]},
        {"messages": [user("hi"), says("hello")]},
        "ShareGPT",
    ),
    ({"messages": TURNS}, {"messages": [user("hi"), says("hello")]}, ""),
    (ALPACA | {"text": "all"}, {"prompt": "add\n\n1 2", "response": "3"}, "Alpaca"),
    (ALPACA | {"input": ""}, {"prompt": "add", "response": "3"}, "Alpaca"),
    (
        ALPACA | {"history": [["a", "b"]]},
        {"messages": [user("a"), says("b"), user("add\n\n1 2"), says("3")]},
        "Alpaca",
    ),
    (
        {"instruction": "add", "context": "1 2", "response": "3"},
        {"prompt": "add\n\n1 2", "response": "3"},
        "context",
    ),
    ({"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}, "completion"),
    (
        {"prompt": [user("a")], "completion": [says("b")]},
        {"messages": [user("a"), says("b")]},
        "completion",
    ),
    (
        {"messages": [user([{"type": "text", "text": "a"}]), says("b") | {"weight": 0}]},
        {"messages": [user("a"), says("b") | {"weight": 0}]},
        "",
    ),
    ({"messages": [user("a"), says("b")]}, {"messages": [user("a"), says("b")]}, ""),
]


@pytest.mark.parametrize(("record", "expected", "told"), SFT, ids=range(len(SFT)))
def test_dialogues_are_read_and_told(tmp_path, record, expected, told, caplog):
    assert read(tmp_path / "a.jsonl", record, record) == [expected, expected]
    assert bool(caplog.text) == bool(told)
    assert told in caplog.text
    assert caplog.text.count("taken for") <= 1


def test_a_table_of_instructions_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,input,output\nadd,1 2,3\nsay x,,x\n")
    expected = [{"prompt": "add\n\n1 2", "response": "3"}, {"prompt": "say x", "response": "x"}]
    assert read_examples(str(path), "sft", "")[0] == expected


HINTS = [
    {"id": "a", "question": "a", "answer": "b"},
    {"query": "a", "response": "b"},
    {"prompt": "a", "answer": "b"},
    {"input": "a", "output": "b"},
    {"what is": "a", "what follows": "b"},
]


@pytest.mark.parametrize("record", HINTS, ids=range(len(HINTS)))
def test_what_to_type_for_other_columns_works_as_typed(tmp_path, record):
    message = refused(tmp_path / "a.jsonl", record)
    columns = message.partition('--config.data.columns="')[2].partition('"')[0]
    assert read(tmp_path / "a.jsonl", record, columns=columns) == [{"prompt": "a", "response": "b"}]


def test_speakers_that_are_not_known_are_named(tmp_path):
    tool = {"conversations": [TURNS[0], {"from": "tool", "value": "x"}, TURNS[1]]}
    assert "a.jsonl:1: a message of 'tool'" in refused(tmp_path / "a.jsonl", tool)
    assert "did you mean human?" in refused(
        tmp_path / "a.jsonl", {"conversations": [{"from": "humn", "value": "x"}]}
    )
    assert "a dialogue is a list" in refused(tmp_path / "a.jsonl", {"conversations": "hi"})
    assert "has a speaker and a text" in refused(
        tmp_path / "a.jsonl", {"conversations": [{"from": "human"}]}
    )


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
LONG = [user("p"), says("x"), user("q")]
DPO = [
    (PAIR, PAIR),
    (PAIR | {"chosen": [user("p"), says("c")], "rejected": [user("p"), says("r")]}, PAIR),
    ({"chosen": [user("p"), says("c")], "rejected": [user("p"), says("r")]}, PAIR),
    ({"prompt": [user("p")], "chosen": [says("c")], "rejected": [says("r")]}, PAIR),
    ({"chosen": [*LONG, says("c")], "rejected": [*LONG, says("r")]}, PAIR | {"prompt": LONG}),
    ({"conversations": LONG, "chosen": says("c"), "rejected": says("r")}, PAIR | {"prompt": LONG}),
    ({"chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: r"}, PAIR),
    ({"instruction": "p", "chosen": "c", "rejected": "r"}, PAIR),
]


@pytest.mark.parametrize(("record", "expected"), DPO, ids=range(len(DPO)))
def test_preferences_are_read(tmp_path, record, expected):
    assert read(tmp_path / "a.jsonl", record, task="dpo") == [expected]


def test_preferences_without_a_prompt_are_refused_truly(tmp_path):
    path = tmp_path / "a.jsonl"
    assert "it has no prompt" in refused(path, {"chosen": "c", "rejected": "r"}, task="dpo")
    record = {"system": "s", "question": "p", "chosen": "c", "rejected": "r"}
    message = refused(path, record, task="dpo")
    assert 'columns="prompt=question chosen=chosen rejected=rejected"' in message
    assert read(
        path, record, task="dpo", columns="prompt=question chosen=chosen rejected=rejected"
    ) == [PAIR]
    other = {"chosen": [user("p"), says("c")], "rejected": [user("z"), says("r")]}
    assert "the same dialogue but for one last message" in refused(path, other, task="dpo")


def test_of_a_long_prompt_the_answers_alone_are_compared(tmp_path):
    file = tmp_path / "a.jsonl"
    read(file, PAIR | {"prompt": LONG, "rejected": "r r"}, PAIR, task="dpo")
    config = small_config(
        task__name="dpo", data__tokenizer="words", data__train=str(file), data__val=str(file)
    )
    source = Examples(config, "train")
    assert {"p", "q", "x", "c", "r"} <= set(source.tokenizer.words)
    for piece in source.pieces:
        assert piece["weights"].sum(axis=1).tolist() in ([2.0, 3.0], [2.0, 2.0]), (
            "the answer and its end"
        )
    assert np.shape(source.pieces[0]["tokens"])[0] == 2
