"""What people give to a trained model and get from it: files of prompts and answers, arguments, examples."""

import json

import numpy as np
import pytest

from jaxlm.arguments import examples_of
from jaxlm.config import base, resolve
from jaxlm.errors import ConfigError, DataError, UserError
from jaxlm.generate import read_prompts, write_answers
from jaxlm.keys import ROLES
from jaxlm.lm import LM, sampling_of

ODD_LINES = ["a\x0bb", "c\x0cd", "e\u2028f", "g\x85h", "i\x1cj", "", " k\rl "]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_only_a_newline_ends_a_prompt(tmp_path, end, last):
    file = tmp_path / "prompts.txt"
    file.write_bytes((end.join(ODD_LINES) + end * last).encode())
    assert read_prompts(str(file)) == ODD_LINES


def test_a_file_of_prompts_may_be_empty_or_begin_with_a_mark(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"")
    assert read_prompts(str(file)) == []
    file.write_bytes(b"\xef\xbb\xbfone")
    assert read_prompts(str(file)) == ["one"]


def test_a_file_of_prompts_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"prompts\.txt: byte 3 is not UTF-8"):
        read_prompts(str(file))


def test_answers_are_a_line_each_and_come_back(tmp_path, capsys):
    answers = ["one\ntwo", "a\\nb", "c\r\nd", "e\u2028f", ""]
    file = tmp_path / "answers.txt"
    write_answers(str(file), ["p"] * 5, answers)
    lines = file.read_bytes().decode().split("\n")[:-1]
    assert lines == ["one\\ntwo", "a\\\\nb", "c\\r\\nd", "e\u2028f", ""]
    told = capsys.readouterr().err
    assert "3 of 5 answers" in told and told.count("\n") == 1
    write_answers(str(file), ["p"], ["plain"])
    assert file.read_text() == "plain\n" and not capsys.readouterr().err


def test_answers_of_jsonl_hold_prompt_and_answer(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    pairs = [("p\u2028", "one\ntwo"), ("q", {"good": 0.5}), ("r", ["A", "B"])]
    write_answers(str(file), [prompt for prompt, _ in pairs], [said for _, said in pairs])
    lines = file.read_bytes().decode().split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [{"prompt": p, "answer": said} for p, said in pairs]
    assert not capsys.readouterr().err


PLAIN = {"max_tokens": 5, "temperature": 0.8, "top_k": 0, "top_p": 0.0, "num_samples": 1, "seed": 0}


@pytest.mark.parametrize("five", [5, 5.0, np.int64(5), np.float32(5), np.array(5)], ids=repr)
def test_a_whole_number_may_be_of_any_type(five):
    _, _, numbers = sampling_of("a", (), PLAIN | {"max_tokens": five})
    assert numbers == PLAIN and type(numbers["max_tokens"]) is int


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("value", ["5", None, True, float("nan"), float("inf"), [5]], ids=repr)
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"lm.generate: {name}="):
        sampling_of("a", (), PLAIN | {name: value})


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "num_samples", "seed"])
def test_a_broken_number_is_not_whole(name):
    with pytest.raises(ConfigError, match=f"{name}=5.5: must be a whole number"):
        sampling_of("a", (), PLAIN | {name: 5.5})


@pytest.mark.parametrize("prompts", [None, 3, b"bytes", ["a", None], [{"role": "user"}], {"a": 1}], ids=repr)
def test_prompts_that_are_no_texts_are_refused(prompts):
    with pytest.raises(ConfigError, match=r"prompts.*must be a text"):
        sampling_of(prompts, (), PLAIN)


def test_stop_may_be_none_one_or_several():
    assert [sampling_of("a", stop, PLAIN)[1] for stop in (None, (), "x", ("x", "y"))] == [[], [], ["x"], ["x", "y"]]
    with pytest.raises(ConfigError, match=r"stop\[1\]=3.*top_p=2"):
        sampling_of("a", ["x", 3], PLAIN | {"top_p": 2})


HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]


def asked(task, given):
    return examples_of(task, tuple(role.removesuffix("?") for role in ROLES[task]), given)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_list_of_messages_is_a_dialogue(task):
    assert asked(task, HELLO) == asked(task, [HELLO]) == asked(task, {"messages": HELLO}) == [{"messages": HELLO}]
    assert asked(task, HELLO[1]) == [{"messages": HELLO[1:]}]
    assert asked(task, [HELLO, "a", {"prompt": "b"}]) == [{"messages": HELLO}, {"prompt": "a"}, {"prompt": "b"}]
    assert asked(task, {"messages": json.dumps(HELLO)}) == [{"messages": json.dumps(HELLO)}]


@pytest.mark.parametrize("task", ["classify", "multilabel", "regress", "tag", "seq2seq", "sft", "dpo"])
def test_a_text_is_what_is_asked(task):
    (example,) = asked(task, "a b")
    assert list(example.values()) == ["a b"] and asked(task, ["a b"]) == [example] and asked(task, []) == []


@pytest.mark.parametrize(
    ("task", "given", "named"),
    [("sft", {"promt": "a"}, "'promt'.*messages, prompt, response; did you mean prompt"),
     ("classify", {"txt": "a"}, "'txt'.*text, label, text2; did you mean text"),
     ("seq2seq", ["a", {"scource": "a"}], r"examples\[1\] has 'scource'.*did you mean source"),
     ("classify", {"label": "a"}, "has no 'text'"), ("tag", {}, "has no 'words'"), ("qa", "who?", "has no 'context'"),
     ("classify", HELLO, "'role'.*text, label"), ("sft", {"messages": []}, "no message of a user"),
     ("sft", [[]], "no message of a user"), ("sft", {"messages": "hello"}, "a dialogue is a list"),
     ("sft", [{"role": "usr", "content": "a"}], "role 'usr'.*did you mean user"),
     ("sft", [{"role": "user", "content": None}], "content None"), ("sft", {"prompt": None}, "must be a text"),
     ("sft", [HELLO, [{"role": "user"}]], r"examples\[1\].*a dialogue is"), ("regress", None, "examples=None"),
     ("classify", [3], r"examples\[0\]=3"), ("classify", b"a", "decode")],
)  # fmt: skip
def test_what_a_task_does_not_know_is_refused(task, given, named):
    with pytest.raises(ConfigError, match=f"(?s)lm.answer: .*{named}"):
        asked(task, given)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_model_that_answers_says_so(task):
    c = resolve(base())
    c.task.name = task
    with pytest.raises(UserError, match=r"task (sft|dpo) .*use lm\.answer"):
        LM(c, {}, None, None, 0).generate("a")
