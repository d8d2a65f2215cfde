"""The order of data: a pure function of (seed, data, step), on any number of hosts; every token counts once."""

import grain
import jax
import numpy as np
import pytest
from conftest import small_config

from jaxlm.data import batches as pipeline
from jaxlm.data.batches import (
    Prefetch,
    fingerprint,
    num_rows,
    open_stores,
    order_of,
    read_rows,
    train_batches,
    validation_batches,
)
from jaxlm.data.prepare import prepare
from jaxlm.data.store import Store
from jaxlm.errors import DataError


@pytest.fixture(scope="module")
def config(text_dir):
    return small_config(data__path=str(text_dir), train__batch_size=8, data__seq_len=32)


def rows_of(batch):
    return [tuple(row) for row in batch["targets"]]


def test_batch_k_is_the_same_for_1_2_and_4_hosts_and_again(config):
    for k in (0, 7, 1000):
        whole = train_batches(config)[k]
        for hosts in (1, 2, 4):
            for host in range(hosts):
                rows = np.arange(host, 8, hosts)
                part = train_batches(config, rows)[k]
                for key, value in whole.items():
                    np.testing.assert_array_equal(value[rows], part[key])


def test_a_batch_is_the_same_whatever_is_read_with_it(config, monkeypatch):
    together = train_batches(config)
    monkeypatch.setattr(pipeline, "BLOCK", 1)
    alone = train_batches(config)
    for k in (5, 63, 64, 65, 1000, 5):
        jax.tree.map(np.testing.assert_array_equal, together[k], alone[k])


