"""Files of examples: every format says the same, every example comes once, every mistake is named with its remedy."""

import csv
import gzip
import io
import json
import logging
import os
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import WORDS, small_config

from jaxlm.check import check
from jaxlm.config import base
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data import vocabulary
from jaxlm.data.examples import Examples, label_names, tokenizer_of
from jaxlm.data.pipeline import describe, fingerprint, train_batches, validation_batches
from jaxlm.data.tables import absolute, paths_of, read_examples
from jaxlm.errors import ConfigError, DataError

ROWS = [("a fine day", "good"), ('he said "no",\tthen', "bad"), ("zwölf\u2028 Boxer \x85", "good"), ("", "bad")]
ROWS = [(text.replace("\t", " "), label) for text, label in ROWS]


def as_csv(rows):
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


def as_parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": t, "label": n} for t, n in rows]), sink)
    return sink.getvalue().to_pybytes()


HEADER, dumps = ("text", "label"), lambda t, n: json.dumps({"text": t, "label": n}, ensure_ascii=False)
FORMATS = {
    "header.tsv": "".join(f"{t}\t{n}\n" for t, n in [HEADER, *ROWS]),
    "plain.tsv": "".join(f"{t}\t{n}\n" for t, n in ROWS),
    "windows.tsv": "\ufeff" + "".join(f"{t}\t{n}\r\n" for t, n in [HEADER, *ROWS]),
    "open.tsv": "\n".join(f"{t}\t{n}" for t, n in ROWS),
    "swapped.tsv": "".join(f"{n}\t{t}\n" for t, n in [HEADER, *ROWS]),
    "excel.csv": "\ufeff" + as_csv([("Text", "Label"), *ROWS]),
    "plain.csv": as_csv(ROWS),
    "lines.jsonl": "\n".join(dumps(*row) for row in ROWS) + "\n\n",
    "list.json": json.dumps([{"text": t, "label": n} for t, n in ROWS], indent=1),
    "table.parquet": as_parquet(ROWS),
}


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_says_the_same(tmp_path, name, packed):
    examples, places = read_examples(write(tmp_path / (name + packed), FORMATS[name]), "classify", "")
    assert [(e["text"], e["label"]) for e in examples] == ROWS
    assert len(places) == len(ROWS) and all(name in place for place in places)


def test_quotes_and_line_ends_in_a_csv(tmp_path):
    rows = [("one\ntwo\r\nthree", "good"), ('"quoted", he said', "bad")]
    path = write(tmp_path / "a.csv", as_csv([HEADER, *rows, ("x", "good")]))
    examples, places = read_examples(path, "classify", "")
    assert [(e["text"], e["label"]) for e in examples[:2]] == rows
    assert [place.rsplit(":")[-1] for place in places] == ["2", "5", "6"], "the lines that an editor shows"


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_files_in_parallel(tmp_path, packed):
    for part in "12":
        write(tmp_path / f"{part}.de{packed}", f"eins{part}\r\nzwei \x85 mehr\n\n")
        write(tmp_path / f"{part}.en{packed}", f"one{part}\ntwo\n\n")
    pairs = [("eins1", "one1"), ("zwei \x85 mehr", "two"), ("", "")]
    for spec in ("{0}/1.de{1}+{0}/1.en{1}", "{0}/*.de{1}+{0}/*.en{1}"):
        examples, _ = read_examples(spec.format(tmp_path, packed), "seq2seq", "")
        assert [(e["source"], e["target"]) for e in examples[:3]] == pairs
        assert len(examples) == (6 if "*" in spec else 3)


def test_several_files_each_with_its_header(tmp_path):
    write(tmp_path / "1.tsv", "text\tlabel\na\tx\n")
    write(tmp_path / "2.tsv", "label\ttext\nx\tb\n")
    write(tmp_path / "3.jsonl", '{"text": "c", "label": "x"}\n')
    for spec in (f"{tmp_path}/*", f"{tmp_path}/1.tsv, {tmp_path}/2.tsv,{tmp_path}/3.jsonl"):
        assert [e["text"] for e in read_examples(spec, "classify", "")[0]] == ["a", "b", "c"]


def test_absolute_specs_name_the_same_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a+b.tsv", "1.de", "1.en"):
        write(tmp_path / name, "x\ty\n")
    given = "a+b.tsv, *.de+*.en"
    assert paths_of(absolute(given)) == [f"{tmp_path}/a+b.tsv", f"{tmp_path}/1.de+{tmp_path}/1.en"]
    assert absolute("") == ""


