"""A bag of n-grams: a linear classifier of the n-grams of 1 ... order tokens in an example, wherever they are.

fastText (Joulin et al. 2016): every n-gram has a vector, found in a table by its hash. NBSVM (Wang & Manning 2012): an
n-gram that is there counts once, weighted by how much it separates the classes: the logarithm of the ratio of its
shares in them. The weights of a document are then divided by their Euclidean length, so that a long one counts no more
than a short one; with model.pooling=sum that is the whole model. Of words; or with the tokenizers bytes and chars of
everything that is written, inside of words and across them.

G in names: the lengths of n-grams, 1 ... model.order.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.models.layers import embedding_dropout, output_parameters, parameter
from jaxlm.models.ngram_hash import hash_ngrams
from jaxlm.parallel.linear import lookup
from jaxlm.parallel.mesh import constrain

AXES = ("vocab", "embed")


# ---------------------------------------------------------------- n-grams of a batch


def ngrams_in(
    tokens_BT, segments_BT, positions_BT, order: int, buckets: int
) -> tuple[jax.Array, jax.Array]:
    """(int32 [B, T, G], bool [B, T, G]): the bucket of the n-gram that ends at each position, and whether it counts.

    It does where it is the first of its bucket in its document, and none that would begin before the document.
    """

    def earlier(n):
        return jnp.roll(tokens_BT, n, axis=1)

    inside_BT = segments_BT != 0
    inside = []
    for n in range(order):
        same_BT = jnp.roll(segments_BT, n, axis=1) == segments_BT
        inside_BT &= same_BT & (positions_BT >= n)
        inside.append(inside_BT)
    inside_BTG = jnp.stack(inside, axis=2)
    buckets_BTG = jnp.stack(hash_ngrams(earlier, order, buckets), axis=2)
    segments_BTG = jnp.where(inside_BTG, segments_BT[..., None], 0)
    return buckets_BTG, inside_BTG & first(buckets_BTG, segments_BTG)


def first(buckets_BTG, segments_BTG) -> jax.Array:
    """bool [B, T, G]: no n-gram before it in the row has the same bucket and segment."""
    B, T, G = buckets_BTG.shape
    flat = (B, T * G)
    segments = segments_BTG.reshape(flat)
    buckets = buckets_BTG.reshape(flat)
    place = jnp.broadcast_to(jnp.arange(T * G), flat)
    in_order = (segments, buckets, place)
    segments, buckets, place = jax.lax.sort(in_order, num_keys=3)
    changes = (jnp.diff(segments) != 0) | (jnp.diff(buckets) != 0)
    new = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    new = jax.vmap(put_at)(new, place)
    return new.reshape(B, T, G)


def put_at(values, places):
    return values.at[places].set(values)


# ---------------------------------------------------------------- weights, counted


def log_count_ratios(
    texts: list[np.ndarray],
    labels: np.ndarray,
    num_labels: int,
    order: int,
    buckets: int,
) -> np.ndarray:
    """float32 [buckets]: |log(p / q)|, p the share of an n-gram in all those of a class, q in those of the others.

    Of several classes the largest. Counted are the texts that have it, and 1 before the first, as published. texts: int
    [length] each, labels: int [texts].
    """
    numbers = [np.full(len(text), n) for n, text in enumerate(texts, 1)]
    places = [np.arange(len(text)) for text in texts]
    segments = one_row(numbers)
    ngrams = ngrams_in(one_row(texts), segments, one_row(places), order, buckets)
    buckets_TG, counts_TG = (np.asarray(x[0]) for x in ngrams)
    labels_T1 = np.asarray(labels)[segments[0] - 1, None]
    labels_TG = np.broadcast_to(labels_T1, counts_TG.shape)
    cells = labels_TG[counts_TG] * buckets + buckets_TG[counts_TG]
    found = np.bincount(cells, minlength=num_labels * buckets)
    counts = 1.0 + found.reshape(num_labels, buckets)
    others = counts.sum(axis=0) - counts
    ratios = np.abs(log_share(counts) - log_share(others))
    return ratios.max(axis=0).astype(np.float32)


def one_row(arrays) -> np.ndarray:
    """int32 [1, T]."""
    return np.concatenate(arrays)[None].astype(np.int32)


def log_share(counts) -> np.ndarray:
    return np.log(counts / counts.sum(axis=1, keepdims=True))


# ---------------------------------------------------------------- the model


class Grams(nn.Module):
    """Tokens -> the sum of the weighted vectors of the n-grams that count at each position, [B, T, D]."""

    config: FrozenConfigDict
    train: bool

    @nn.compact
    def __call__(self, tokens_BT, segments_BT, positions_BT):
        c = self.config
        B, T = tokens_BT.shape
        V = c.buckets
        init = nn.initializers.normal(c.embed_std)
        table_VD = parameter(self, "tokens", init, AXES, (V, c.embed_dim), c)
        buckets_BTG, counts_BTG = ngrams_in(tokens_BT, segments_BT, positions_BT, c.order, V)

        def find(table):
            return lookup(table, buckets_BTG.reshape(B, -1), AXES).reshape(B, T, c.order, -1)

        weights_BTG = counts_BTG.astype(c.dtype)
        if c.ngram_weights == "log_count_ratio":
            # Counted where a run begins (jaxlm/run/counted.py), not trained.
            ratio_V = parameter(self, "ratio", nn.initializers.ones, AXES[:1], (V,), c)
            weights_BTG *= find(ratio_V[:, None])[..., 0]
        weights_BTG /= document_lengths(weights_BTG, segments_BT)[..., None].astype(c.dtype)
        drop = embedding_dropout(c, self.train, broadcast_dims=(3,))  # of whole n-grams
        x_BTGD = drop(find(table_VD))
        x_BTD = jnp.einsum("BTG,BTGD->BTD", weights_BTG, x_BTGD)
        return constrain(x_BTD, "batch", "residual", None)


def document_lengths(weights_BTG, segments_BT) -> jax.Array:
    """float32 [B, T]: the Euclidean length of all weights of the document that a position is of."""
    T = segments_BT.shape[1]
    squares_BT = jnp.square(weights_BTG.astype(jnp.float32)).sum(axis=2)

    def of_document(x_T, segments_T):
        return jax.ops.segment_sum(x_T, segments_T, T + 1)[segments_T]

    sums_BT = jax.vmap(of_document)(squares_BT, segments_BT)
    return jnp.sqrt(jnp.maximum(sums_BT, 1e-12))


class Bag(nn.Module):
    """As jaxlm.models.transformer.Transformer, without a cache. config: the resolved `model` section."""

    config: FrozenConfigDict

    @nn.compact
    def __call__(
        self,
        tokens_BT,
        segments_BT=None,
        positions_BT=None,
        *,
        cache=None,
        places_T=None,
        reach_BT=None,
        train=False,
    ):
        """(x [B, T, D], None). segments: None where every row is one document."""
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = Grams(self.config, train, name="embed")(tokens_BT, segments_BT, positions_BT)
        output_parameters(self, self.config)
        return x_BTD, None
