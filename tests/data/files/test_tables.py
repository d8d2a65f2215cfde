"""Files of examples: every format says the same, and every mistake is named with its remedy."""

import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from jaxlm.data.files.paths import absolute, paths_of
from jaxlm.data.files.tables import read_examples, refuse
from jaxlm.errors import DataError

ROWS = [
    ("a fine day", "good"),
    ('he said "no",\tthen', "bad"),
    ("zwölf\u2028 Boxer \x85", "good"),
    ("", "bad"),
]
ROWS = [(text.replace("\t", " "), label) for text, label in ROWS]


def as_csv(rows):
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


def as_parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"text": t, "label": n} for t, n in rows]), sink
    )
    return sink.getvalue().to_pybytes()


HEADER = ("text", "label")


def dumps(t, n):
    return json.dumps({"text": t, "label": n}, ensure_ascii=False)


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
    if isinstance(content, bytes):
        data = content
    else:
        data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_says_the_same(tmp_path, name, packed):
    examples, places = read_examples(
        write(tmp_path / (name + packed), FORMATS[name]), "classify", ""
    )
    assert [(e["text"], e["label"]) for e in examples] == ROWS
    assert len(places) == len(ROWS)
    assert all(name in place for place in places)


def test_quotes_and_line_ends_in_a_csv(tmp_path):
    rows = [("one\ntwo\r\nthree", "good"), ('"quoted", he said', "bad")]
    path = write(tmp_path / "a.csv", as_csv([HEADER, *rows, ("x", "good")]))
    examples, places = read_examples(path, "classify", "")
    assert [(e["text"], e["label"]) for e in examples[:2]] == rows
    assert [place.rsplit(":")[-1] for place in places] == ["2", "5", "6"], (
        "the lines that an editor shows"
    )


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


def test_what_is_wrong_in_many_places_is_said_once():
    with pytest.raises(
        DataError,
        match=r"^3 problems in the examples:\n  a:1: no x \(and so in 1 more: 2\)\n  a:3: no y$",
    ):
        refuse(["a:1: no x", "a:2: no x", "a:3: no y"])


@pytest.mark.parametrize(
    "columns", ["text=review label=stars", "text=1,label=2", "label=stars text=1"]
)
def test_columns_by_name_and_by_place(tmp_path, columns):
    rows = [("id", "review", "stars"), ("7", "fine", "5"), ("8", "bad", "1")]
    for name, content in (
        ("a.tsv", "".join("\t".join(row) + "\n" for row in rows)),
        ("a.csv", as_csv(rows)),
    ):
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
    path = write(
        tmp_path / "c.jsonl",
        '{"x": 1, "text": "a", "label": "b"}\n{"text": "a", "label": "b", "text2": "c"}',
    )
    assert "text2" in read_examples(path, "classify", "")[0][1], (
        "a column that only later examples have"
    )


# ---------------------------------------------------------------- mistakes


def refused(path, task="classify", columns=""):
    with pytest.raises(DataError) as error:
        read_examples(str(path), task, columns)
    return str(error.value)


