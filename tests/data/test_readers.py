"""Laws of the readers: every format gives the same documents; what is wrong with a file is refused or counted."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxlm.data import prepare, readers, store
from jaxlm.data import shard_jobs as parts
from jaxlm.data.tokenization import tokenizer
from jaxlm.errors import DataError

DOCS = ["first\n", "  second\tdoc\r\n", "\0 third é \U0001f600", "fourth\n\n\nlines\n" * 30, "5"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def jsonl(path: Path, docs=DOCS) -> Path:
    path.write_text("".join(json.dumps({"text": doc}) + "\n" for doc in docs))
    return path


def test_every_format_gives_the_same_tokens(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for i, doc in enumerate(DOCS):
        (folder / f"{i}.txt").write_bytes(doc.encode())
        with gzip.open(folder / f"{i}.gz.tmp", "wb") as file:
            file.write(doc.encode())
        os.rename(folder / f"{i}.gz.tmp", tmp_path / f"{i}.txt.gz")
    plain = jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(plain.read_bytes()[:50]) + gzip.compress(plain.read_bytes()[50:])
    )
    with pa.output_stream(tmp_path / "c.jsonl.zst", compression="zstd") as file:
        file.write(plain.read_bytes())
    for name, kind in (
        ("d", pa.string()),
        ("e", pa.large_string()),
        ("f", pa.dictionary(pa.int32(), pa.string())),
    ):
        table = pa.table({"id": list(range(len(DOCS))), "text": pa.array(DOCS).cast(kind)})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    inputs = [
        folder,
        tmp_path / "?.txt.gz",
        *(tmp_path / f"{n}" for n in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")),
    ]
    inputs += [tmp_path / f"{name}.parquet" for name in "def"]
    outputs = []
    for i, path in enumerate(inputs):
        prepare.prepare(
            [str(path)], tmp_path / f"out{i}", "sentencepiece", vocab_size=300, val_fraction=0
        )
        outputs.append(
            {k: v for k, v in contents(tmp_path / f"out{i}").items() if k != store.MANIFEST}
        )
    assert len(outputs[0]) == 3
    assert all(output == outputs[0] for output in outputs)


def test_long_documents_are_the_same_from_every_format_and_need_no_newline(tmp_path):
    docs = [
        "word " * 500_000,
        "\u4e2d" * 800_000,
        "line\n" * 500_000,
        "\ud7ff\U0001f600" * 200_000 + "x",
    ]
    for i, doc in enumerate(docs):
        (tmp_path / f"{i}.txt").write_text(doc)
    jsonl(tmp_path / "all.jsonl", docs)
    texts = []
    for name in ("?.txt", "all.jsonl"):
        pieces = list(
            readers.read(
                [s for p in parts.plan(readers.find([str(tmp_path / name)])) for s in p],
                "text",
                readers.Notes(),
            )
        )
        assert all(0 < len(piece.text.encode()) <= readers.PIECE_BYTES for piece in pieces)
        assert (
            sum(piece.first for piece in pieces) == sum(piece.last for piece in pieces) == len(docs)
        )
        assert "".join(piece.text for piece in pieces) == "".join(docs)
        texts.append(pieces)
    assert texts[0] == texts[1]


def prepared_text(path: Path, **kwargs) -> tuple[str, dict]:
    """The text of the train split, and the counts that are not 0."""
    out = path.parent / "out"
    manifest = prepare.prepare([str(path)], out, "bytes", val_fraction=0, overwrite=True, **kwargs)
    data = store.Store(out, "train")
    assert data.num_bytes == data.num_tokens - data.num_documents
    text = tokenizer.load(out).decode(data.read(0, data.num_tokens))
    return text, {key: count for key, count in manifest["counts"].items() if count}


def test_odd_text_is_replaced_or_kept_by_rule_and_counted(tmp_path):
    path = tmp_path / "a.txt"
    for data, text, counts in (
        (b"\xef\xbb\xbfa\r\nb\0", "a\r\nb\0", {"byte_order_marks": 1}),
        (b"a\xff\xfeb\xef\xbf\xbd", "a\ufffd\ufffdb\ufffd", {"replaced_bytes": 2}),
        ("é".encode()[:1], "\ufffd", {"replaced_bytes": 1}),
    ):
        path.write_bytes(data)
        assert prepared_text(path) == (text, counts)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "\\ud800a"}\r\n\n{"text": ""}\n{"text": "\\ud83d\\ude00\xff"}'
    )
    want = {
        "byte_order_marks": 1,
        "replaced_surrogates": 1,
        "empty_documents": 1,
        "replaced_bytes": 1,
    }
    assert prepared_text(path) == ("\ufffda\U0001f600\ufffd", want)


BAD = {
    "{": "broken JSON",
    '{"text": "a"': "broken JSON",
    "[" * 100_000: "recursion",
    '"text"': "not an object",
    "3": "not an object",
    '{"txt": "a"}': "'txt'",
    '{"text": null}': "null",
    '{"text": 3}': "int",
    '{"text": ["a"]}': "list",
    '{"text": {"text": "a"}}': "dict",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_record_is_refused_with_its_line_or_skipped_and_counted(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + '\n{"text": "b"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{BAD[line]}(.|\n)*--on_bad_record=skip"):
        prepared_text(path)
    assert not (tmp_path / "out").exists()
    assert prepared_text(path, on_bad_record="skip") == ("ab", {"bad_records": 1})


def test_line_numbers_count_from_the_start_of_the_file_in_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 5000)
    lines = [json.dumps({"text": "x" * 100})] * 500
    lines[123] = lines[400] = "{"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"2 of 500 records(.|\n)*a\.jsonl:124: .*more: 401\)"):
        prepare.prepare([str(path)], tmp_path / "out", "bytes", workers=1)


def test_too_many_bad_records_are_refused_even_if_they_may_be_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 1500 + "{\n" * 15)
    assert prepared_text(path, on_bad_record="skip")[1] == {"bad_records": 15}
    path.write_text('{"text": "a"}\n' * 1500 + "{\n" * 16)
    with pytest.raises(DataError, match=r"16 of 1,516 records are bad(.|\n)*and so in 15 more"):
        prepared_text(path, on_bad_record="skip")


def test_equal_bad_records_are_one_line_and_skip_is_advised_where_it_helps(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 5 + '{"txt": "a"}\n' * 10 + '{"text": 3}\n')
    with pytest.raises(DataError) as error:
        prepared_text(path)
    lines = str(error.value).splitlines()
    assert lines[0] == "11 of 16 records are bad:"
    assert "a.jsonl:6: no key 'text'; there are 'txt' (and so in 9 more: 7, 8, ...)" in lines[1]
    assert "a.jsonl:16: 'text' is int" in lines[2]
    assert lines[3:] == ["repair the input"], "skip allows 10"
    for count, advised in ((3, True), (0, False)):
        path.write_text('{"text": "a"}\n' * count + '{"txt": "a"}\n' * 8)
        with pytest.raises(DataError) as error:
            prepared_text(path)
        assert ("--on_bad_record=skip" in str(error.value)) == advised


def test_parquet_without_the_column_or_with_other_values_is_bad_records(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["a", None, "b"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet:2: 'text' is null"):
        prepared_text(path)
    assert prepared_text(path, on_bad_record="skip") == ("ab", {"bad_records": 1})
    pyarrow.parquet.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match=r"2 of 2 records(.|\n)*'text' is int64"):
        prepared_text(path)
    pyarrow.parquet.write_table(pa.table({"content": ["a"]}), path)
    with pytest.raises(DataError, match="no column 'text'; there are content"):
        prepared_text(path)
    assert prepared_text(path, text_key="content") == ("a", {})


def test_a_file_that_breaks_off_is_refused_or_kept_as_far_as_it_goes(tmp_path):
    rng = np.random.default_rng(0)
    docs = [rng.bytes(60).hex() for _ in range(20_000)]
    plain = jsonl(tmp_path / "plain.jsonl", docs).read_bytes()
    with pa.output_stream(tmp_path / "a.jsonl.zst", compression="zstd") as file:
        file.write(plain)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    pyarrow.parquet.write_table(
        pa.table({"text": docs}), tmp_path / "a.parquet", row_group_size=1000
    )
    for name in ("a.jsonl.zst", "a.jsonl.gz", "a.parquet"):
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 3 // 4])
        with pytest.raises(DataError, match=rf"{name}: .*\(after [\d,]+ records\)"):
            prepared_text(path)
        if name != "a.parquet":  # whose index is at its end
            text, counts = prepared_text(path, on_bad_record="skip")
            assert counts == {"broken_files": 1}
            assert "".join(docs).startswith(text)
            assert len(text) > 12_000 * 120
    damaged = bytearray(whole)  # a page in the middle of the parquet file
    damaged[len(whole) // 2 : len(whole) // 2 + 200_000] = bytes(200_000)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.parquet: .*\(after [\d,]+ records\)"):
        prepared_text(path)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.parquet"]
)
def test_an_empty_file_is_no_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"{name}: |no text in the input"):
        prepared_text(tmp_path / name)
    jsonl(tmp_path / "b.jsonl", ["", ""])
    with pytest.raises(DataError, match="2 empty documents"):
        prepared_text(tmp_path / "b.jsonl")


def test_inputs_count_once_paths_may_be_odd_and_all_that_match_nothing_are_named(tmp_path):
    folder = tmp_path / "with space, é [x]"
    folder.mkdir()
    (folder / "a b.txt").write_text("hello")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "link.txt").symlink_to(folder / "a b.txt")
    inputs = [folder, folder / "a b.txt", tmp_path / "*.txt", str(tmp_path) + "/*/*.txt"]
    assert [Path(source.path).name for source in readers.find(map(str, inputs))] == ["a b.txt"]
    manifest = prepare.prepare(map(str, inputs), tmp_path / "out é", "chars")
    assert manifest["splits"]["train"]["bytes"] == 4
    with pytest.raises(DataError, match=r"nope\.txt(.|\n)*none\*"):
        readers.find([str(folder), "nope.txt", str(tmp_path / "none*")])


def test_the_standard_library_is_an_input():
    sources = readers.find(["stdlib"])
    names = [source.name for source in sources]
    assert len(names) > 300
    assert "stdlib/argparse.py" in names
    assert names == sorted(names)
    assert not any("/test/" in name or "site-packages" in name for name in names)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.bz2", "a.jsonl.xz", "a.jsonl"])
def test_what_is_compressed_is_read_by_its_first_bytes(tmp_path, name):
    path = tmp_path / name
    if "jsonl" in name:
        plain = jsonl(path).read_bytes()
    else:
        plain = b"text\n" * 1000
    if "jsonl" in name:
        want = "".join(DOCS)
    else:
        want = plain.decode()
    for compress in (bytes, gzip.compress, zstd, bz2.compress, lzma.compress):
        path.write_bytes(compress(plain))
        pieces = readers.read(parts.plan(readers.find([str(path)]))[0], "text", readers.Notes())
        assert "".join(piece.text for piece in pieces) == want


@pytest.mark.parametrize("compress", [gzip.compress, zstd, bz2.compress, lzma.compress])
def test_a_compressed_file_that_breaks_off_is_noted(tmp_path, compress):
    path = tmp_path / "a.txt"
    path.write_bytes(compress(np.random.default_rng(0).bytes(50_000).hex().encode())[:-9000])
    notes = readers.Notes()
    list(readers.read(parts.plan(readers.find([str(path)]))[0], "text", notes))
    assert len(notes.broken) == 1


def test_archives_are_refused_all_at_once_with_what_to_type(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.txt", "w") as archive:
        archive.writestr("b.txt", "text")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(tmp_path / "a.txt", "b.txt")
    (tmp_path / "b.txt").write_bytes(packed.getvalue())
    (tmp_path / "c d.txt").write_bytes(gzip.compress(packed.getvalue()))
    (tmp_path / "e.txt").write_bytes(b"7z\xbc\xaf\x27\x1c and more")
    (tmp_path / "f.txt").write_text("text")
    with pytest.raises(DataError) as error:
        prepare.prepare([str(tmp_path)], tmp_path / "out", "bytes")
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 4
    for line, words in zip(lines, ("unzip ", "tar -xf ", "tar -xf '", "7z x ")):
        assert words in line


@pytest.mark.parametrize(
    "name", ["a.json", "a.json.gz", "a.ndjson", "a.ndjson.zst", "a.00000-of-00008.json.gz"]
)
def test_json_with_a_record_a_line_is_a_document_a_record(tmp_path, name):
    path = jsonl(tmp_path / name)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    pieces = readers.read(parts.plan(readers.find([str(path)]))[0], "text", readers.Notes())
    assert [piece.text for piece in pieces] == DOCS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_text_with_a_byte_order_mark_is_read(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(parts, "PART_BYTES", 100)  # which must not cut it
    monkeypatch.setattr(readers, "BLOCK_BYTES", 7)
    text = "Line \u4e2d \U0001f600\n" * 50
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.txt").write_bytes(gzip.compress(text.encode(encoding)))
    for name in "ab":
        assert prepared_text(tmp_path / f"{name}.txt") == (text, {"byte_order_marks": 1})
    path = jsonl(tmp_path / "c.json")
    path.write_bytes(path.read_text().encode(encoding))
    assert prepared_text(path) == ("".join(DOCS), {"byte_order_marks": 1})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"c\.json: .*truncated data"):
        prepared_text(path)


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE"])
def test_text_without_a_byte_order_mark_is_refused_with_the_command_that_converts_it(
    tmp_path, encoding
):
    path = tmp_path / "a.txt"
    path.write_bytes("Line one\n".encode(encoding))
    with pytest.raises(DataError, match=f"a.txt: .*NUL.*cat .* iconv -f {encoding} -t UTF-8 > "):
        readers.find([str(path)])
    (tmp_path / "b.txt").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=f"b.txt: .*gzip -dc .* iconv -f {encoding}"):
        readers.find([str(tmp_path / "b.txt")])
