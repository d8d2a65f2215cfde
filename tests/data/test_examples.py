"""Examples become rows: each comes once and whole, and what cannot be learned is named."""

import json
import logging
import os
from collections import Counter

import numpy as np
import pytest
from conftest import WORDS, small_config

from jaxlm.config import base
from jaxlm.config.check import check
from jaxlm.data.batches import describe, fingerprint, train_batches, validation_batches
from jaxlm.data.example_records import examples_of, stamps, tokenizer_of
from jaxlm.data.examples import Examples
from jaxlm.data.files.paths import relative
from jaxlm.data.labels import label_names
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.data.tokenization import vocabulary
from jaxlm.errors import ConfigError, DataError
from jaxlm.evaluate.metrics import auc, classification
from jaxlm.generate.answer import one_less_others

HEADER = ("text", "label")
ROWS = [("a fine day", "good"), ("a rainy day", "bad"), ("", "bad")]


def write(path, text):
    path.write_text(text)
    return str(path)


def settings(tmp_path, rows, val=None, task="classify", **more):
    """A resolved config of examples [(text, label), ...] or [dict, ...] in .jsonl files."""

    def lines(rows):
        return "".join(
            json.dumps(r if isinstance(r, dict) else dict(zip(HEADER, r))) + "\n" for r in rows
        )

    files = {"data__train": write(tmp_path / "train.jsonl", lines(rows))}
    files["data__val"] = write(tmp_path / "val.jsonl", lines(val or rows))
    return small_config(
        **{"task__name": task, "data__tokenizer": "words", "train__batch_size": 4} | files | more
    )


def made(*args, split="train", **more):
    return Examples(settings(*args, **more), split)