MISTAKES = [
    ("a.tsv", "a\tx\nb\nc\tx\ty\n", ["a.tsv:2: 1 columns, the first line has 2", "a.tsv:3: 3 columns", "2 problems"]),
    ("a.tsv", "", ["no examples in this file"]),
    ("a.tsv", "1\ta film\tx\n2\ta day\ty\n", ["not clear which column is which", "text=0 label=1"]),
    ("a.tsv", "only text\n", ["1 of the 2 columns text, label"]),
    ("a.tsv", "1\ta\tx\ty\n", ["not clear which column", "--config.data.columns="]),
    ("a.tsv", b"ok\tx\nZ\xfcrich\tx\n", ["a.tsv:2: not UTF-8", "iconv -f LATIN1"]),
    ("a.tsv", "a\tx\n".encode("utf-16-le"), ["iconv -f UTF-16LE"]),
    ("a.csv", "sentence,gold\na,x\nb,y\n", ["looks like a header", 'columns="text=sentence label=gold"']),
    ("a.tsv", "my text\tgold\n" + "a\tx\nb\ty\n" * 6, ["looks like a header", "text=0 label=1"]),
    ("a.csv", "review text,gold label\n" + "a,x\nb,y\n" * 12, ["its first line", "text=review_text label=gold_label"]),
    ("a.tsv", "text\tlabel\na film\nb\tx\n", ["a.tsv:2: 1 columns", "a new line within a text"]),
    ("a.csv", 'text,label\na,x\n"b,y\n', ["a.csv:3", "quote"]),
    ("a.csv", 'text,label\na,b,x\n', ["a.csv:2: 3 columns", "comma"]),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n[1]\n{"text": "b"}\n', [":2: not JSON", ":3: not a JSON object"]),
    ("a.jsonl", '{"text": "a", "label": null}\n{"text": "b", "label": 1}', [":1: no label"]),
    ("a.jsonl", '{"text": "a", "lable": 1}\n', ["no column label; did you mean lable?", "it has 'text', 'lable'"]),
    ("a.jsonl", '{"content": "a", "y": 1}\n', ["no column text and no column label", "'content', 'y'"]),
    ("a.jsonl", '{"text": "a"}\n', ["no column label", "needed are text, label"]),
    ("a.parquet", b"PAR?", ["not a parquet file"]),
    ("a.tsv.gz", None, ["can't be read", "gzip"]),
    ("a.xlsx", "x", ["not a file of examples", ".tsv, .csv, .jsonl"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_named_with_its_remedy(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"a\tx\n")[:-8]) if content is None else write(path, content)
    message = refused(path)
    assert str(path) in message and all(part in message for part in said), message


@pytest.mark.parametrize(
    ("header", "typed"),
    [
        ("id,kind,body", "text=body label=kind"),
        ("PhraseId,Sentiment,Review", "text=Review label=Sentiment"),
        ("index,said,verdict", "text=said label=verdict"),
        ("user_id,said,target", "text=said label=target"),
    ],
)
def test_a_number_of_the_row_is_not_suggested_as_its_text(tmp_path, header, typed):
    path = write(tmp_path / "a.csv", f"{header}\n" + "".join(f"{i},x,y\n" for i in range(12)))
    assert f'--config.data.columns="{typed}"' in refused(path)
    assert "in evaluate: --columns" in refused(path)


@pytest.mark.parametrize(
    ("header", "task", "typed", "first"),
    [
        (
            "Review Text,Label Name",
            "classify",
            "text=Review_Text label=Label_Name",
            {"text": "a 1", "label": "1"},
        ),
        (
            "nr,the words,the tags",
            "tag",
            "words=the_words tags=the_tags",
            {"words": "1", "tags": "a 1"},
        ),
        (
            "a text , the  label",
            "classify",
            "text=a_text label=the_label",
            {"text": "a 1", "label": "1"},
        ),
    ],
)
def test_what_a_message_proposes_is_understood_although_names_have_spaces(
    tmp_path, header, task, typed, first
):
    columns = header.count(",") + 1
    rows = "".join(",".join(["a 1", "1", "a 1"][:columns]) + "\n" for _ in range(20))
    path = write(tmp_path / "a.csv", f"{header}\n{rows}")
    assert f'--config.data.columns="{typed}"' in refused(path, task)
    examples, _ = read_examples(path, task, typed)
    assert len(examples) == 20
    assert examples[0] == first


@pytest.mark.parametrize(
    ("header", "columns", "proposed"),
    [
        ("row_id,word,tag", "1,the,O", "words=word tags=tag"),
        ("tag,word,source", "O,the,news", "words=word tags=tag"),
        ("id,tags,tokens", "1,O,the", "words=tokens tags=tags"),
    ],
)
def test_a_proposal_goes_by_names_before_places(tmp_path, header, columns, proposed):
    path = write(tmp_path / "a.csv", f"{header}\n" + f"{columns}\n" * 20)
    assert f'columns="{proposed}"' in refused(path, "tag")


def test_no_guess_is_made_which_answer_is_the_better_one(tmp_path):
    for names in (
        ("instruction", "input", "output"),
        ("question", "answer", "score"),
        ("a", "b", "c", "d"),
    ):
        path = write(tmp_path / "a.jsonl", json.dumps(dict.fromkeys(names, "x")) + "\n")
        message = refused(path, "dpo")
        assert "needed are prompt, chosen, rejected" in message
        assert "--config" not in message


@pytest.mark.parametrize(
    ("task", "header"), [("seq2seq", "de\ten"), ("sft", "my question\treply"), ("tag", "was\twie")]
)
def test_a_first_line_unlike_all_others_is_told_where_it_is_taken_as_an_example(
    tmp_path, caplog, task, header
):
    rows = "".join(f"dies ist Satz {i}\tit is sentence {i}\n" for i in range(30))
    found, _ = read_examples(write(tmp_path / "a.tsv", f"{header}\n{rows}"), task, "")
    (line,) = caplog.messages
    assert len(found) == 31
    assert "is taken as an example" in line
    typed = line.rpartition('--config.data.columns="')[2].partition('"')[0]
    assert len(read_examples(str(tmp_path / "a.tsv"), task, typed)[0]) == 30
    caplog.clear()
    for first in ("ein Satz\ta sentence", "Hallo\thello"):  # like the others, or not alone
        text = f"{first}\n" * 2 + rows
        read_examples(write(tmp_path / "b.tsv", text), task, "")
    assert not caplog.messages


def test_ten_problems_are_shown_of_all_files(tmp_path):
    write(
        tmp_path / "1.tsv", "text\tlabel\n" + "".join("ragged\t" * n + "\n" for n in range(2, 1202))
    )
    write(tmp_path / "2.jsonl", "")
    message = refused(f"{tmp_path}/*")
    assert message.startswith("1,201 problems")
    assert message.count("1.tsv:") == 10
    assert "and 1,191 more" in message


def test_files_that_are_not_there(tmp_path):
    write(tmp_path / "train.tsv", "a\tx\n")
    assert f"train.tsx; did you mean {tmp_path}/train.tsv?" in refused(tmp_path / "train.tsx")
    assert "no directory" in refused(tmp_path / "nowhere" / "train.tsv")
    write(tmp_path / "a.de", "a\nb\n")
    write(tmp_path / "a.en", "a\n")
    message = refused(f"{tmp_path}/a.de+{tmp_path}/a.en", "seq2seq")
    assert "as many lines each" in message
    assert "a.de has 2" in message
    assert "a.en has 1" in message
    assert "b.en" in refused(f"{tmp_path}/a.de+{tmp_path}/b.en", "seq2seq")
    message = refused(tmp_path / "train.tsv", columns="txt=0 label=1")
    assert "no column 'txt'; did you mean text?" in message


def test_a_path_that_exists_is_one_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.tsv", "c+d.tsv", "a.tsv"):
        (tmp_path / name).write_text("x\ty\n")
        assert paths_of(name) == [name]
        assert absolute(name) == str(tmp_path / name)


def test_the_second_file_of_a_pair_may_lie_beside_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train.de", "train.en"):
        (tmp_path / "data" / name).write_text("x\n")
    assert paths_of("data/train.de+train.en") == ["data/train.de+data/train.en"]
    assert paths_of("data/train.de+data/train.en") == ["data/train.de+data/train.en"]
    assert absolute("data/*.de+*.en") == f"{tmp_path}/data/*.de+{tmp_path}/data/*.en"
    (tmp_path / "train.en").write_text("y\n")  # where the command runs comes first, as it did
    assert paths_of("data/train.de+train.en") == ["data/train.de+train.en"]
