"""Laws of the bag of n-grams: which there are, isolation of documents, ratios by their formula, what is fixed."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh_state, one_step, small_config

from jaxlm.data.batches import train_batches
from jaxlm.models import build
from jaxlm.models.bag import log_count_ratios, ngrams_in
from jaxlm.run.counted import weigh_ngrams

ORDER = 4
MANY = 2**31 - 1


def documents(seed, lengths=(9, 3, 1, 7, 12)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 5, length).astype(np.int32) for length in lengths]


def packed(texts, length):
    """(tokens, segments, positions) of one row of them, padded to the length."""

    def row(arrays):
        return np.pad(np.concatenate(arrays), (0, length - sum(map(len, texts))))[None].astype(
            np.int32
        )

    ones = []
    for n, text in enumerate(texts, 1):
        ones.append(np.full(len(text), n))
    return row(texts), row(ones), row([np.arange(len(text)) for text in texts])


def grams_of(text):
    return [
        tuple(text[i : i + n].tolist())
        for n in range(1, ORDER + 1)
        for i in range(len(text) - n + 1)
    ]


def bag(**more):
    return small_config(
        model__name="bag",
        model__num_layers=0,
        model__order=ORDER,
        model__buckets=97,
        model__pooling="sum",
        task__name="classify",
        data__labels=("no", "yes"),
        **more,
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_bucket_is_an_ngram_of_its_own_document(seed):
    """Of so many buckets that no two n-grams share one."""
    texts = documents(seed)
    tokens, *places = packed(texts, 40)
    buckets, whole = (np.asarray(x[0]) for x in ngrams_in(tokens, *places, ORDER, MANY))
    assert not whole[32:].any()
    named = {}
    for t, n in zip(*np.nonzero(whole)):
        named.setdefault(int(buckets[t, n]), set()).add(tuple(tokens[0, t - n : t + 1].tolist()))
    assert all(len(names) == 1 for names in named.values())
    assert len(set.union(*named.values())) == len(named)
    got = Counter(
        (places[0][0, t], *tokens[0, t - n : t + 1].tolist()) for t, n in zip(*np.nonzero(whole))
    )
    assert got == Counter(
        {(i, *gram) for i, text in enumerate(texts, 1) for gram in grams_of(text)}
    )


def test_a_document_has_length_1_however_long():
    """With vectors of ones, the sum over it is the root of how many different n-grams it has."""
    c = bag()
    texts = documents(2)
    params = jax.tree.map(jnp.ones_like, fresh_state(c).params)
    x = build(c).apply({"params": params}, *packed(texts, 40))[0][0, :, 0]
    starts = np.cumsum([0, *map(len, texts)])
    for text, a, b in zip(texts, starts, starts[1:]):
        buckets, counts = ngrams_in(
            text[None], np.ones((1, len(text)), np.int32), np.arange(len(text))[None], ORDER, 97
        )
        assert len(np.unique(buckets[counts])) == counts.sum()
        np.testing.assert_allclose(x[a:b].sum(), np.sqrt(counts.sum()), rtol=1e-5)


def test_ngrams_spread_over_the_buckets():
    """Of the pairs of 60 tokens in as many buckets, as chance would have it: 1 - 1/e of them are met."""
    tokens = np.stack(np.meshgrid(np.arange(60), np.arange(60)), axis=-1).reshape(-1, 2)
    places = np.broadcast_to(np.arange(2), tokens.shape)
    buckets, _ = ngrams_in(tokens, np.ones_like(tokens), places, 2, 3600)
    assert abs(len(np.unique(buckets[:, 1, 1])) / 3600 - (1 - np.exp(-1))) < 0.03


def test_packed_documents_are_as_if_alone():
    c = bag()
    texts = documents(3)
    model = build(c)
    params = fresh_state(c).params
    apply = jax.jit(lambda *row: model.apply({"params": params}, *row)[0])
    x = apply(*packed(texts, 40))[0]
    start = 0
    for text in texts:
        np.testing.assert_allclose(x[start : start + len(text)], apply(text[None])[0], atol=1e-6)
        start += len(text)
    assert not x[start:].any()


def test_a_position_sees_the_ngrams_that_end_there():
    c = bag()
    text = documents(4, (12,))[0]
    model = build(c)
    params = fresh_state(c).params

    def at(table):
        return model.apply({"params": params | {"embed": {"tokens": table}}}, text[None])[0][
            0, 7
        ].sum()

    buckets, counts = ngrams_in(
        text[None], np.ones((1, 12), np.int32), np.arange(12)[None], ORDER, 97
    )
    seen = np.flatnonzero(np.abs(jax.grad(at)(params["embed"]["tokens"])).sum(axis=1))
    assert set(seen) == set(np.asarray(buckets[0, 7][counts[0, 7]]).tolist())


def test_dropout_takes_whole_ngrams():
    c = bag(model__embed_dropout=0.5)
    model = build(c)
    params = fresh_state(c).params
    text = documents(5, (1,))[0]
    params = jax.tree.map(jnp.ones_like, params)
    rows = np.repeat(text[None], 64, axis=0)
    x, _ = model.apply({"params": params}, rows, train=True, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(x)) == {0.0, 2.0}
    assert (x == x[..., :1]).all()
    assert 0.3 < (x == 0).mean() < 0.7


@pytest.mark.parametrize("classes", [2, 3])
def test_ratios_are_those_of_the_formula(classes):
    texts = documents(6)
    labels = np.array([0, 1, 1, 0, classes - 1])
    ratios = log_count_ratios(texts, labels, classes, ORDER, 1000)
    tokens, *places = packed(texts, 32)
    buckets, whole = (np.asarray(x[0]) for x in ngrams_in(tokens, *places, ORDER, 1000))
    bucket_of = {}
    for t, n in zip(*np.nonzero(whole)):
        bucket_of[tuple(tokens[0, t - n : t + 1].tolist())] = buckets[t, n]
    counts = np.ones((classes, 1000))
    for text, label in zip(texts, labels):
        for bucket in {bucket_of[gram] for gram in grams_of(text)}:
            counts[label, bucket] += 1
    others = counts.sum(axis=0) - counts
    p, q = (n / n.sum(axis=1, keepdims=True) for n in (counts, others))
    np.testing.assert_allclose(ratios, np.abs(np.log(p / q)).max(axis=0), rtol=1e-5)


def test_ratios_are_counted_once_and_not_trained(tmp_path):
    file = tmp_path / "train.tsv"
    rng = np.random.default_rng(0)

    def words(*kinds):
        return " ".join(rng.permutation([*kinds, *rng.choice(["the", "a", "film", "plot"], 5)]))

    file.write_text("".join(f"{words('good')}\tyes\n{words('bad')}\tno\n" for _ in range(50)))
    more = {
        "data__tokenizer": "words",
        "data__train": str(file),
        "train__ema": 0.9,
        "data__examples_per_row": 4,
    }
    c = bag(model__ngram_weights="log_count_ratio", model__num_labels=2, **more)
    state = fresh_state(c)
    assert (state.params["embed"]["ratio"] == 1).all()
    weighed = weigh_ngrams(jax.tree.map(jnp.copy, state.params), c)
    ratio = np.asarray(weighed["embed"]["ratio"])
    assert ratio.max() > 1.5
    assert np.median(ratio) < 0.7
    state = state.replace(params=weighed)
    losses = []
    batches = train_batches(c)
    for k in range(10):
        state, metrics = one_step(c, state, batches[k])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    for params in (state.params, state.ema):
        np.testing.assert_array_equal(params["embed"]["ratio"], ratio)
    assert (state.params["embed"]["tokens"] != weighed["embed"]["tokens"]).any()
