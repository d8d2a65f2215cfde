"""Laws of the store: any read is a slice of the concatenated shards, and damage is found and named."""

import json
import pickle
from itertools import pairwise

import numpy as np
import pytest

from jaxlm.data import store
from jaxlm.errors import ConfigError, DataError

SIZES = [5, 1, 40, 7]


@pytest.fixture(params=[257, 70_000])
def prepared(tmp_path, request):
    """A prepared directory with a train split of four shards and an empty val split, and what is in it."""
    vocab_size = request.param
    rng = np.random.default_rng(0)
    stream = rng.integers(0, vocab_size, sum(SIZES)).astype(np.int32)
    starts = np.array(
        [0, 3, 6, 7, 20, 46]
    )  # the second and the last shard begin inside of a document ...
    shards = []
    begin = 0
    for index, size in enumerate(SIZES):
        name = f"train-{index:05d}"
        writer = store.ShardWriter(tmp_path / name, store.token_dtype(vocab_size))
        inner = starts[(starts >= begin) & (starts < begin + size)]
        for low, high in pairwise(sorted({begin, *inner.tolist(), begin + size})):
            writer.add(stream[low:high], high - low, low in inner)
        shards.append({"file": name, "split": "train", **writer.close()})
        begin += size
    manifest = {
        "version": store.VERSION,
        "input": ["some file.txt"],
        "options": {},
        "sources": [],
        "splits": {
            "train": {"tokens": len(stream), "documents": len(starts), "bytes": len(stream)},
            "val": {"tokens": 0, "documents": 0, "bytes": 0},
        },
        "shards": shards,
        "counts": {},
        "tokenizer": {"vocab_size": vocab_size, "sha256": "0", "bos_id": None, "eos_id": 2},
        "dtype": store.token_dtype(vocab_size).str,
    }
    (tmp_path / store.MANIFEST).write_text(json.dumps(manifest))
    return tmp_path, stream, starts


def test_read_and_rows_are_slices_of_the_stream(prepared):
    path, stream, _ = prepared
    data = store.Store(path, "train")
    assert data.num_tokens == len(stream)
    assert data.eos_id == 2
    assert data.bos_id is None
    for length in (0, 1, 4, 20, len(stream)):
        starts = np.arange(len(stream) - length + 1)
        rows = data.rows(starts, length)
        assert rows.dtype == np.int32
        assert rows.shape == (len(starts), length)
        assert all(np.array_equal(row, stream[s : s + length]) for row, s in zip(rows, starts))
        assert np.array_equal(data.read(3, min(length, 50)), stream[3 : 3 + min(length, 50)])
    for start, length in ((-1, 2), (len(stream), 1), (0, len(stream) + 1)):
        with pytest.raises(IndexError):
            data.read(start, length)


def test_document_starts_are_stream_positions(prepared):
    path, stream, starts = prepared
    data = store.Store(path, "train")
    for low in range(len(stream) + 1):
        for high in range(low, len(stream) + 1):
            found = data.document_starts(low, high)
            assert found.dtype == np.int64
            assert found.tolist() == [s for s in starts if low <= s < high]


def test_document_starts_in_many_windows(prepared):
    path, stream, starts = prepared
    windows = np.random.default_rng(0).permutation(np.arange(-3, len(stream) + 3))
    for length in range(len(stream) + 1):
        number, place = store.Store(path, "train").starts_in(windows, length)
        want = []
        for i, low in enumerate(windows):
            for s in starts:
                if low <= s < low + length:
                    want.append((i, s - low))
        assert [*zip(number.tolist(), place.tolist())] == want


def test_an_empty_split_can_be_opened(prepared):
    data = store.Store(prepared[0], "val")
    assert (data.num_tokens, data.num_documents) == (0, 0)
    assert data.rows(np.zeros(0, np.int64), 4).shape == (0, 4)
    assert not len(data.document_starts(0, 10))
    data.verify()


def test_every_missing_or_truncated_shard_is_named_with_the_command(prepared):
    path, _, _ = prepared
    (path / "train-00000.tokens").unlink()
    file = path / "train-00002.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    (path / "train-00003.offsets").write_bytes(b"12345678" * 9)
    with pytest.raises(DataError) as error:
        store.Store(path, "train")
    for text in (
        "train-00000.tokens",
        "train-00002.tokens",
        "train-00003.offsets",
        "jaxlm.data.prepare",
        "some file.txt",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize("kind", ["tokens", "offsets"])
def test_verify_finds_a_flipped_bit(prepared, kind):
    path, _, _ = prepared
    data = store.Store(path, "train")
    data.verify()
    file = path / f"train-00002.{kind}"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"train-00002.{kind}"):
        store.Store(path, "train").verify()


def test_the_fingerprint_follows_the_data_and_the_tokenizer(prepared):
    path, _, _ = prepared
    before = store.Store(path, "train").fingerprint
    assert before == store.Store(path, "train").fingerprint != store.Store(path, "val").fingerprint
    manifest = json.loads((path / store.MANIFEST).read_text())
    manifest["tokenizer"]["sha256"] = "1"
    (path / store.MANIFEST).write_text(json.dumps(manifest))
    assert store.Store(path, "train").fingerprint != before


def test_a_store_is_pickled_without_its_tokens(prepared):
    path, stream, _ = prepared
    data = store.Store(path, "train")
    data.read(0, len(stream))
    packed = pickle.dumps(data)
    assert len(packed) < 500
    assert np.array_equal(pickle.loads(packed).read(0, len(stream)), stream)


@pytest.mark.parametrize("content", [None, "", '{"version": 1', "[]", "{}", '{"version": 99}'])
def test_a_manifest_that_is_missing_or_broken_names_the_command(tmp_path, content):
    if content is not None:
        (tmp_path / store.MANIFEST).write_text(content)
    with pytest.raises(DataError, match=r"jaxlm\.data\.prepare"):
        store.Store(tmp_path, "train")


def test_a_manifest_can_not_name_files_elsewhere(prepared):
    path, _, _ = prepared
    manifest = json.loads((path / store.MANIFEST).read_text())
    for name in ("../train-00000", "/etc/passwd", "a/b"):
        manifest["shards"][0]["file"] = name
        (path / store.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="not a file of that directory"):
            store.Store(path, "train")


def test_an_unknown_split_is_refused(prepared):
    with pytest.raises(ConfigError, match="train, val"):
        store.Store(prepared[0], "test")
