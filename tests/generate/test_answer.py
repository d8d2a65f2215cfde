"""What people give to a trained model and get from it: files of prompts and answers, arguments, examples."""

import json
import shlex
from pathlib import PurePath

import numpy as np
import pytest

from jaxlm.config.recipe import base, resolve
from jaxlm.config.tasks import TASKS
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.errors import CheckpointError, ConfigError, DataError, UserError
from jaxlm.generate.__main__ import main, question_of, read_input, read_prompts, write_answers
from jaxlm.generate.arguments import examples_of, options_of, sampling_of
from jaxlm.generate.lm import LM, load
from jaxlm.run.next_command import next_command

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
    assert "3 of 5 answers" in told
    assert told.count("\n") == 1
    write_answers(str(file), ["p"], ["plain"])
    assert file.read_text() == "plain\n"
    assert not capsys.readouterr().err


def test_answers_of_jsonl_hold_prompt_and_answer(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    pairs = [("p\u2028", "one\ntwo"), ("q", {"good": 0.5}), ("r", ["A", "B"])]
    write_answers(str(file), [prompt for prompt, _ in pairs], [said for _, said in pairs])
    lines = file.read_bytes().decode().split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [
        {"prompt": p, "answer": said} for p, said in pairs
    ]
    assert not capsys.readouterr().err


HEADED = [name for name, task in TASKS.items() if task.has_head]
PLAIN = {"max_tokens": 5, "temperature": 0.8, "top_k": 0, "top_p": 0.0, "num_samples": 1, "seed": 0}


@pytest.mark.parametrize("five", [5, 5.0, np.int64(5), np.float32(5), np.array(5)], ids=repr)
def test_a_whole_number_may_be_of_any_type(five):
    _, _, numbers = sampling_of("a", (), PLAIN | {"max_tokens": five})
    assert numbers == PLAIN
    assert type(numbers["max_tokens"]) is int


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("value", ["5", None, True, float("nan"), float("inf"), [5]], ids=repr)
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"lm.generate: {name}="):
        sampling_of("a", (), PLAIN | {name: value})


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "num_samples", "seed"])
def test_a_broken_number_is_not_whole(name):
    with pytest.raises(ConfigError, match=f"{name}=5.5: must be a whole number"):
        sampling_of("a", (), PLAIN | {name: 5.5})


@pytest.mark.parametrize(
    "prompts", [None, 3, b"bytes", ["a", None], [{"role": "user"}], {"a": 1}], ids=repr
)
def test_prompts_that_are_no_texts_are_refused(prompts):
    with pytest.raises(ConfigError, match=r"prompts.*must be a text"):
        sampling_of(prompts, (), PLAIN)


def test_stop_may_be_none_one_or_several():
    assert [sampling_of("a", stop, PLAIN)[1] for stop in (None, (), "x", ("x", "y"))] == [
        [],
        [],
        ["x"],
        ["x", "y"],
    ]
    with pytest.raises(ConfigError, match=r"stop\[1\]=3.*top_p=2"):
        sampling_of("a", ["x", 3], PLAIN | {"top_p": 2})


HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]


def asked(task, given):
    return examples_of(task, TASKS[task].column_names, given)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_list_of_messages_is_a_dialogue(task):
    assert (
        asked(task, HELLO)
        == asked(task, [HELLO])
        == asked(task, {"messages": HELLO})
        == [{"messages": HELLO}]
    )
    assert asked(task, HELLO[1]) == [{"messages": HELLO[1:]}]
    assert asked(task, [HELLO, "a", {"prompt": "b"}]) == [
        {"messages": HELLO},
        {"prompt": "a"},
        {"prompt": "b"},
    ]
    assert asked(task, {"messages": json.dumps(HELLO)}) == [{"messages": json.dumps(HELLO)}]


@pytest.mark.parametrize(
    "task", ["classify", "multilabel", "regress", "tag", "seq2seq", "sft", "dpo"]
)
def test_a_text_is_what_is_asked(task):
    (example,) = asked(task, "a b")
    assert list(example.values()) == ["a b"]
    assert asked(task, ["a b"]) == [example]
    assert asked(task, []) == []


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


def of_task(task, **params):
    """An LM that can refuse, but has nothing to compute with."""
    c = resolve(base())
    c.task.name = task
    return LM(c, params, tokenizers.Bytes(), None, 0)


NO_TEXTS = [
    None,
    3,
    1.5,
    True,
    b"bytes",
    {"a": 1},
    ["a", None],
    [["a"]],
    "\ud800",
    ["a", "b\udfff"],
    NotImplemented,
]


@pytest.mark.parametrize("texts", NO_TEXTS, ids=repr)
def test_loss_takes_texts_alone(texts):
    with pytest.raises(ConfigError, match=r"^lm\.loss: texts.*must be a text"):
        of_task("lm").loss(texts)


@pytest.mark.parametrize(
    "tokens",
    [None, "abc", ["a", "b"], [[1], [1, 2]], [[1.5]], [[True]], [[10**12]], [[-1]], [], [[]], 5, [[[1]]], {1: 2}],
    ids=repr,
)  # fmt: skip
def test_logits_take_ids_alone(tokens):
    with pytest.raises(ConfigError, match=r"^lm\.logits: tokens"):
        of_task("lm").logits(tokens)