def test_labels_are_names_in_order(tmp_path):
    mixed = [("a", 10), ("b", "2"), ("c", 2.0), ("d", " 10 ")]
    config = settings(tmp_path, mixed)
    assert label_names(config) == ("2", "10"), "numbers by size"
    assert [piece["label"] for piece in Examples(config, "train").pieces] == [1, 0, 0, 1]
    config.data.labels = ("10", "2", "7")
    assert [piece["label"] for piece in Examples(config, "train").pieces] == [0, 1, 1, 0]
    tags = [{"words": ["a", "b"], "tags": [0, 3]}, {"words": "c", "tags": "3"}]
    assert label_names(settings(tmp_path, tags, task="tag")) == ("0", "3")
    several = [("a", "x, y"), ("b", ["z", 1]), ("c", ""), ("d", 1)]
    config = settings(tmp_path, several, task="multilabel")
    assert label_names(config) == ("1", "x", "y", "z")
    sets = []
    for piece in Examples(config, "train").pieces:
        sets.append(piece["label"].tolist())
    assert sets == [[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    config = settings(tmp_path, [("a", 1), ("b", "-2.5e-1")], task="regress")
    assert [float(piece["label"]) for piece in Examples(config, "train").pieces] == [1.0, -0.25]


@pytest.mark.parametrize("task", ["classify", "multilabel", "tag"])
def test_a_label_that_training_does_not_have_is_named(tmp_path, task):
    if task == "tag":

        def shape(t, n):
            return {"words": t, "tags": n}

    else:

        def shape(t, n):
            return {"text": t, "label": n}

    config = settings(tmp_path, [shape("a", "good"), shape("b", "bad")], [shape("a", "god")], task)
    with pytest.raises(
        DataError,
        match=r"val\.jsonl:1: 'god' is not one of the labels bad, good; did you mean good",
    ):
        Examples(config, "val")


def test_what_cannot_be_learned_says_why(tmp_path):
    for rows, task, said in (
        ([("a", "x"), ("b", "x")], "classify", "every example has the label 'x'"),
        ([("a", "x"), ("b", "")], "classify", r"train\.jsonl:2: its label is empty"),
        (
            [(f"t{i}", f"some text {i}") for i in range(40)],
            "classify",
            "40 different labels.*another order",
        ),
        ([("a", "x"), ("b", "1")], "regress", r"train\.jsonl:1: its label 'x' is not a number"),
        ([(["a"], "x"), ("b", "y")], "classify", r"train\.jsonl:1: its text is a list, not text"),
    ):
        with pytest.raises(DataError, match=said):
            made(tmp_path, rows, task=task)
    with pytest.raises(DataError, match="example 1: no label; it has text"):
        Examples(settings(tmp_path, ROWS), "val", examples=[{"text": "a"}])


def test_of_two_classes_both_have_one_auc():
    """Also where a model is so sure that float32 has one probability for many examples."""
    logits = np.float32(np.random.default_rng(0).normal(12, 6, 400))
    both = np.stack([logits * 0, logits], 1)
    chances = np.exp(both - both.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    assert len(np.unique(chances[:, 1])) < 390
    exact = np.stack([one_less_others(row) for row in chances])
    np.testing.assert_allclose(exact, chances, atol=1e-6)
    labels = (np.random.default_rng(1).random(400) < 0.7).astype(int)
    one, other = (row["auc"] for row in classification(exact, labels)["classes"])
    assert one == pytest.approx(other, abs=1e-12)
    assert one == pytest.approx(auc(labels, logits), abs=1e-12)


def test_a_careless_command_is_corrected(tmp_path):
    c = base()
    c.task.name = "clasify"
    assert any("did you mean classify?" in problem for problem in check(c))
    c.task.name = "classify"
    c.data.path = "tokens"
    c.model.name = "encoder"
    assert any(
        "config.data.path: task classify learns from examples" in problem for problem in check(c)
    )
    c.data.path = ""
    with pytest.raises(DataError, match=r"config\.data\.train is empty"):
        describe(c)
    with pytest.raises(ConfigError, match=r"--config\.data\.vocab_size=\d+"):
        made(tmp_path, ROWS, data__tokenizer="sentencepiece", data__vocab_size=10)


def test_squads_answers_are_read(tmp_path):
    answers = {"text": ["two words", "words"], "answer_start": [4, 8]}
    rows = [{"question": "q", "context": "two two words", "answers": answers}]
    source = made(
        tmp_path, rows, task="qa", data__columns="answer=answers", data__tokenizer="bytes"
    )
    assert source.examples[0]["answer"] == ["two words", "words"]
    assert source.examples[0]["start"] == [4, 8]
    assert source.pieces[0]["weights"].argmax() == 1 + 1 + 1 + 3, "the second two"


@pytest.mark.parametrize("place", ["start", "answer_start"])
def test_an_answer_stands_where_its_column_says(tmp_path, place):
    rows = [{"question": "q", "context": "cat the cat", "answer": "cat", place: 8}] * 2
    source = made(tmp_path, rows, task="qa", data__tokenizer="bytes")
    assert source.pieces[0]["weights"].argmax() == 3 + 7, "the second cat, with the space before it"


def test_a_number_is_an_answer_and_an_object_is_none(tmp_path):
    rows = []
    for answer in (1990, [1990, "in"], 1990.0):
        rows.append({"question": "q", "context": "in 1990", "answer": answer})
    source = made(tmp_path, rows, task="qa", data__tokenizer="bytes")
    assert [int(piece["weights"].argmax()) for piece in source.pieces] == [5, 5, 5], (
        "with the space before it"
    )
    for wrong in ([{"text": "in"}], [["in", {}]]):
        with pytest.raises(
            DataError, match=r"jsonl:1: its answer is text, or a list of texts, not \{"
        ):
            made(
                tmp_path,
                [{"question": "q", "context": "in", "answer": wrong}],
                task="qa",
                data__tokenizer="bytes",
            )


@pytest.mark.parametrize("label", [["x", "y"], [], {"x": 1}])
def test_several_labels_are_no_class(tmp_path, label):
    with pytest.raises(
        DataError, match=r"jsonl:1: its label is a list, not one class; .*task\.name=multilabel"
    ):
        made(tmp_path, [("a", label), ("b", "x")])


def test_decimal_commas_are_told_as_such(tmp_path):
    for label, said in (
        ("1,5", "not a number; a decimal point is meant"),
        ("1,5,2", "not a number$"),
    ):
        with pytest.raises(DataError, match=said):
            made(tmp_path, [("a", label)], task="regress")


@pytest.mark.parametrize("tokenizer", ["bytes", "words", "chars"])
def test_messages_that_are_none_are_told_with_their_place(tmp_path, tokenizer):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for wrong, said in (
        (
            {"messages": "hello there"},
            r"jsonl:2: messages is a list of messages, or that in JSON, not 'hello there'",
        ),
        ({"messages": '[{"role": '}, "jsonl:2: messages is a list of messages, or that in JSON"),
        ({"messages": "7"}, "jsonl:2: messages is a list of messages, not 7"),
        ({"messages": [["user", "a"]]}, "jsonl:2: a message is"),
        (
            {"messages": [{"role": "assistant", "content": "b", "weight": 0}]},
            "jsonl:2: all that .* has weight 0",
        ),
        (
            {"messages": [{"role": "user", "content": "b"}]},
            "jsonl:2: the assistant says nothing in it",
        ),
    ):
        with pytest.raises(DataError, match=said):
            made(tmp_path, [good, wrong], task="sft", data__tokenizer=tokenizer)
    for rows in (
        [{"prompt": "a", "response": ""}],
        [{"prompt": "b", "response": None}, {"prompt": "c"}],
    ):
        with pytest.raises(DataError, match=r"jsonl:1: .*its response is missing or empty"):
            made(
                tmp_path, rows, task="sft", data__tokenizer=tokenizer, data__columns="prompt=prompt"
            )


def test_pairs_whose_answers_are_the_same_are_told(tmp_path, caplog):
    def pair(chosen, rejected):
        return {"prompt": "a", "chosen": chosen, "rejected": rejected}

    more = {"task": "dpo", "data__tokenizer": "bytes"}
    with pytest.raises(
        DataError, match=r"2 of 2 train pairs have the same answer.*are the columns right"
    ):
        made(tmp_path, [pair("x", "x"), pair("y", "y")], **more)
    assert len(made(tmp_path, [pair("x", "y"), pair("y", "y")], **more).pieces) == 2
    assert "1 of 2 train pairs have the same answer as chosen and as rejected" in caplog.text
    caplog.clear()
    made(tmp_path, [pair("x", "y")] * 2, **more)
    assert not caplog.text


# ---------------------------------------------------------------- rows


def many(count, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    return [
        (" ".join(rng.choice(WORDS, rng.integers(1, longest))), f"c{rng.integers(4)}")
        for _ in range(count)
    ]


@pytest.mark.parametrize("most", [0, 3])
def test_an_epoch_has_every_example_once_and_whole(tmp_path, most):
    config = settings(tmp_path, many(500), data__seq_len=64, data__examples_per_row=most)
    for split in ("train", "val"):
        source = Examples(config, split)
        assert sorted(i for row in source.rows for i in row) == list(range(500))
        assert max(map(len, source.rows)) <= config.data.examples_per_row
        for number in range(0, source.num_rows, 7):
            batch = source.read(np.array([number]), [(0, 0)])
            for place, i in enumerate(source.rows[number]):
                here = batch["segments"][0] == place + 1
                np.testing.assert_array_equal(batch["tokens"][0][here], source.pieces[i]["tokens"])
                assert batch["labels"][0, place] == source.pieces[i]["label"]
                assert batch["weights"][0, place] == 1
    batches = train_batches(config)
    counts = Counter(
        int((batches[k]["weights"] > 0).sum(axis=1)[r])
        for k in range(source.num_rows)
        for r in range(4)
    )
    assert sum(n * c for n, c in counts.items()) == 4 * 500, "four epochs"


def test_rows_are_filled(tmp_path):
    for longest, length in ((12, 128), (40, 128), (60, 256)):
        source = made(
            tmp_path,
            many(2000, longest=longest),
            data__seq_len=length,
            data__examples_per_row=length,
        )
        assert source.num_tokens / (source.num_rows * length) > 0.93
    pairs = []
    for text, _ in many(2000, longest=40):
        pairs.append({"source": text, "target": text})
    source = made(tmp_path, pairs, task="seq2seq", data__seq_len=128, data__enc_len=128)
    assert source.num_tokens / (source.num_rows * 256) > 0.85
    assert len(made(tmp_path, many(50), data__pack=False).rows) == 50


def test_long_examples_are_cut_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "jaxlm"):
        source = made(tmp_path, [("a " * 99, "x"), ("", "y"), ("", "y")])
    assert "1 of 3 train examples are longer than data.seq_len=32" in caplog.text
    assert "101 tokens" in caplog.text
    assert source.read(np.arange(source.num_rows), [(0, 0)] * 3)["weights"].sum() == 3, (
        "duplicates and empty text too"
    )
    asked = {"question": "q", "context": "a " * 25 + "b c", "answer": "b c"}
    short = asked | {"context": "b c"}
    bits = made(tmp_path, [asked, short], task="qa", data__seq_len=29).pieces[0]
    assert not bits["weights"].any() and set(bits["targets"].tolist()) == {0, 4}, (
        "half an answer is none"
    )


# Of each task: an example of which nothing is left to learn within 32 tokens, one of which something is, and how many
# tokens the first needs at least, and for all of it.
CUT_OFF = {
    "sft": ({"prompt": "a " * 99, "response": "b c"}, {"prompt": "a", "response": "b"}, 103, 105),
    "sft, a dialogue": (
        {
            "messages": [
                {"role": "system", "content": "a " * 40},
                {"role": "assistant", "content": "b"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b " * 40},
            ]
        },
        44,
        45,
    ),
    "sft, weight 0": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "weight": 0},
                {"role": "user", "content": "a " * 40},
                {"role": "assistant", "content": "b"},
            ]
        },
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        50,
        51,
    ),
    "dpo": (
        {"prompt": "a " * 40, "chosen": "b", "rejected": "c c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        44,
        46,
    ),
    "qa": (
        {"question": "q", "context": "a " * 50 + "b c", "answer": "b c"},
        {"question": "q", "context": "b c", "answer": "b c"},
        55,
        55,
    ),
}


@pytest.mark.parametrize("case", CUT_OFF)
def test_where_cutting_leaves_nothing_to_learn_of_any_example_the_length_that_would_do_is_told(
    tmp_path, case
):
    lost, _, least, whole = CUT_OFF[case]
    task = case.split(",")[0]
    for split in ("train", "val"):
        with pytest.raises(DataError) as error:
            made(tmp_path, [lost, lost], task=task, split=split)
        text = str(error.value)
        assert f"any of the 2 {split} examples" in text
        assert "data.seq_len=32" in text
        assert f"--config.data.seq_len={whole}" in text
        assert f"{least} would do" in text
    assert made(tmp_path, [lost], task=task, data__seq_len=least).learnable.all()
    with pytest.raises(DataError):
        made(tmp_path, [lost], task=task, data__seq_len=least - 1)


@pytest.mark.parametrize("case", CUT_OFF)
def test_where_it_leaves_nothing_of_some_these_are_left_out_and_counted(tmp_path, caplog, case):
    lost, kept, least, _ = CUT_OFF[case]
    task = case.split(",")[0]
    rows = [lost, kept, lost]
    with caplog.at_level(logging.WARNING, "jaxlm"):
        source = made(tmp_path, rows, task=task)
    assert "2 of 3 train examples are left out" in caplog.text
    assert f"seq_len={least} would reach" in caplog.text
    assert [i for row in source.rows for i in row] == [1]
    batch = source.read(np.arange(source.num_rows), [(0, 0)] * source.num_rows)
    assert batch["weights"].any(axis=-1).all(), (
        "every row, and either side of a pair, has something to learn"
    )
    measured = made(tmp_path, rows, task=task, split="val")
    assert sorted(i for row in measured.rows for i in row) == [0, 1, 2], (
        "what is measured on stays whole"
    )


def test_batches_are_the_same_on_any_hosts(tmp_path):
    config = settings(tmp_path, many(200), data__word_dropout=0.3)
    for k in (0, 100):
        whole = train_batches(config)[k]
        for hosts in (2, 4):
            for host in range(hosts):
                part = train_batches(config, np.arange(host, 4, hosts))[k]
                for key, value in whole.items():
                    np.testing.assert_array_equal(value[host::hosts], part[key])


def test_words_are_dropped_in_training_alone_and_never_special_ones(tmp_path):
    config = settings(tmp_path, many(400), data__word_dropout=0.25)
    source = Examples(config, "train")
    every = np.arange(source.num_rows)
    keys = [(0, int(i)) for i in every]
    dropped = source.read(every, keys)["tokens"]
    config.data.word_dropout = 0.0
    plain = source.read(every, keys)
    hidden = dropped != plain["tokens"]
    real = plain["segments"] > 0
    words = real & (plain["tokens"] < source.tokenizer.vocab_size)
    assert set(dropped[hidden]) == {source.vocab.mask}
    assert not (hidden & ~words).any()
    assert hidden.sum() / words.sum() == pytest.approx(0.25, abs=0.03)
    config.data.word_dropout = 0.25
    assert not (validation_batches(config)[0]["tokens"] == source.vocab.mask).any()


def test_classes_are_balanced(tmp_path):
    rows = [("w", "often")] * 60 + [("w", "seldom")] * 10 + [("w", "rare")] * 2
    source = made(tmp_path, rows, task__class_weights="balanced")
    sums = np.zeros(3)
    for piece in source.pieces:
        sums[piece["label"]] += piece["weight"]
    np.testing.assert_allclose(sums, 24)
    assert all(
        "weight" not in piece
        for piece in made(tmp_path, rows, task__class_weights="balanced", split="val").pieces
    )
    source = made(tmp_path, rows, task__balanced_sampling=True)
    shown = []
    for row in source.rows:
        for i in row:
            shown.append(source.pieces[i]["label"])
    assert np.bincount(shown).tolist() == [60, 60, 60]
    assert len({i for row in source.rows for i in row}) == 72
    tags = [{"words": "a b c", "tags": "O O X"}] * 5
    source = made(tmp_path, tags, task="tag", task__class_weights="balanced")
    np.testing.assert_allclose(
        sum(p["weights"][p["targets"] == 0].sum() for p in source.pieces), 7.5
    )
    np.testing.assert_allclose(
        sum(p["weights"][p["targets"] == 1].sum() for p in source.pieces), 7.5
    )


def test_lower_case_and_what_the_order_of_data_depends_on(tmp_path):
    rows = [("The CAT", "x"), ("the cat", "y")]
    config = settings(tmp_path, rows, data__lowercase=True)
    first, second = Examples(config, "train").pieces
    np.testing.assert_array_equal(first["tokens"], second["tokens"])
    known = fingerprint(config)
    for change in (
        {"data__lowercase": False},
        {"data__labels": ("y", "x")},
        {"task__class_weights": "balanced"},
    ):
        assert fingerprint(settings(tmp_path, rows, **{"data__lowercase": True} | change)) != known
    assert fingerprint(settings(tmp_path, [*rows, ("a", "x")], data__lowercase=True)) != known, (
        "the file has changed"
    )


# ---------------------------------------------------------------- words


def test_words_come_back_and_the_unknown_are_one():
    words = vocabulary.make("words", ["the cat the dog", "the <unk> \u00e9t\u00e9\ncat"], 100)
    assert words.words == ["<unk>", "the", "cat", "dog", "\u00e9t\u00e9"]
    assert words.vocab_size == 5
    assert words.decode(words.encode("the  \u00e9t\u00e9\tcat")) == "the \u00e9t\u00e9 cat"
    assert words.encode("the cow <unk>").tolist() == [1, 0, 0]
    assert words.encode("").dtype == np.int32
    assert words.decode([1, 99, -1, 0]) == "the <unk>"
    again = tokenizers.from_bytes("words", words.to_bytes())
    assert again.words == words.words
    assert again.fingerprint == words.fingerprint
    assert vocabulary.make("words", ["a a b"], 100, min_count=2).words == ["<unk>", "a"]
    assert vocabulary.make("words", ["a a b c"], 2).words == ["<unk>", "a"]
    with pytest.raises(DataError):
        tokenizers.from_bytes("words", b'{"wrods": []}')


def test_a_tokenizer_is_made_once_and_anew_when_the_file_changes(tmp_path):
    config = settings(tmp_path, [("one \ud800", "x"), ("two", "y")])
    first = tokenizer_of(config.data, "classify")
    assert tokenizer_of(config.data, "classify") is first
    assert "one" in first.words
    stamp = os.stat(config.data.train).st_mtime_ns + 10**9
    settings(tmp_path, [("three", "x"), ("four", "y")])
    os.utime(config.data.train, ns=(stamp, stamp))
    assert "three" in tokenizer_of(config.data, "classify").words


def test_a_file_with_a_plus_in_its_name_is_read_again_when_it_has_changed(tmp_path):
    file = tmp_path / "a+b.tsv"
    file.write_text("good\t1\nbad\t0\n")
    before = stamps(str(file))
    file.write_text("good\t1\nbad\t0\nworse\t0\n")
    assert before
    assert stamps(str(file)) != before


def test_a_file_is_read_and_told_of_once_whatever_its_path(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b.tsv").write_text("the\tDET\ncat\tN\n\na\tDET\ndog\tN\n")
    names = ("a+b.tsv", "./a+b.tsv", str(tmp_path / "a+b.tsv"), str(tmp_path / "." / "a+b.tsv"))
    found = [examples_of(name, "tag", "") for name in names]
    assert all(each is found[0] for each in found)
    told = []
    for record in caplog.records:
        told.append(record.getMessage())
    assert told == ["a+b.tsv: 2 sentences, 4 words, read as a word a line (words=0 tags=1)"]


def test_files_elsewhere_keep_their_paths(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    specs = ("../x.tsv", "/nowhere/x.tsv", "a.de+a.en,b.de+b.en", "")
    assert [relative(spec) for spec in specs] == list(specs)
