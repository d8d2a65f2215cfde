"""Laws of what a file is: by its content, said in one line, read as that or refused with what to type."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import subprocess
import sys
import zipfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxlm.data import prepare, readers
from jaxlm.data import shard_jobs as parts
from jaxlm.data.files import json_records
from jaxlm.errors import DataError

DOCS = [
    "first, with a comma",
    'a "quoted" word',
    "two\nlines\n",
    "tab\there",
    "\u4e2d\u6587 \U0001f600",
    "x" * 200,
]


def lines(docs=DOCS, key: str = "text") -> str:
    return "".join(json.dumps({"id": i, key: doc}) + "\n" for i, doc in enumerate(docs))


def table(docs=DOCS, key: str = "text", **options) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file, **options)
    writer.writerows([["id", key], *enumerate(docs)])
    return file.getvalue()


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def documents(path: Path, key: str = "text") -> list[str]:
    """The documents of one file, where nothing is wrong with it."""
    notes = readers.Notes()
    found = []
    for spans in parts.plan(readers.find([str(path)], key)):
        for piece in readers.read(spans, key, notes):
            if piece.first:
                found.append("")
            found[-1] += piece.text
    assert not notes.bad
    assert not notes.broken
    return found


def format_of(path: Path, key: str = "text") -> str:
    (source,) = readers.find([str(path)], key)
    return source.format


def refused(path: Path, key: str = "text") -> str:
    with pytest.raises(DataError) as error:
        readers.find([str(path)], key)
    _, line = str(error.value).splitlines()
    assert line.startswith(f"  {path}: ")
    return line.removeprefix(f"  {path}: ")


# ---------------------------------------------------------------- read by content

READ = {
    "a.jsonl": (lines(), "JSON lines"),
    "a.txt": (lines(), "JSON lines"),
    "part-00000": (lines(), "JSON lines"),
    "a.log": ("\ufeff\n" + lines(), "JSON lines"),
    "b.parquet": (lines(), "JSON lines"),
    "b.csv": (lines(), "JSON lines"),
    "a.json": (json.dumps([{"text": doc} for doc in DOCS]), "a JSON list"),
    "b.json": (json.dumps([{"text": doc} for doc in DOCS], indent=2), "a JSON list"),
    "c.json": (
        "\n".join(json.dumps({"text": doc, "n": {"m": []}}, indent=1) for doc in DOCS),
        "JSON objects",
    ),
    "c.txt": (json.dumps([{"text": doc} for doc in DOCS], indent=2), "a JSON list"),
    "c.jsonl": ("".join(json.dumps({"text": doc}, indent=4) for doc in DOCS), "JSON objects"),
    "a.csv": (table(), "a table"),
    "c.csv": ("\ufeff" + table(quoting=csv.QUOTE_ALL), "a table"),
    "d.csv": (table(delimiter=";"), "a table"),
    "e.csv": (table(delimiter="\t"), "a table"),
    "a.tsv": (table(delimiter="\t"), "a table"),
    "b.tsv": (table(delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL), "a table"),
}


@pytest.mark.parametrize("name", READ)
def test_every_layout_gives_the_same_documents(tmp_path, monkeypatch, name):
    text, words = READ[name]
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 7)
    path = write(tmp_path / name, text)
    assert documents(path) == DOCS
    assert format_of(path).startswith(f"{words}, one document a record (")
    write(path, gzip.compress(text.encode()))
    assert documents(path) == DOCS
    write(path, text.removeprefix("\ufeff").encode("utf-16"))
    assert documents(path) == DOCS


def test_a_record_may_be_longer_than_what_is_looked_at(tmp_path):
    docs = ["word " * 50_000, "\u4e2d" * 100_000]
    for name, text in (
        ("a.txt", lines(docs)),
        ("b.json", json.dumps([{"text": doc} for doc in docs])),
        (
            "c.json",
            json.dumps({"text": docs[0]}, indent=1) + json.dumps({"text": docs[1]}, indent=1),
        ),
        ("d.csv", table(docs)),
        ("e.tsv", table(docs, delimiter="\t")),
    ):
        assert documents(write(tmp_path / name, text)) == docs


@pytest.mark.parametrize(
    "text",
    [
        "{ This is prose in braces. }\nAnd more.\n",
        '{"a": 1}\nis how an object is written.\nSo it is.\n',
        "{\n  int x = 1;\n}\n" * 10,
        '{"a", "b"} is a set\n',
        "[Chapter 1]\nIt was a dark night.\n",
        '["a", "b"]\n',
        "[1] A. Author, A Title.\n[2] B. Author, Another.\n",
        "{}\n{}\nfor (;;) {}\nx\n",
    ],
)
def test_prose_and_source_are_not_taken_for_json(tmp_path, text):
    path = write(tmp_path / "a.txt", text)
    assert documents(path) == [text]
    assert format_of(path) == "plain text, one document"
    source = write(tmp_path / "a.py", '{"text": "a dict"}\n{"text": "of Python"}\n')
    assert documents(source) == [source.read_text()]


def test_quotes_of_a_tsv_are_text_where_they_hold_nothing_together(tmp_path):
    cells = ['"hello" he said', "'' plain ''", 'a 5" disk', '"all quoted"']
    text = "text\tlabel\n" + "".join(f"{cell}\t1\n" for cell in cells)
    assert documents(write(tmp_path / "a.tsv", text)) == cells


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "^"])
@pytest.mark.parametrize("line", ["sep={}\r\n", '"sep={}"\n', "SEP={}\n", "\ufeffsep={}\n"])
def test_the_line_by_which_excel_tells_its_delimiter_is_no_header(tmp_path, delimiter, line):
    for name in ("a.csv", "a.tsv"):
        path = write(tmp_path / name, line.format(delimiter) + table(delimiter=delimiter))
        assert documents(path) == DOCS
    path = write(
        tmp_path / "b.csv", line.format(delimiter) + table(key="content", delimiter=delimiter)
    )
    with pytest.raises(
        DataError, match="there are id, content; say where the text is: --text_key=content"
    ):
        readers.find([str(path)])


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.csv", "text,label\nok,1\none, two,1\n", "a.csv:3: 3 columns, the first line has 2"),
        ("a.csv", 'text,label\n"a\nb",1\n"bad" quote,1\n', "a.csv:4: .*written twice"),
        ("a.csv", 'text,label\nok,1\n"never closed,1\nmore,2\n', r"a.csv: .*line 3 isn't closed"),
        ("a.tsv", "text\tlabel\nok\t1\nshort\n", "a.tsv:3: 1 columns"),
        ("a.tsv", '"text"\t"label"\n"ok"\t"1"\n"short"\n', "a.tsv:3: 1 columns"),
        ("a.tsv", '"text"\t"label"\n"ok"\t"1"\n"bad" quote\t1\n', "a.tsv:3: .*written twice"),
        ("a.json", '[{"text": "a"}, {"text": null}]', "a.json:2: 'text' is null"),
        ("a.json", '[{"text": "a"}, 3]', "a.json:2: not an object but int"),
        ("a.json", '[{"text": "a"}, {"text": "b"}', "a.json: the list has no end .after 2 records"),
        ("a.json", '[{"text": "a"}, {"text": "b]', "a.json: broken JSON: .*after 1 records"),
        ("a.json", '[{"text": "a"}] tail', "a.json: something follows .*after 1 records"),
        ("a.txt", '{"text": "a"}\n' * 7 + "{broken\n", "a.txt:8: broken JSON"),
        ("a.txt", '{"text": "a\n' + '{"text": "a"}\n' * 7, "a.txt:1: broken JSON"),
    ],
)
def test_what_is_broken_is_told_with_its_place(tmp_path, name, text, where):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=f"{where}(.|\n)*on_bad_record=skip"):
        prepare.prepare([str(path)], tmp_path / "out", "bytes", workers=1)
    prepare.prepare(
        [str(path)], tmp_path / "out", "bytes", workers=1, on_bad_record="skip", val_fraction=0
    )


# ---------------------------------------------------------------- the key


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a.csv", "a.tsv", "a.parquet"])
@pytest.mark.parametrize(
    ("there", "given"), [("content", "text"), ("Text", "text"), ("review_body", "text")]
)
def test_a_key_that_is_not_there_is_told_with_those_that_are(tmp_path, name, there, given):
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pa.table({"id": [1], "url": ["a"], there: ["long text"]}), path)
        if there == "review_body":
            pyarrow.parquet.write_table(pa.table({"id": [1], there: ["long text"]}), path)
    elif name == "a.json":
        write(path, json.dumps([{"id": 1, there: doc} for doc in DOCS]))
    elif name in ("a.csv", "a.tsv"):
        write(path, table(key=there, delimiter="," if name == "a.csv" else "\t"))
    else:
        write(path, lines(key=there))
    reason = refused(path, given)
    assert f"'{given}'; there are id, " in reason
    assert reason.endswith(f"--text_key={there}")
    assert documents(path, there)[-1] in (DOCS[-1], "long text")


def test_other_shapes_of_json_are_refused_with_what_makes_lines(tmp_path):
    cases = (
        (json.dumps({"version": 1, "data": [{"text": "a"}]}, indent=1), "jq -c '.[\"data\"][]'"),
        (json.dumps(["a", "b"]), "jq -c '.[] | {text: .}'"),
        ('{\n "text": "a",\n "b" 3}', "broken JSON"),
    )
    for text, words in cases:
        assert words in refused(write(tmp_path / "a b.json", text))


def test_a_table_whose_column_is_not_clear_is_refused(tmp_path):
    assert "several columns 'text'" in refused(write(tmp_path / "a.csv", "text,text\na,b\n"))
    assert "nothing in it is text" in refused(write(tmp_path / "a.csv", "a,b\n1,2\n"))


def test_a_table_without_a_header_is_refused_with_the_command_that_writes_one(tmp_path):
    rows = "".join(
        f"{i}\tA sentence with some words, and number {i} among them.\n" for i in range(20)
    )
    path = write(tmp_path / "a b.tsv", rows)
    command = refused(path).partition("columns first: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    assert documents(tmp_path / "a b.named.tsv") == [
        row.split("\t")[1] for row in rows.splitlines()
    ]


# ---------------------------------------------------------------- what is no text


def binary(kind: str, tmp_path: Path) -> bytes:
    rng = np.random.default_rng(0)
    noise = rng.integers(1, 256, 5000, dtype=np.uint8).tobytes()  # without NUL
    if kind == "sqlite":
        file = tmp_path / "db"
        with sqlite3.connect(file) as database:
            database.execute("create table a (b text)")
        return file.read_bytes()
    if kind == "npy":
        file = io.BytesIO()
        np.save(file, rng.normal(size=1000))
        return file.getvalue()
    if kind == "docx":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("word/document.xml", "<w:t>text</w:t>")
        return file.getvalue()
    return {
        "png": b"\x89PNG\r\n\x1a\n" + noise,
        "jpeg": b"\xff\xd8\xff\xe0" + noise,
        "elf": Path(sys.executable).resolve().read_bytes()[:70_000],
        "mp3": b"\xff\xfb\x90" + noise,
        "pickle": pickle.dumps({"text": ["a"]}),
        "gguf": b"GGUF\x03\0\0\0" + noise,
        "safetensors": b"\x40\0\0\0\0\0\0\0" + b'{"weight":{"dtype":"F32"}}' + noise,
        "random": noise,
        "floats": rng.normal(size=2000).astype("<f4").tobytes(),
        "ids": rng.integers(0, 50_000, 2000).astype("<u4").tobytes(),
    }[kind]


WORDS = {
    "png": "a PNG image",
    "jpeg": "a JPEG image",
    "elf": "a program",
    "mp3": "MP3",
    "pickle": "pickle",
}
WORDS |= {
    "gguf": "GGUF",
    "safetensors": "safetensors",
    "sqlite": "SQLite",
    "npy": "NumPy",
    "docx": "Word",
}
WORDS |= {"random": "not text: ", "floats": "not text: ", "ids": "not text: "}


@pytest.mark.parametrize("kind", WORDS)
def test_what_is_no_text_is_refused_by_name(tmp_path, kind):
    data = binary(kind, tmp_path)
    for name in ("a.txt", "a.jsonl", "a.csv", "part-0"):
        assert WORDS[kind] in refused(write(tmp_path / name, data))
        assert WORDS[kind] in refused(write(tmp_path / name, lzma.compress(data)))


CHINESE = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u3002\n"
JAPANESE = "\u3053\u308c\u306f\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3067\u3059\u3002\n"
RUSSIAN = "\u041f\u0440\u0438\u0432\u0435\u0442, \u043a\u0430\u043a \u0434\u0435\u043b\u0430?\n"
KOREAN = "\uc624\ub298\uc740 \ub0a0\uc528\uac00 \uc88b\uc2b5\ub2c8\ub2e4.\n"
FRENCH = "Caf\u00e9 d\u00e9j\u00e0 vu, na\u00efve fa\u00e7ade\n"
LEGACY = [
    (CHINESE, "GB18030"),
    (JAPANESE, "CP932"),
    (JAPANESE, "EUC-JP"),
    (JAPANESE, "ISO-2022-JP"),
    (KOREAN, "CP949"),
    (RUSSIAN, "WINDOWS-1251"),
    (RUSSIAN, "KOI8-R"),
    (FRENCH, "WINDOWS-1252"),
]
WIDE = [
    (text, encoding)
    for text in (CHINESE, JAPANESE, RUSSIAN, KOREAN, FRENCH)
    for encoding in ("UTF-16LE", "UTF-16BE", "UTF-32LE")
]


@pytest.mark.parametrize(("text", "encoding"), LEGACY + WIDE)
@pytest.mark.parametrize("times", [1, 5000])
def test_text_that_is_not_utf8_is_refused_with_the_command_that_converts_it(
    tmp_path, text, encoding, times
):
    text *= times
    path = write(tmp_path / "a b.txt", text.encode(encoding))
    reason = refused(path)
    assert ("(a guess)" in reason) == (
        (text, encoding) not in WIDE and not encoding.startswith("UTF")
    )
    command = reason.partition("convert it: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    assert documents(tmp_path / "a b.utf8.txt") == [text]
    assert "bzip2 -dc " in refused(
        write(tmp_path / "a.csv.bz2", bz2.compress(text.encode(encoding)))
    )


def test_a_few_stray_bytes_are_counted_and_not_refused(tmp_path):
    for data in (
        b"some text\n" * 1000 + b"\xff\xfe\xfd\x80\n",
        (CHINESE * 100).encode() + b"\xe9" * 20,
        b"a caf\xe9",
        b"one\x01two\x01three\n" * 100,
        b"record one\0record two\0" * 100,
        b"form\x0cfeed \x1b[31mred\x1b[0m \0\n",
    ):
        path = write(tmp_path / "a.txt", data)
        assert documents(path) == [data.decode(errors="replace")]


# ---------------------------------------------------------------- parquet

KINDS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
]
KINDS += [pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.binary())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_type_of_text_in_parquet_is_read(tmp_path, kind):
    values = pa.array([doc.encode() for doc in DOCS])
    if pa.types.is_dictionary(kind):
        values = values.cast(kind.value_type).dictionary_encode()
    path = tmp_path / "a"  # whatever its name
    pyarrow.parquet.write_table(
        pa.table({"id": list(range(len(DOCS))), "text": values.cast(kind)}), path
    )
    assert documents(path) == DOCS
    assert format_of(path) == 'parquet, one document a row (column "text")'


def test_only_the_column_of_the_text_is_read(tmp_path):
    broken = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 1, 2], "<i4")), pa.py_buffer(b"\xff\xfe")
    )
    columns = {
        "text": ["a", "b"],
        "nanoseconds": pa.array([1, 2], pa.timestamp("ns", tz="UTC")),
        "year 10000": pa.array([1 << 60, datetime(2020, 1, 1)], pa.timestamp("us")),
        "broken": broken,
        "vector": [[1.0], [2.0]],
    }
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table(columns), path)
    assert documents(path) == ["a", "b"]


def test_bytes_in_parquet_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    images = pa.array([binary("png", tmp_path)] * 3)
    pyarrow.parquet.write_table(pa.table({"image": images, "text": ["a"] * 3}), path)
    assert "column 'image' has bytes that are not text" in refused(path, "image")
    write(tmp_path / "b.parquet.gz", gzip.compress(path.read_bytes()))
    assert "gzip -dc " in refused(tmp_path / "b.parquet.gz")


# ---------------------------------------------------------------- what is said


def test_the_format_of_each_file_is_one_line(tmp_path):
    write(tmp_path / "c4-train.00000-of-01024.json.gz", gzip.compress(lines().encode()))
    write(tmp_path / "notes.txt", "text\n".encode("utf-16"))
    write(tmp_path / "z", "text\n")
    command = [
        sys.executable,
        "-m",
        "jaxlm.data.prepare",
        "--input=*",
        "--output=out",
        "--tokenizer=bytes",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.stderr.splitlines()[:3] == [
        'c4-train.00000-of-01024.json.gz: JSON lines, gzip, one document a record (key "text")',
        "notes.txt: plain text, UTF-16LE, one document",
        "z: plain text, one document",
    ]
    assert result.returncode == 0


def test_files_of_one_format_are_told_together(tmp_path):
    for i in range(2000):
        write(tmp_path / f"{i:04}.txt", "text")
    write(tmp_path / "a.jsonl", lines())
    found = readers.formats_of(readers.find([str(tmp_path)]))
    assert found == [
        f"{tmp_path}/0000.txt and 1,999 more: plain text, one document",
        f'{tmp_path}/a.jsonl: JSON lines, one document a record (key "text")',
    ]


@pytest.mark.parametrize(
    "name", ["a,b.txt", "a+b.txt", "a [1].txt", "what?.txt", "star*.txt", "~a.txt"]
)
def test_a_path_that_exists_is_one_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / f"{name} folder"
    folder.mkdir()
    write(folder / name, "in the folder")
    write(tmp_path / name, "here")
    assert [source.name for source in readers.find([name])] == [name]
    assert [source.name for source in readers.find([f"{folder}/*.txt"])] == [f"{folder}/{name}"]


def test_what_a_directory_has_besides_is_told(tmp_path):
    for name in ("a.json.gz", "b.json", "c.csv", "d.csv.gz", "d.PNG", ".hidden.csv", "e.txt"):
        write(tmp_path / name, "text")
    (line,) = readers.left_out([str(tmp_path), str(tmp_path / "e.txt")])
    assert line.startswith(f"left out of {tmp_path}: 2 .csv, 2 .json, 1 .png; a glob reads them: ")
    (tmp_path / "e.txt").unlink()
    with pytest.raises(DataError, match=r"no file matches(.|\n)*left out of .*: .* 1 .png"):
        readers.find([str(tmp_path)])


def test_values_of_json_come_from_any_blocks():
    text = json.dumps([{"a": "x" * n, "b": [n, {"c": None}]} for n in range(20)], indent=1)
    for size in (1, 3, 1000):
        blocks = []
        for i in range(0, len(text), size):
            blocks.append(text[i : i + size])
        assert list(json_records.stream_values(blocks)) == json.loads(text)
    assert list(json_records.stream_values(["12", "3 4 ", '"a"[1]'])) == [123, 4, "a", [1]]
    assert list(json_records.stream_values([])) == list(json_records.stream_values([" [ ] "])) == []