@pytest.mark.parametrize("name", ["segments", "positions"])
@pytest.mark.parametrize("value", ["ab", 1, [[1]], [[0.5, 1]], [["a", "b"]], [1, 2]], ids=repr)
def test_logits_name_what_does_not_fit_the_tokens(name, value):
    with pytest.raises(ConfigError, match=rf"^lm\.logits: {name}"):
        of_task("lm").logits([[1, 2]], **{name: value})


@pytest.mark.parametrize("task", HEADED)
def test_what_has_no_logits_of_tokens_says_what_it_is(task):
    with pytest.raises(
        UserError, match=rf"^lm\.logits: a model of task {task} is a .*use lm\.answer"
    ):
        of_task(task).logits([[1, 2]])


@pytest.mark.parametrize(
    ("word", "count", "named"),
    [(None, 1, "word=None"), (3, 1, "word=3"), ("", 1, "word=''"), (" ", 1, "word=' '"), (["a"], 1, "word="),
     ("a", 0, "count=0"), ("a", -2, "count=-2"), ("a", None, "count=None"), ("a", 1.5, "count=1.5"),
     (None, "2", "word=None.*count='2'")],
)  # fmt: skip
def test_neighbors_name_what_is_wrong(word, count, named):
    table = np.eye(257, 8, dtype=np.float32)
    with pytest.raises(ConfigError, match=rf"^lm\.neighbors: {named}"):
        of_task("lm", embed={"tokens": table}).neighbors(word, count)


@pytest.mark.parametrize("path", [None, 3, "", " ", b"runs", ["runs"]], ids=repr)
def test_what_is_no_path_cannot_be_loaded(path):
    with pytest.raises(ConfigError, match=r"^jaxlm\.load: path="):
        load(path)


@pytest.mark.parametrize(
    "given", [{"step": None}, {"step": -1}, {"step": 1.5}, {"step": [1]}, {"mesh": 4}, {"mesh": "data"},
              {"mesh": {"data": "2"}}, {"mesh": {"data": True}}], ids=repr,
)  # fmt: skip
def test_load_names_what_is_wrong(tmp_path, given):
    (name,) = given
    with pytest.raises(ConfigError, match=rf"^jaxlm\.load: {name}="):
        load(tmp_path, **given)
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        load(tmp_path, step=5.0)


