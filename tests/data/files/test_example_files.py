"""Files of examples are what their content says: compression, encoding, kind of table, columns of parquet."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from jaxlm.config import recipe as configs
from jaxlm.config.check import mixture
from jaxlm.config.tasks import task_of
from jaxlm.data.files.paths import absolute, parts_of, paths_of
from jaxlm.data.files.tables import read_examples
from jaxlm.errors import DataError

TABLE = "text\tlabel\na fine day\tgood\nein blöder Tag\tbad\n"
LINES = '{"text": "a fine day", "label": "good"}\n{"text": "ein blöder Tag", "label": "bad"}\n'
EXAMPLES = [{"text": "a fine day", "label": "good"}, {"text": "ein blöder Tag", "label": "bad"}]


def read(path, content, task="classify", columns=""):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_examples(str(path), task, columns)[0]


def refused(path, content, task="classify", columns=""):
    with pytest.raises(DataError) as error:
        read(path, content, task, columns)
    assert str(path) in str(error.value)
    return str(error.value)


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "a")
    return file.getvalue()


PACK = {
    "gzip": gzip.compress,
    "members": lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),
    "zstd": lambda data: pa.compress(data, "zstd", asbytes=True),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "none": bytes,
}


@pytest.mark.parametrize("name", ["train.tsv", "train.tsv.gz", "train.TSV.zst", "train"])
@pytest.mark.parametrize("packed", list(PACK))
def test_compression_is_seen_by_the_first_bytes(tmp_path, packed, name):
    assert read(tmp_path / name, PACK[packed](TABLE.encode())) == EXAMPLES


@pytest.mark.parametrize("code", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("content", [TABLE, LINES, TABLE.replace("\t", ";")])
def test_text_with_a_byte_order_mark_is_read(tmp_path, code, content):
    assert read(tmp_path / "a.txt", content.encode(code)) == EXAMPLES


@pytest.mark.parametrize(
    "name", ["train.00000-of-00010.json.gz", "a.ndjson", "a.jsonl", "a.txt", "a.tsv", "a.data", "a"]
)
def test_json_is_read_under_any_name(tmp_path, name):
    listed = json.dumps([json.loads(line) for line in LINES.splitlines()])
    many_lines = "".join(json.dumps(example, indent=1) + "\n" for example in EXAMPLES)
    for content in (LINES, listed, listed.replace("}, {", "},\n{"), many_lines):
        assert read(tmp_path / name, content) == EXAMPLES
    assert read(tmp_path / name, json.dumps(EXAMPLES[0], indent=2)) == EXAMPLES[:1]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a"])
def test_what_stands_between_columns_is_seen_by_the_header(tmp_path, name, mark, caplog):
    if mark == ",":
        said = '"fine, or so"'
    else:
        said = "fine, or so"
    text = f"label{mark}text\ngood{mark}{said}\nbad{mark}no\n"
    assert read(tmp_path / name, text) == [
        {"text": "fine, or so", "label": "good"},
        {"text": "no", "label": "bad"},
    ]
    own = {"a.csv": ",", "a.tsv": "\t", "a.txt": "\t"}.get(name)
    assert ("between its columns" in caplog.text) == (mark != own)


def test_a_table_may_have_brackets_and_objects_in_its_cells(tmp_path):
    rows = [("[laughs] hello", "good"), ('{"a": 1}', "bad"), ("[{x}] no", "good")]
    for order in (rows, rows[1:], rows[2:]):
        text = "".join(f"{text}\t{label}\n" for text, label in order)
        assert [(e["text"], e["label"]) for e in read(tmp_path / "a.tsv", text)] == order


def test_european_tables_without_a_known_header(tmp_path):
    path = tmp_path / "a.csv"
    rows = "ja, gern;good\nnein;bad\nvielleicht, ja;good\n" * 3
    assert read(path, rows)[0] == {"text": "ja, gern", "label": "good"}
    assert read(path, "sep=;\r\nSatz;Klasse\r\nja;x\r\n", columns="text=Satz label=Klasse") == [
        {"text": "ja", "label": "x"}
    ]
    assert 'columns="text=Satz label=Klasse"' in refused(path, "Satz;Klasse\n" + rows)
    assert "a comma is meant" in refused(tmp_path / "a.tsv", "ja, gern\nnein\n" * 9)


REFUSED = [
    ("a.xlsx", zipped("[Content_Types].xml", "xl/workbook.xml"), ["an Excel workbook", "CSV UTF-8", "soffice"]),
    ("a.csv", zipped("mimetype", "content.xml"), ["an OpenDocument file", "soffice"]),
    ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), ["older Excel", "soffice"]),
    ("a.tsv", zipped("train.tsv"), ["a zip archive", "unzip"]),
    ("a.jsonl", b"%PDF-1.7\n", ["a PDF", "pdftotext"]),
    ("a.txt", TABLE.encode("utf-16-be"), ["iconv -f UTF-16BE"]),
    ("a.arrow", b"ARROW1\0\0" + bytes(99), ["an Arrow file", "parquet"]),
    ("a.tsv", bytes(range(1, 256)) * 9, ["not text"]),
    ("a.json", json.dumps({"data": EXAMPLES}), ["under data", "jq -c"]),
    ("a.json", json.dumps({"data": EXAMPLES}, indent=1), ["under data", "jq -c"]),
    ("a.jsonl", json.dumps({"row": EXAMPLES[0]}) + "\n", ["within 'row', which has text, label", "jq -c '.[\"row\"]'"]),
]  # fmt: skip


def squad(questions):
    paragraph = {"context": "a cat and a cat", "qas": questions}
    return {"version": "2", "data": [{"title": "t", "paragraphs": [paragraph, paragraph]}]}


QUESTION = {
    "id": "1",
    "question": "who?",
    "answers": [{"text": "cat", "answer_start": 12}],
    "is_impossible": False,
}
UNKNOWN = {"id": "2", "question": "why?", "answers": []}
NESTED = [
    (
        squad([QUESTION]),
        "qa",
        {"question": "who?", "context": "a cat and a cat", "answer": ["cat"], "start": [12]},
    ),
    (
        squad([UNKNOWN]),
        "qa",
        {"question": "why?", "context": "a cat and a cat", "answer": [], "start": []},
    ),
    (
        {"id": "0", "pair": {"source": "ja", "target": "yes"}},
        "seq2seq",
        {"source": "ja", "target": "yes"},
    ),
]


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
@pytest.mark.parametrize(("content", "task", "first"), NESTED, ids=range(len(NESTED)))
def test_what_jq_is_told_to_take_out_is_read(tmp_path, content, task, first):
    path = tmp_path / "my data.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read_examples(str(path), task, "")
    typed = "jq -c" + str(error.value).partition("jq -c")[2]
    subprocess.run(typed, shell=True, check=True)
    assert read_examples(f"{path}.jsonl", task, "")[0][0] == first


def test_an_object_beside_the_columns_is_not_taken_for_them(tmp_path):
    record = {"content": "a", "y": "b", "meta": {"source": "web", "year": 1990}}
    assert 'columns="text=content label=y"' in refused(tmp_path / "a.jsonl", json.dumps(record))


@pytest.mark.parametrize(("name", "content", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_read_is_refused_with_what_to_type(tmp_path, name, content, said):
    message = refused(tmp_path / name, content)
    assert all(part in message for part in said), message


@pytest.mark.parametrize("code", ["latin1", "cp1252", "utf-16-le"])
@pytest.mark.parametrize("pack", ["none", "gzip"])
def test_the_command_that_converts_an_encoding_works_as_typed(tmp_path, code, pack):
    if code == "cp1252":
        text = TABLE.replace("fine", "“fine”")
    else:
        text = TABLE
    path = tmp_path / "a file.tsv"
    message = refused(path, PACK[pack](text.encode(code)))
    command = message[message.index("convert it: ") :].removeprefix("convert it: ").splitlines()[0]
    subprocess.run(command, shell=True, check=True)
    (new,) = [file for file in tmp_path.iterdir() if file != path]
    assert read_examples(str(new), "classify", "")[0][1] == EXAMPLES[1]


# ---------------------------------------------------------------- parquet


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


INVALID = pa.Array.from_buffers(
    pa.string(),
    2,
    [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0])), pa.py_buffer(b"a\xff\xfe")],
)
TEXT = pa.array(["a", "b"])
LABEL = pa.array(["x", "y"])
UNUSED = {
    "nanoseconds": pa.array([1, 2], pa.timestamp("ns")),
    "year_10000": pa.array([253402300800000000, 1], pa.timestamp("us")),
    "far_day": pa.array([10**7, 1], pa.date32()),
    "invalid": INVALID,
    "nested": pa.array([[{"t": 1}], []], pa.list_(pa.struct([("t", pa.timestamp("ns"))]))),
}


@pytest.mark.parametrize("name", list(UNUSED))
def test_a_column_that_is_not_used_does_not_matter(tmp_path, name):
    path = parquet(tmp_path / "a.parquet", text=TEXT, label=LABEL, **{name: UNUSED[name]})
    assert read_examples(path, "classify", "")[0] == [
        {"text": "a", "label": "x"},
        {"text": "b", "label": "y"},
    ]


@pytest.mark.parametrize("name", list(UNUSED)[:4])
def test_a_column_that_is_used_and_bad_is_named(tmp_path, name):
    path = parquet(tmp_path / "a.parquet", text=UNUSED[name], label=LABEL)
    with pytest.raises(DataError, match=r"a\.parquet:[12]: its column text"):
        read_examples(path, "classify", "")


KINDS = [
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.binary(1),
]
KINDS += [pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.binary())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_texts_of_every_type_are_read_alike(tmp_path, kind):
    if kind == pa.binary(1):
        text = pa.array([b"a", b"b"], kind)
    else:
        text = TEXT.cast(kind)
    path = parquet(tmp_path / "a.parquet", text=text, label=LABEL)
    assert [e["text"] for e in read_examples(path, "classify", "")[0]] == ["a", "b"]


def test_bytes_that_are_no_text_and_numbers_that_are_told(tmp_path, caplog):
    path = parquet(tmp_path / "a.parquet", text=pa.array([b"a", b"\xff"]), label=LABEL)
    with pytest.raises(DataError, match=r"a\.parquet:2: its column text is not UTF-8"):
        read_examples(path, "classify", "")
    path = parquet(tmp_path / "b.parquet", text=pa.array([1, 2]), label=LABEL)
    read_examples(path, "classify", "")
    assert "its text is a number, which is taken as text (and so in 1 more: 2)" in caplog.text


def test_times_within_messages_are_not_read(tmp_path):
    message = pa.struct(
        [("role", pa.string()), ("content", pa.large_string()), ("at", pa.timestamp("ns"))]
    )
    said = [
        {"role": "user", "content": "a", "at": 1},
        {"role": "assistant", "content": "b", "at": 2},
    ]
    path = parquet(tmp_path / "a.parquet", messages=pa.array([said], pa.list_(message)))
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read_examples(path, "sft", "")[0] == [{"messages": expected}]


# ---------------------------------------------------------------- paths


ODD = ["a,b", "c+d", "[1]", "a file", "x, y+z [2]", "c++"]


@pytest.mark.parametrize("odd", ODD)
def test_a_path_that_exists_is_one_path_anywhere_in_a_spec(tmp_path, monkeypatch, odd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / odd).mkdir()
    files = [
        f"{odd}.tsv",
        "plain.tsv",
        f"{odd}/{odd}.tsv",
        f"{odd}/1.de",
        f"{odd}/1.en",
        f"{odd}.de",
        f"{odd}.en",
    ]
    for file in files:
        (tmp_path / file).write_text("x\ty\n")
    for spec in (f"{odd}.tsv", f"{odd}.tsv,plain.tsv", f"plain.tsv, {odd}.tsv,{odd}/{odd}.tsv"):
        found = paths_of(spec)
        assert set(found) <= set(files)
        assert len(found) == spec.count(".tsv")
        assert paths_of(absolute(spec)) == [str(tmp_path / file) for file in found]
    pair = f"{odd}/1.de+{odd}/1.en"
    for spec in (pair, f"{odd}/1.de+1.en", f"{odd}/*.de+{odd}/*.en"):
        assert [parts_of(path) for path in paths_of(spec)] == [[f"{odd}/1.de", f"{odd}/1.en"]]
    assert paths_of(f"{odd}.de+{odd}.en,{pair}") == [f"{odd}.de+{odd}.en", pair]
    assert len(read_examples(absolute(f"{pair},{odd}.de+{odd}.en"), "seq2seq", "")[0]) == 2
    assert paths_of(f"{odd}/*.tsv") == [f"{odd}/{odd}.tsv"]


@pytest.mark.parametrize("odd", [*ODD, "a=0.5", "a=1,b=2"])
def test_a_directory_that_exists_is_one_path_in_a_mixture(tmp_path, odd):
    (tmp_path / odd).mkdir()
    c = ConfigDict({"data": {"path": "", "mixture": f"{tmp_path}/{odd}=3, plain=1"}})
    assert mixture(c) == [(f"{tmp_path}/{odd}", 0.75), ("plain", 0.25)]
    c.data.mixture = f"plain=1,{tmp_path}/{odd}=3"
    assert mixture(c)[1] == (f"{tmp_path}/{odd}", 0.75)


RECIPES = {
    "dialogue.py": "", "gpt2.py": "124m 350m 1.3b", "llama.py": "8b 1b", "mixtral.py": "8x7b small",
    "multi30k.py": "cpu lstm gpu", "qa.py": "", "quickstart.py": "", "shakespeare_char.py": "cpu lstm masked ngram gpu",
    "sst2.py": "ngrams lstm", "summarize.py": "", "vectors.py": "skipgram glove",
}  # fmt: skip
VARIANTS = [
    f"{name}:{arg}".rstrip(":") for name, args in RECIPES.items() for arg in args.split() or [""]
]


def test_every_recipe_is_tried():
    assert sorted(RECIPES) == sorted(
        file for file in os.listdir(f"{ROOT}/configs") if file.endswith(".py")
    )


@pytest.mark.parametrize("recipe", VARIANTS)
def test_a_recipes_own_paths_work(tmp_path, monkeypatch, recipe):
    """Files named as the docstring has them, where the recipe looks for them; or --output is its path."""
    c = configs.load(f"{ROOT}/configs/{recipe}")
    with open(f"{ROOT}/configs/{recipe.partition(':')[0]}") as file:
        said = file.read().split('"""')[1]
    if not task_of(c).from_examples:
        outputs = re.findall(r"--output (\S+)", said)
        assert not outputs or outputs == [c.data.path]
        return
    monkeypatch.chdir(tmp_path)
    flags = re.findall(r"--config\.data\.(?:train|val)=(\S+)", said)
    for spec in (c.data.train, c.data.val):
        folder = os.path.dirname(spec.split("+")[0])
        os.makedirs(folder, exist_ok=True)
        names = []
        for part in spec.split("+"):
            names.append(os.path.basename(part))
        assert not flags or "+".join(names) in flags
        for name in names:
            with open(os.path.join(folder, name), "w") as file:
                file.write("x\n")
        assert [parts_of(path) for path in paths_of(spec)] == [
            [os.path.join(folder, name) for name in names]
        ]