@pytest.mark.parametrize("columns", ["text=review label=stars", "text=1,label=2", "label=stars text=1"])
def test_columns_by_name_and_by_place(tmp_path, columns):
    rows = [("id", "review", "stars"), ("7", "fine", "5"), ("8", "bad", "1")]
    for name, content in (("a.tsv", "".join("\t".join(row) + "\n" for row in rows)), ("a.csv", as_csv(rows))):
        examples, _ = read_examples(write(tmp_path / name, content), "classify", columns)
        assert {"text": "fine", "label": "5"} in examples
    path = write(tmp_path / "a.jsonl", '{"id": 7, "review": "fine", "stars": 5}\n')
    assert read_examples(path, "classify", columns)[0] == [{"text": "fine", "label": 5}]


def test_pairs_of_texts_and_what_may_be_missing(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\ttext2\na\tx\tb\nc\ty\t\n")
    assert read_examples(path, "classify", "")[0] == [
        {"text": "a", "label": "x", "text2": "b"}, {"text": "c", "label": "y"}
    ]  # fmt: skip
    path = write(tmp_path / "b.tsv", "hi\thello\n")
    assert read_examples(path, "sft", "")[0] == [{"prompt": "hi", "response": "hello"}]
    path = write(tmp_path / "c.jsonl", '{"x": 1, "text": "a", "label": "b"}\n{"text": "a", "label": "b", "text2": "c"}')
    assert "text2" in read_examples(path, "classify", "")[0][1], "a column that only later examples have"


# ---------------------------------------------------------------- mistakes


def refused(path, task="classify", columns=""):
    with pytest.raises(DataError) as error:
        read_examples(str(path), task, columns)
    return str(error.value)


MISTAKES = [
    ("a.tsv", "a\tx\nb\nc\tx\ty\n", ["a.tsv:2: 1 columns, the first line has 2", "a.tsv:3: 3 columns", "2 problems"]),
    ("a.tsv", "", ["no examples in this file"]),
    ("a.tsv", "only text\n", ["--config.data.columns="]),
    ("a.tsv", "1\ta\tx\ty\n", ["not clear which column", "--config.data.columns="]),
    ("a.tsv", b"ok\tx\nZ\xfcrich\tx\n", ["a.tsv:2: not UTF-8", "iconv -f LATIN1"]),
    ("a.tsv", "a\tx\n".encode("utf-16"), ["iconv -f UTF-16"]),
    ("a.csv", "sentence,gold\na,x\nb,y\n", ["looks like a header", 'columns="text=sentence label=gold"']),
    ("a.tsv", "my text\tgold\n" + "a\tx\nb\ty\n" * 6, ["looks like a header", "text=0 label=1"]),
    ("a.csv", 'text,label\na,x\n"b,y\n', ["a.csv:3", "quote"]),
    ("a.csv", 'text,label\na,b,x\n', ["a.csv:2: 3 columns", "comma"]),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n[1]\n{"text": "b"}\n', [":2: not JSON", ":3: not a JSON object"]),
    ("a.jsonl", '{"text": "a", "label": null}\n{"text": "b", "label": 1}', [":1: no label"]),
    ("a.jsonl", '{"text": "a", "lable": 1}\n', ["no column label; did you mean lable?", "it has text lable"]),
    ("a.jsonl", '{"content": "a", "y": 1}\n', ["no column text and no column label", "content y"]),
    ("a.parquet", b"PAR?", ["not a parquet file"]),
    ("a.tsv.gz", None, ["can't be read"]),
    ("a.xlsx", "x", ["not a file of examples", ".tsv, .csv, .jsonl"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_named_with_its_remedy(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(b"not gzip") if content is None else write(path, content)
    message = refused(path)
    assert str(path) in message and all(part in message for part in said), message


def test_ten_problems_are_shown_of_all_files(tmp_path):
    write(tmp_path / "1.tsv", "text\tlabel\n" + "ragged\n" * 1200)
    write(tmp_path / "2.jsonl", "")
    message = refused(f"{tmp_path}/*")
    assert message.startswith("1,201 problems") and message.count("1.tsv:") == 10 and "and 1,191 more" in message


def test_files_that_are_not_there(tmp_path):
    write(tmp_path / "train.tsv", "a\tx\n")
    assert "train.tsx; did you mean train.tsv?" in refused(tmp_path / "train.tsx")
    assert "no directory" in refused(tmp_path / "nowhere" / "train.tsv")
    write(tmp_path / "a.de", "a\nb\n")
    write(tmp_path / "a.en", "a\n")
    message = refused(f"{tmp_path}/a.de+{tmp_path}/a.en", "seq2seq")
    assert "as many lines each" in message and "a.de has 2" in message and "a.en has 1" in message
    assert "b.en" in refused(f"{tmp_path}/a.de+{tmp_path}/b.en", "seq2seq")
    message = refused(tmp_path / "train.tsv", columns="txt=0 label=1")
    assert "no column 'txt'; did you mean text?" in message


def settings(tmp_path, rows, val=None, task="classify", **more):
    """A resolved config of examples [(text, label), ...] or [dict, ...] in .jsonl files."""
    lines = lambda rows: "".join(json.dumps(r if isinstance(r, dict) else dict(zip(HEADER, r))) + "\n" for r in rows)
    files = {"data__train": write(tmp_path / "train.jsonl", lines(rows))}
    files["data__val"] = write(tmp_path / "val.jsonl", lines(val or rows))
    return small_config(**{"task__name": task, "data__tokenizer": "words", "train__batch_size": 4} | files | more)


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
    sets = [piece["label"].tolist() for piece in Examples(config, "train").pieces]
    assert sets == [[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    config = settings(tmp_path, [("a", 1), ("b", "-2.5e-1")], task="regress")
    assert [float(piece["label"]) for piece in Examples(config, "train").pieces] == [1.0, -0.25]


@pytest.mark.parametrize("task", ["classify", "multilabel", "tag"])
def test_a_label_that_training_does_not_have_is_named(tmp_path, task):
    shape = (lambda t, n: {"words": t, "tags": n}) if task == "tag" else lambda t, n: {"text": t, "label": n}
    config = settings(tmp_path, [shape("a", "good"), shape("b", "bad")], [shape("a", "god")], task)
    with pytest.raises(DataError, match=r"val\.jsonl:1: 'god' is not one of the labels bad, good; did you mean good"):
        Examples(config, "val")


def test_what_cannot_be_learned_says_why(tmp_path):
    for rows, task, said in (
        ([("a", "x"), ("b", "x")], "classify", "every example has the label 'x'"),
        ([("a", "x"), ("b", "")], "classify", r"train\.jsonl:2: its label is empty"),
        ([(f"t{i}", f"some text {i}") for i in range(40)], "classify", "40 different labels.*another order"),
        ([("a", "x"), ("b", "1")], "regress", r"train\.jsonl:1: its label 'x' is not a number"),
        ([(["a"], "x"), ("b", "y")], "classify", r"train\.jsonl:1: its text is a list, not text"),
    ):
        with pytest.raises(DataError, match=said):
            made(tmp_path, rows, task=task)
    with pytest.raises(DataError, match="example 1: no label; it has text"):
        Examples(settings(tmp_path, ROWS), "val", examples=[{"text": "a"}])


def test_a_careless_command_is_corrected(tmp_path):
    c = base()
    c.task.name = "clasify"
    assert any("did you mean classify?" in problem for problem in check(c))
    c.task.name, c.data.path, c.model.name = "classify", "tokens", "encoder"
    assert any("config.data.path: task classify learns from examples" in problem for problem in check(c))
    c.data.path = ""
    with pytest.raises(DataError, match=r"config\.data\.train is empty"):
        describe(c)
    c.task.name, c.data.word_dropout = "lm", 0.1
    with pytest.raises(ConfigError, match=r"data\.word_dropout=0\.1: task lm does not follow it"):
        describe(c)
    with pytest.raises(ConfigError, match=r"--config\.data\.vocab_size=\d+"):
        made(tmp_path, ROWS, data__tokenizer="sentencepiece", data__vocab_size=10)


def test_squads_answers_are_read(tmp_path):
    answers = {"text": ["two words", "words"], "answer_start": [4, 8]}
    rows = [{"question": "q", "context": "two two words", "answers": answers}]
    source = made(tmp_path, rows, task="qa", data__columns="answer=answers", data__tokenizer="bytes")
    assert source.examples[0]["answer"] == ["two words", "words"] and source.examples[0]["start"] == [4, 8]
    assert source.pieces[0]["weights"].argmax() == 1 + 1 + 1 + 3, "the second two"


# ---------------------------------------------------------------- rows


def many(count, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    return [(" ".join(rng.choice(WORDS, rng.integers(1, longest))), f"c{rng.integers(4)}") for _ in range(count)]


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
                assert batch["labels"][0, place] == source.pieces[i]["label"] and batch["weights"][0, place] == 1
    batches = train_batches(config)
    counts = Counter(int((batches[k]["weights"] > 0).sum(axis=1)[r]) for k in range(source.num_rows) for r in range(4))
    assert sum(n * c for n, c in counts.items()) == 4 * 500, "four epochs"


def test_rows_are_filled(tmp_path):
    for longest, length in ((12, 128), (40, 128), (60, 256)):
        source = made(tmp_path, many(2000, longest=longest), data__seq_len=length, data__examples_per_row=length)
        assert source.num_tokens / (source.num_rows * length) > 0.93
    pairs = [{"source": text, "target": text} for text, _ in many(2000, longest=40)]
    source = made(tmp_path, pairs, task="seq2seq", data__seq_len=128, data__enc_len=128)
    assert source.num_tokens / (source.num_rows * 256) > 0.85
    assert len(made(tmp_path, many(50), data__pack=False).rows) == 50


def test_long_examples_are_cut_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "jaxlm"):
        source = made(tmp_path, [("a " * 99, "x"), ("", "y"), ("", "y")])
    assert "1 of 3 train examples are longer than data.seq_len=32" in caplog.text and "101 tokens" in caplog.text
    assert source.read(np.arange(source.num_rows), [(0, 0)] * 3)["weights"].sum() == 3, "duplicates and empty text too"
    caplog.clear()
    with caplog.at_level(logging.WARNING, "jaxlm"):
        made(tmp_path, [{"prompt": "a " * 99, "response": "b"}], task="sft")
    assert "of 1 of them nothing is left to learn" in caplog.text
    asked = {"question": "q", "context": "a " * 25 + "b c", "answer": "b c"}
    bits = made(tmp_path, [asked], task="qa", data__seq_len=29).pieces[0]
    assert not bits["weights"].any() and set(bits["targets"].tolist()) == {0, 4}, "half an answer is none"


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
    hidden, real = dropped != plain["tokens"], plain["segments"] > 0
    words = real & (plain["tokens"] < source.tokenizer.vocab_size)
    assert set(dropped[hidden]) == {source.vocab.mask} and not (hidden & ~words).any()
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
        "weight" not in piece for piece in made(tmp_path, rows, task__class_weights="balanced", split="val").pieces
    )
    source = made(tmp_path, rows, task__balanced_sampling=True)
    shown = [source.pieces[i]["label"] for row in source.rows for i in row]
    assert np.bincount(shown).tolist() == [60, 60, 60] and len({i for row in source.rows for i in row}) == 72
    tags = [{"words": "a b c", "tags": "O O X"}] * 5
    source = made(tmp_path, tags, task="tag", task__class_weights="balanced")
    np.testing.assert_allclose(sum(p["weights"][p["targets"] == 0].sum() for p in source.pieces), 7.5)
    np.testing.assert_allclose(sum(p["weights"][p["targets"] == 1].sum() for p in source.pieces), 7.5)


def test_lower_case_and_what_the_order_of_data_depends_on(tmp_path):
    rows = [("The CAT", "x"), ("the cat", "y")]
    config = settings(tmp_path, rows, data__lowercase=True)
    first, second = Examples(config, "train").pieces
    np.testing.assert_array_equal(first["tokens"], second["tokens"])
    known = fingerprint(config)
    for change in ({"data__lowercase": False}, {"data__labels": ("y", "x")}, {"task__class_weights": "balanced"}):
        assert fingerprint(settings(tmp_path, rows, **{"data__lowercase": True} | change)) != known
    assert fingerprint(settings(tmp_path, [*rows, ("a", "x")], data__lowercase=True)) != known, "the file has changed"


# ---------------------------------------------------------------- words


def test_words_come_back_and_the_unknown_are_one():
    words = vocabulary.make("words", ["the cat the dog", "the <unk> \u00e9t\u00e9\ncat"], 100)
    assert words.words == ["<unk>", "the", "cat", "dog", "\u00e9t\u00e9"] and words.vocab_size == 5
    assert words.decode(words.encode("the  \u00e9t\u00e9\tcat")) == "the \u00e9t\u00e9 cat"
    assert words.encode("the cow <unk>").tolist() == [1, 0, 0] and words.encode("").dtype == np.int32
    assert words.decode([1, 99, -1, 0]) == "the <unk>"
    again = tokenizers.from_bytes("words", words.to_bytes())
    assert again.words == words.words and again.fingerprint == words.fingerprint
    assert vocabulary.make("words", ["a a b"], 100, min_count=2).words == ["<unk>", "a"]
    assert vocabulary.make("words", ["a a b c"], 2).words == ["<unk>", "a"]
    with pytest.raises(DataError):
        tokenizers.from_bytes("words", b'{"wrods": []}')


def test_a_tokenizer_is_made_once_and_anew_when_the_file_changes(tmp_path):
    config = settings(tmp_path, [("one \ud800", "x"), ("two", "y")])
    first = tokenizer_of(config.data, "classify")
    assert tokenizer_of(config.data, "classify") is first and "one" in first.words
    stamp = os.stat(config.data.train).st_mtime_ns + 10**9
    settings(tmp_path, [("three", "x"), ("four", "y")])
    os.utime(config.data.train, ns=(stamp, stamp))
    assert "three" in tokenizer_of(config.data, "classify").words