WRONG = [
    ("max_tokens", 0), ("max_tokens", "5"), ("max_tokens", 5.5), ("temperature", -1), ("temperature", None),
    ("top_p", 2), ("top_k", -1), ("beams", 0), ("beams", "2"), ("seed", 1.5), ("length_penalty", float("nan")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_options_of_an_answer_are_named(name, value):
    with pytest.raises(ConfigError, match=rf"^lm\.answer: {name}=.*must be"):
        of_task("sft").answer("hello", **{name: value})


def test_options_of_an_answer_are_taken_where_they_are_plain():
    stop, numbers = options_of(
        "sft", {"max_tokens": 5.0, "stop": None, "temperature": np.float32(0.5)}
    )
    assert stop == []
    assert numbers == {"max_tokens": 5, "temperature": 0.5}
    assert options_of("seq2seq", {"stop": ("a", "b"), "beams": np.int64(2)}) == (
        ["a", "b"],
        {"beams": 2},
    )
    with pytest.raises(
        ConfigError, match=r"stop\[1\]=3.*no option temprature.*did you mean temperature"
    ):
        options_of("sft", {"stop": ["a", 3], "temprature": 1})


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p"])
def test_a_search_that_would_sample_is_refused(name):
    with pytest.raises(ConfigError, match=f"beams=4 and {name}=1.*leave out {name}.*beams=1"):
        options_of("sft", {"beams": 4, name: 1})
    assert options_of("sft", {"beams": 4, name: 0, "seed": 1})[1]["beams"] == 4
    flags = ["--workdir=none", "--beams=4", f"--{name}=1"]
    with pytest.raises(ConfigError, match=rf"--beams=4 and --{name}=1.*leave out --{name}"):
        main(flags)


@pytest.mark.parametrize(
    ("flag", "rule"),
    [("--num_samples=0", "at least 1"), ("--temperature=-1", "0 .greedy. or positive"), ("--beams=0", "from 1"),
     ("--top_p=2", "a probability")],
)  # fmt: skip
def test_a_flag_that_means_nothing_is_named_as_typed(flag, rule):
    name, value = flag.split("=")
    with pytest.raises(ConfigError, match=rf"^jaxlm\.generate: {name}={value}.*{rule}"):
        main(["--workdir=none", flag])


@pytest.mark.parametrize(
    ("task", "given", "named"),
    [("classify", {"text": 5}, r"'text'\]=5: must be a text \(as text: \"5\"\)"),
     ("classify", {"text": "a", "text2": 1.5}, r"'text2'\]=1.5: must be a text"), ("sft", {"prompt": True}, "a text"),
     ("seq2seq", {"source": np.float32(2)}, "'source'.*must be a text"),
     ("tag", {"words": ["a", 3]}, r"'words'\]\[1\]=3"),
     ("tag", {"words": 3}, "a list of words"), ("tag", {"words": ["a", "\ud800"]}, "half a character")],
)  # fmt: skip
def test_a_number_is_no_text(task, given, named):
    with pytest.raises(ConfigError, match=named):
        asked(task, given)


@pytest.mark.parametrize("task", [*HEADED, "mlm"])
def test_what_writes_no_text_takes_no_options(task):
    with pytest.raises(
        ConfigError, match=rf"temperature=1: not for a model of task {task}, which writes no text"
    ):
        of_task(task).answer("a", temperature=1)


@pytest.mark.parametrize("ask", ["generate", "loss"])
def test_a_masked_model_says_how_to_ask_it(ask):
    with pytest.raises(UserError, match=r"use lm\.answer with \[MASK\]"):
        getattr(of_task("mlm"), ask)("a")
    with pytest.raises(ConfigError, match=r"^lm\.answer: examples\[1\]=None"):
        of_task("mlm").answer(["a[MASK]", None])


# ---------------------------------------------------------------- files of examples

TURNS = [
    *HELLO,
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "and\u2028now?"},
]


def written(folder, name, *values):
    file = folder / name
    file.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
    return str(file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_dialogues_of_several_turns_are_read(tmp_path, name, task):
    file = written(tmp_path, name, {"messages": TURNS}, TURNS, "hello", {"prompt": "b"})
    expected = [{"messages": TURNS}, {"messages": TURNS}, {"prompt": "hello"}, {"prompt": "b"}]
    assert read_input(file, task) == expected


@pytest.mark.parametrize("value", [TURNS, {"messages": TURNS}, [TURNS], [{"messages": TURNS}]])
def test_a_file_of_json_may_be_one_dialogue(tmp_path, value):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(value, indent=2))
    assert read_input(str(file), "sft") == [{"messages": TURNS}]


@pytest.mark.parametrize(
    ("task", "value", "expected"),
    [("lm", {"prompt": "a\nb"}, "a\nb"), ("lm", "a", "a"), ("mlm", {"text": "a[MASK]"}, "a[MASK]"),
     ("qa", {"question": "a", "context": "b"}, {"question": "a", "context": "b"}), ("classify", "a", {"text": "a"}),
     ("seq2seq", {"source": "a", "target": "b"}, {"source": "a", "target": "b"})],
)  # fmt: skip
def test_a_line_is_an_example_of_the_task(tmp_path, task, value, expected):
    assert read_input(written(tmp_path, "a.jsonl", value), task) == [expected]


@pytest.mark.parametrize(
    ("task", "values", "named"),
    [("sft", ["a", {"promt": "b"}], "line 2 has 'promt'.*did you mean prompt"), ("lm", [{"a": "b"}], "line 1="),
     ("sft", [{"messages": [{"role": "bot", "content": "a"}]}], r"line 1\['messages'\]\[0\] has the role 'bot'"),
     ("mlm", ["[MASK]", 3], "line 2=3: must be a text"), ("qa", [{"question": "a"}], "line 1 has no 'context'")],
)  # fmt: skip
def test_a_line_that_is_no_example_is_named(tmp_path, task, values, named):
    with pytest.raises(ConfigError, match=rf"^--input=.*a\.jsonl: {named}"):
        read_input(written(tmp_path, "a.jsonl", *values), task)


def test_a_line_that_is_not_json_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('"a"\n\n{"prompt": }\n')
    with pytest.raises(DataError, match=r"a\.jsonl: line 3 is not JSON"):
        read_input(str(file), "sft")
    file.rename(tmp_path / "a.txt")
    assert read_input(str(tmp_path / "a.txt"), "sft") == ['"a"', "", '{"prompt": }']


# ---------------------------------------------------------------- what a run proposes


@pytest.mark.parametrize("task", [name for name in TASKS if name not in ("prefix_lm", "fim")])
@pytest.mark.parametrize(
    "tokenizer", [tokenizers.Bytes(), tokenizers.Chars(b'{"characters": "\\n bc"}')]
)
def test_a_run_proposes_what_works_as_typed(task, tokenizer):
    config = of_task(task).config
    command = next_command(config, PurePath("my runs/it's"), tokenizer).removeprefix(
        "try python -m jaxlm."
    )
    program, *flags = shlex.split(command)
    assert program in ("evaluate", "generate")
    assert flags[0] == "--workdir=my runs/it's"
    prompt = "".join(flag.removeprefix("--prompt=") for flag in flags[1:])
    asked = TASKS[task].asked_columns
    if len(asked) > 1:
        assert examples_of(task, asked, question_of(prompt, task))
    elif task == "mlm":
        assert prompt == "[MASK]"
    elif TASKS[task].answers_examples or (task == "lm" and tokenizer.bos_id is None):
        assert prompt
        assert len(tokenizer.encode(prompt))
    else:
        assert not prompt


def test_a_question_needs_its_context():
    with pytest.raises(ConfigError, match=r"--prompt=Who\?: .*asked about a context: --prompt='{"):
        question_of("Who?", "qa")
