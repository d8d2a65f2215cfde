"""A bag of n-grams: a linear classifier of the runs of 1 ... order tokens in an example, wherever they are.

fastText (Joulin et al. 2016): every n-gram has a vector, found in a table by its hash. NBSVM (Wang & Manning 2012):
what is there counts once, and as much as the n-gram tells the classes apart, by the logarithm of the ratio of its
shares in them. The weights of a document are then divided by their Euclidean length, so that a long one says no more
than a short one; with model.pooling=sum that is the whole model. Of words; or with the tokenizers bytes and chars of
everything that is written, inside of words and across them.

G in names: the lengths of n-grams, 1 ... model.order.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.models.layers import embedding_dropout, parameter
from jaxlm.models.ngram_hash import hashed
from jaxlm.models.transformer import heads
from jaxlm.parallel.linear import lookup
from jaxlm.parallel.mesh import constrain


def ngrams_in(
    tokens_BT, segments_BT, positions_BT, order: int, buckets: int
) -> tuple[jax.Array, jax.Array]:
    """(int32 [B, T, G], bool [B, T, G]): the bucket of the n-gram that ends at each position, and whether it counts.

    It does where it is the first of its bucket in its document, and none that would begin before the document.
    """
    whole_BT = segments_BT != 0
    whole_BTG = []
    for n in range(order):
        whole_BT &= (jnp.roll(segments_BT, n, axis=1) == segments_BT) & (positions_BT >= n)
        whole_BTG.append(whole_BT)
    buckets_BTG = jnp.stack(
        hashed(lambda n: jnp.roll(tokens_BT, n, axis=1), order, buckets), axis=2
    )
    whole_BTG = jnp.stack(whole_BTG, axis=2)
    return buckets_BTG, whole_BTG & first(
        buckets_BTG, jnp.where(whole_BTG, segments_BT[..., None], 0)
    )


def first(buckets_BTG, segments_BTG) -> jax.Array:
    """bool [B, T, G]: no n-gram before it in the row has the same bucket and segment."""

    def flat(x):
        return x.reshape(len(x), -1)

    place = jnp.broadcast_to(jnp.arange(flat(buckets_BTG).shape[1]), flat(buckets_BTG).shape)
    segments, buckets, place = jax.lax.sort(
        (flat(segments_BTG), flat(buckets_BTG), place), num_keys=3
    )
    new = jnp.pad(
        (jnp.diff(segments) != 0) | (jnp.diff(buckets) != 0), ((0, 0), (1, 0)), constant_values=True
    )
    return jax.vmap(lambda new, place: new.at[place].set(new))(new, place).reshape(
        buckets_BTG.shape
    )


def log_count_ratios(
    texts: list[np.ndarray], labels: np.ndarray, num_labels: int, order: int, buckets: int
):
    """float32 [buckets]: |log(p / q)|, p the share of an n-gram in all those of a class, q in those of the others.

    Of several classes the largest. Counted are the texts that have it, and 1 before the first, as published. texts: int
    [length] each, labels: int [texts].
    """

    def row(arrays):
        return np.concatenate(arrays)[None].astype(np.int32)

    segments = row([np.full(len(text), n) for n, text in enumerate(texts, 1)])
    ngrams = ngrams_in(
        row(texts), segments, row([np.arange(len(text)) for text in texts]), order, buckets
    )
    buckets_TG, counts_TG = (np.asarray(x[0]) for x in ngrams)
    labels_TG = np.broadcast_to(np.asarray(labels)[segments[0] - 1, None], counts_TG.shape)
    cells = labels_TG[counts_TG] * buckets + buckets_TG[counts_TG]
    counts = 1.0 + np.bincount(cells, minlength=num_labels * buckets).reshape(num_labels, buckets)

    def share(x):
        return np.log(x / x.sum(axis=1, keepdims=True))

    return np.abs(share(counts) - share(counts.sum(axis=0) - counts)).max(axis=0).astype(np.float32)


class Grams(nn.Module):
    """Tokens -> the sum of the weighted vectors of the n-grams that count at each position, [B, T, D]."""

    config: FrozenConfigDict
    train: bool

    @nn.compact
    def __call__(self, tokens_BT, segments_BT, positions_BT):
        c, (B, T) = self.config, tokens_BT.shape
        V = c.buckets
        D = c.embed_dim
        axes = ("vocab", "embed")
        table_VD = parameter(self, "tokens", nn.initializers.normal(c.embed_std), axes, (V, D), c)
        buckets_BTG, counts_BTG = ngrams_in(tokens_BT, segments_BT, positions_BT, c.order, V)

        def find(table):
            return lookup(table, buckets_BTG.reshape(B, -1), axes).reshape(B, T, c.order, -1)

        weights_BTG = counts_BTG.astype(c.dtype)
        if (
            c.ngram_weights == "log_count_ratio"
        ):  # counted where a run begins (jaxlm/run/counted.py), not trained
            ratio_V = parameter(self, "ratio", nn.initializers.ones, axes[:1], (V,), c)
            weights_BTG *= find(ratio_V[:, None])[..., 0]
        squares_BT = jnp.square(weights_BTG.astype(jnp.float32)).sum(axis=2)

        def of_document(x_T, segments_T):
            return jax.ops.segment_sum(x_T, segments_T, T + 1)[segments_T]

        length_BT = jnp.sqrt(jnp.maximum(jax.vmap(of_document)(squares_BT, segments_BT), 1e-12))
        weights_BTG /= length_BT[..., None].astype(c.dtype)
        x_BTGD = embedding_dropout(c, self.train, broadcast_dims=(3,))(
            find(table_VD)
        )  # of whole n-grams
        return constrain(
            jnp.einsum("BTG,BTGD->BTD", weights_BTG, x_BTGD), "batch", "residual", None
        )


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
        else:
            segments_BT = segments_BT
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = Grams(self.config, train, name="embed")(tokens_BT, segments_BT, positions_BT)
        heads(self, self.config)
        return x_BTD, None
