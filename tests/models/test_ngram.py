"""Laws of the n-gram model: Kneser-Ney by its formulas, probabilities, isolation of documents, cached = uncached."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from jaxlm.config.keys import COUNTED
from jaxlm.errors import DataError
from jaxlm.models import FITS
from jaxlm.models.ngram import (
    NGram,
    discounts,
    find_contexts,
    fit,
    log_probs,
    sizes,
    target_log_probs,
)

V = 9


def random_documents(seed, bos=None, eos=None, documents=6, length=70):
    """Of an order-1 chain, so that some n-grams are frequent and others rare."""
    rng = np.random.default_rng(seed)
    chain = rng.dirichlet(np.full(V - 2, 0.3), V - 2)
    made = []
    for size in [2, *rng.integers(3, length, documents - 1)]:
        text = [rng.integers(V - 2)]
        while len(text) < size:
            text.append(rng.choice(V - 2, p=chain[text[-1]]))
        made.append(np.array([x for x in (bos, *text, eos) if x is not None], np.int32))
    return made


TEXTS = {
    "no bos": (random_documents(0), None),
    "bos and eos": (random_documents(1, bos=7, eos=8), 7),
    "bos is eos": (random_documents(2, bos=8, eos=8), 8),
    "large": (random_documents(3, bos=7, documents=40), 7),
    "repetitive": ([np.array([7] + [0, 1, 2] * 5, np.int32)] * 3, 7),
    "tiny": ([np.arange(5, dtype=np.int32)], None),
}


def reference_counts(documents, order, bos):
    """{n-gram: a}, for every k <= order."""
    occurs = {}
    before = {}
    for document in (tuple(d.tolist()) for d in documents):
        for k in range(1, order + 1):
            for i in range(len(document) - k + 1):
                gram = document[i : i + k]
                if k > 1 or i > 0 or bos is None:
                    occurs[gram] = occurs.get(gram, 0) + 1
                before.setdefault(gram, set()).update(document[i - 1 : i])

    def begins(g):
        return len(g) > 1 and g[0] == bos

    return {g: occurs.get(g, 0) if len(g) == order or begins(g) else len(before[g]) for g in before}


def reference(documents, order, bos, discount):
    """p(context, token), by dictionaries."""
    a = reference_counts(documents, order, bos)
    D = {}
    for k in range(1, order + 1):
        n1, n2, n3, n4 = (sum(len(g) == k and x == j for g, x in a.items()) for j in (1, 2, 3, 4))
        Y = n1 / (n1 + 2 * n2) if n1 else 0
        D[k] = [Y if 0 < Y < 1 else 0.75] * 3
        if n1 and n2 and n3:
            three = [1 - 2 * Y * n2 / n1, 2 - 3 * Y * n3 / n2, 3 - 4 * Y * n4 / n3]
            if all(0 < d < j for j, d in enumerate(three, 1)):
                D[k] = three
            else:
                D[k] = D[k]
        D[k] = [0, *([discount] * 3 if discount else D[k])]

    def p(context, token):
        counts = [a.get((*context, v), 0) for v in range(V)]
        if context:
            shorter = p(context[1:], token)
        else:
            shorter = 1 / V
        if not sum(counts):
            return shorter
        of = D[len(context) + 1]
        backoff = sum(of[min(x, 3)] for x in counts) / sum(counts)
        return (counts[token] - of[min(counts[token], 3)]) / sum(counts) + backoff * shorter

    return p


def everywhere(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@jax.jit
def log_probs_at(params, tokens):
    return log_probs(params, find_contexts(params, tokens, everywhere(tokens)))


@partial(jax.jit, static_argnums=0)
def apply(module, params, *inputs, **options):
    x_BTC, cache = module.apply({"params": params}, *inputs, **options)
    return log_probs(params, x_BTC), cache


@pytest.fixture(scope="module")
def rows():
    """Rows of text as it was seen and, half of the way, of any tokens."""
    seen = np.concatenate(random_documents(1, bos=7, eos=8))[:120].reshape(4, 30)
    return jnp.array(
        np.where(np.arange(30) < 15, seen, np.random.default_rng(5).integers(V, size=(4, 30)))
    )


@pytest.fixture(scope="module", params=[1, 2, 4])
def model(request):
    """(module, its parameters), of some orders."""
    documents, bos = TEXTS["bos and eos"]
    params = fit(documents, request.param, V, bos)
    return NGram(FrozenConfigDict({"ngrams": sizes(params)})), params


@pytest.mark.parametrize("discount", [0.0, 0.4])
@pytest.mark.parametrize("order", range(1, 6))
@pytest.mark.parametrize("name", TEXTS)
def test_probabilities_are_those_of_the_formulas(name, order, discount, rows):
    documents, bos = TEXTS[name]
    params = fit(documents, order, V, bos, discount)
    p = reference(documents, order, bos, discount)
    tokens = np.stack(
        [np.resize(documents[-1], 20), *rows[:2, 5:25]]
    )  # as it was seen, and of any tokens
    for row, line in zip(np.exp(log_probs_at(params, tokens)), tokens.tolist()):
        for t in range(len(line)):
            if order > 1:
                context = tuple(line[max(0, t + 2 - order) : t + 1])
            else:
                context = ()
            np.testing.assert_allclose(row[t], [p(context, v) for v in range(V)], atol=1e-5)


def test_both_estimates_of_discounts_and_the_fallback_are_used():
    counts = np.repeat([0, 1, 2, 3, 4, 7], [9, 40, 10, 5, 2, 1])
    Y = 40 / 60
    np.testing.assert_allclose(
        discounts(counts), [0, 1 - 2 * Y / 4, 2 - 3 * Y / 2, 3 - 4 * Y * 2 / 5]
    )
    np.testing.assert_allclose(
        discounts(np.repeat([1, 2, 3], [10, 3, 9])), [0, *[10 / 16] * 3]
    )  # D(2) < 0
    for none in ([0, 0], [1, 1], [2, 3], [5, 9]):
        np.testing.assert_allclose(discounts(np.array(none)), [0, 0.75, 0.75, 0.75])
    a = reference_counts(*TEXTS["large"][:1], 4, 7)
    estimates = []
    for k in (1, 2, 3, 4):
        estimates.append(discounts(np.array([x for g, x in a.items() if len(g) == k])))
    assert any(len(set(e)) == 4 for e in estimates)
    assert any(len(set(e)) == 2 for e in estimates)


def test_probabilities_are_positive_and_sum_to_1(model, rows):
    probs = np.exp(log_probs_at(model[1], rows))
    assert probs.min() > 0
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)


def test_targets_are_gathered_log_probs(model, rows):
    targets = jnp.roll(rows, -1, axis=1)
    want = jnp.take_along_axis(log_probs_at(model[1], rows), targets[..., None], -1)[..., 0]
    got = jax.jit(target_log_probs)(model[1], rows, everywhere(rows), targets)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_packed_documents_are_as_if_alone(model, rows):
    lengths = (9, 1, 13, 7)
    T = rows.shape[1]
    segments = np.broadcast_to(np.repeat([1, 2, 3, 4], lengths), rows.shape)
    positions = np.broadcast_to(np.concatenate([np.arange(n) for n in lengths]), rows.shape)
    alone = []
    for end, n in zip(
        np.cumsum(lengths), lengths
    ):  # at the front of a row, as what follows is not seen
        alone.append(apply(*model, jnp.roll(rows, n - end, axis=1))[0][:, :n])
    alone = np.concatenate(alone, axis=1)
    for inputs in ((segments, positions), (segments, None), (None, positions)):
        np.testing.assert_array_equal(apply(*model, rows, *inputs)[0], alone)
    order = np.random.default_rng(6).permutation(T)  # as zig-zag does
    got, _ = apply(*model, rows[:, order], segments[:, order], positions[:, order], places_T=order)
    np.testing.assert_array_equal(got, alone[:, order])


def test_cached_is_uncached(model, rows):
    """A prompt at the right end of its row, one piece more, then token by token."""
    full = apply(*model, rows)[0]
    lengths = np.array([6, 1, 4, 3])
    P = 6
    offset = np.arange(P) - (P - lengths)[:, None]
    prompts = np.where(offset >= 0, np.take_along_axis(rows, np.maximum(offset, 0), axis=1), 3)
    for given in (True, False):  # positions too
        cache = model[0].init_cache(4, 64)
        segments = (offset >= 0).astype(int)
        positions = np.maximum(offset, 0)
        got, cache = apply(*model, prompts, segments, positions if given else None, cache=cache)
        for row, n in enumerate(lengths):
            np.testing.assert_array_equal(got[row, P - n :], full[row, :n])
        done = lengths
        for size in (3, 1, 1, 1, 1):
            places = done[:, None] + np.arange(size)
            if given:
                options = (np.ones_like(places), places)
            else:
                options = ()
            got, cache = apply(
                *model, np.take_along_axis(rows, places, axis=1), *options, cache=cache
            )
            np.testing.assert_array_equal(got, np.take_along_axis(full, places[..., None], axis=1))
            done = done + size


def test_it_prefers_what_it_has_seen():
    params = fit([np.array([0, 1, 2, 3, 1, 4] * 3)], 3, V)
    best = jnp.argmax(log_probs_at(params, jnp.array([[0, 1, 2, 3, 1, 4, 0, 1]])), axis=-1)
    np.testing.assert_array_equal(best[0, 1:], [2, 3, 1, 4, 0, 1, 2])


def test_counts_do_not_cross_documents():
    documents, _ = TEXTS["no bos"]
    for order in (2, 4):
        one = fit(documents, order, V)
        two = fit(documents[::-1], order, V)
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 2, V), "no document has 2 tokens"),
        (([np.arange(3)], 4, V), "choose a lower order"),
        (([np.arange(V + 1)], 2, V), "vocabulary of 9"),
        (([np.array([7, 1]), np.array([1, 7])], 2, V, 7), r"begin with bos \(7\)"),
    ],
)
def test_documents_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        fit(*arguments)


def test_options_that_mean_nothing_are_refused():
    for order, discount in ((0, 0.5), (2, 1.0), (2, -0.1)):
        with pytest.raises(ValueError, match="discount below 1"):
            fit([np.arange(3)], order, V, discount=discount)


def test_every_counted_model_says_how_it_is_counted():
    assert set(FITS) == set(COUNTED)