def test_an_epoch_has_every_row_once_and_the_next_another_order(config):
    store = Store(config.data.path, "train")
    n = num_rows(store, 32)
    batches = train_batches(config)
    rows = []
    for k in range(2 * n // 8 + 1):
        for row in rows_of(batches[k]):
            rows.append(row)
    every = sorted(rows_of(read_rows(store, np.arange(n), 32)))
    assert sorted(rows[:n]) == every
    assert sorted(rows[n : 2 * n]) == every
    assert rows[:n] != rows[n : 2 * n]
    assert rows[:n] != every


def test_the_order_is_that_of_grain():
    for rows, seed in ((1, 0), (2, 5), (97, 1), (1000, 2**31)):
        order = order_of(rows, seed)
        same = grain.MapDataset.range(rows).seed(seed).shuffle()
        places = [*range(3 * rows + 1), 10**9, 2**32 * rows + 5]
        assert [order(place) for place in places] == [same[place] for place in places]


def test_without_shuffle_rows_come_in_order(config):
    c = config.copy_and_resolve_references()
    c.data.shuffle = False
    stream = Store(c.data.path, "train").read(0, 8 * 32)
    np.testing.assert_array_equal(train_batches(c)[0]["targets"].reshape(-1), stream)


def test_seeds_give_other_orders(config):
    other = config.copy_and_resolve_references()
    other.seed = 1
    assert rows_of(train_batches(config)[0]) != rows_of(train_batches(other)[0])


def test_every_validation_token_is_a_target_once(config):
    store = Store(config.data.path, "val")
    batches = validation_batches(config)
    real = []
    for k in range(len(batches)):
        real.append(batches[k]["targets"][batches[k]["weights"] > 0])
    np.testing.assert_array_equal(np.concatenate(real), store.read(0, store.num_tokens))
    parts = []
    for rows in (slice(0, 3), slice(3, 8)):
        parts.append(validation_batches(config, rows))
    assert sum(p[k]["weights"].sum() for p in parts for k in range(len(p))) == store.num_tokens


def test_a_row_is_made_of_documents(config):
    """Inputs are the targets shifted right, with bos before each document; positions restart; segments count up."""
    store = Store(config.data.path, "train")
    batch = read_rows(store, np.arange(1, 41), 32)
    starts = set(store.document_starts(0, store.num_tokens).tolist())
    for row in range(40):
        segment = 1
        position = 0
        for t in range(32):
            place = (row + 1) * 32 + t
            if place in starts:
                segment = segment + (t > 0)
                position = 0
                assert batch["tokens"][row, t] == store.bos_id
            else:
                assert batch["tokens"][row, t] == store.read(place - 1, 1)[0]
            assert (batch["segments"][row, t], batch["positions"][row, t]) == (segment, position)
            position += 1
    assert len(np.unique(batch["segments"])) > 1, "the data has documents shorter than a row"


def test_rows_past_the_end_are_padding(config):
    store = Store(config.data.path, "val")
    batch = read_rows(store, np.array([num_rows(store, 32), 10**6]), 32)
    assert not batch["weights"].any()
    assert not batch["segments"].any()
    assert not batch["targets"].any()


def test_a_tokenizer_without_bos_does_not_predict_the_first_token(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}bcdefghij" * 3)
    prepare([str(tmp_path)], tmp_path / "out", tokenizer="chars", val_fraction=0.0, workers=1)
    batch = read_rows(Store(tmp_path / "out", "train"), np.arange(2), 32)
    weights = batch["weights"].reshape(-1)[:60]
    assert list(np.flatnonzero(weights == 0)) == [0, 30]
    assert weights.sum() == 58


def test_a_mixture_follows_its_weights_and_keeps_each_source_whole(tmp_path):
    for name, repeats in (("a", 40), ("b", 80)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i} " for i in range(repeats * 20)))
        prepare(
            [str(tmp_path / f"{name}.txt")],
            tmp_path / name,
            tokenizer="bytes",
            val_fraction=0.1,
            workers=1,
        )
    c = small_config(data__mixture=f"{tmp_path}/a=0.75,{tmp_path}/b=0.25", train__batch_size=8)
    batches = train_batches(c)
    counts = [0, 0]
    seen = []
    for k in range(100):
        for row in batches[k]["targets"]:
            source = int(ord("b") in row)
            counts[source] += 1
            if source == 0:
                seen.append(tuple(row))
    assert counts[0] / sum(counts) == pytest.approx(0.75, abs=0.01)
    n = num_rows(Store(tmp_path / "a", "train"), 32)
    assert len(set(seen[:n])) == n
    total = sum(store.num_tokens for store in open_stores(c, "val"))
    assert (
        sum(
            b["weights"].sum()
            for b in (validation_batches(c)[k] for k in range(len(validation_batches(c))))
        )
        == total
    )


def test_the_fingerprint_changes_with_what_the_order_depends_on(config):
    for key, value in (
        ("seed", 3),
        ("data.seq_len", 16),
        ("train.batch_size", 4),
        ("data.shuffle", False),
    ):
        other = small_config(
            **{
                "data__path": config.data.path,
                "train__batch_size": 8,
                key.replace(".", "__"): value,
            }
        )
        assert fingerprint(other) != fingerprint(config), key


def test_prefetch_keeps_order_and_passes_errors_on():
    assert list(Prefetch([10, 11, 12, 13], 1, 4, 2, lambda x: x + 1)) == [12, 13, 14]
    with pytest.raises(ZeroDivisionError):
        list(Prefetch([1, 0], 0, 2, 2, lambda x: 1 / x))


def test_missing_data_is_named_with_the_command():
    with pytest.raises(DataError, match=r"jaxlm\.data\.prepare"):
        train_batches(small_config(data__path="/nowhere/data"))
    with pytest.raises(DataError, match=r"data\.path is empty"):
        train_batches(small_config())


def test_padding_comes_from_a_source_that_has_rows(tmp_path, text_dir):
    (tmp_path / "a.txt").write_text("no validation here " * 50)
    prepare(
        [str(tmp_path / "a.txt")], tmp_path / "a", tokenizer="bytes", val_fraction=0.0, workers=1
    )
    c = small_config(data__mixture=f"{tmp_path}/a=1,{text_dir}=1", train__batch_size=7)
    batches = validation_batches(c)
    total = sum(batches[k]["weights"].sum() for k in range(len(batches)))
    assert total == Store(text_dir, "val").num_tokens
