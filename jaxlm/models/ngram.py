"""An interpolated Kneser-Ney n-gram model: counted with numpy (`fit`), read with JAX, used as the neural models are.

For each order k the parameters hold the k-grams of the text, sorted by their tokens: a trie in which the continuations
of a context are neighbours. int32 and float32 alone:

    token_k    [k-grams]      the last token of each. Not for order 1, where every token is stored: 1-gram w is w
    prob_k     [k-grams]      of the last token after those before it, shorter contexts included
    start_k    [k-grams + 1]  k-gram i is the context of the (k+1)-grams start_k[i] ... start_k[i + 1] - 1
    backoff_k  [k-grams]      the mass that k-gram i, as a context, leaves to the context that is one token shorter

As in an ARPA file, p(token | context) is backoff(context) p(token | shorter context) where the two are not stored
together, with a backoff of 1 where the context is not stored either. Nothing continues the highest order.

C in names: the lengths of contexts, 1 ... order - 1.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.errors import DataError


def fit(
    documents: Iterable[np.ndarray],
    order: int,
    vocab_size: int,
    bos_id: int | None = None,
    discount: float = 0.0,
) -> dict[str, np.ndarray]:
    """The parameters of the model of these documents: int [length] each, bos in front where there is a bos_id.

    Kneser & Ney (1995), interpolated and with three discounts as in Chen & Goodman (1998, section 3):

        p(w | c) = (a(cw) - D(a(cw))) / A + (sum over v of D(a(cv))) / A * p(w | c without its first token)

    where A is the sum over v of a(cv), D(0) = 0, and p is 1 / vocab_size below the empty context. a(cw) is how often cw
    occurs at the highest order and where cw begins with bos, which nothing precedes; else it is how many different
    tokens precede cw within documents. The bos in front of a document is a context alone, never a token to predict.
    D(1), D(2) and D(3 and more) are those of `discounts` at each order, or all `discount` where that is not 0.

    Raises DataError where documents have other tokens than these, don't begin with the bos_id, or are all shorter than
    the order; ValueError where order or discount is out of its range.
    """
    if order < 1 or not 0 <= discount < 1:
        raise ValueError(
            f"order={order} discount={discount}: order must be 1 or more, discount below 1, 0 to estimate"
        )
    tokens, left = in_a_row(list(documents), order, vocab_size, bos_id)
    params = {}
    prob = np.array([1 / vocab_size])
    orders = grams(tokens, left, order, vocab_size, bos_id)
    for k, (token, parent, suffix, count) in enumerate(orders, 1):
        D = discounts(count)
        if discount:
            D = np.array([0, discount, discount, discount])
        removed = D[np.minimum(count, 3)]
        contexts = len(prob)
        total = np.bincount(parent, count, minlength=contexts)
        freed = np.bincount(parent, removed, minlength=contexts)
        seen = total > 0
        total = np.maximum(total, 1)
        backoff = np.where(seen, freed / total, 1)
        if k > 1:
            start = np.searchsorted(parent, np.arange(contexts + 1))
            params[f"start_{k - 1}"] = start.astype(np.int32)
            params[f"backoff_{k - 1}"] = backoff.astype(np.float32)
            params[f"token_{k}"] = token
        prob = (count - removed) / total[parent] + backoff[parent] * prob[suffix]
        params[f"prob_{k}"] = prob.astype(np.float32)
    return params


def in_a_row(documents: list[np.ndarray], order: int, vocab_size: int, bos_id: int | None):
    """(tokens of all documents, int32; how many tokens of its document begin at each). Raises DataError as `fit`."""
    lengths = np.array([len(document) for document in documents], np.int64)
    if lengths.max(initial=0) < order:
        raise DataError(
            f"no document has {order} tokens, the order of the n-gram model: choose a lower order"
        )
    tokens = np.concatenate(documents, dtype=np.int32, casting="unsafe")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise DataError(
            f"documents with tokens {tokens.min()} ... {tokens.max()}, of a vocabulary of {vocab_size}"
        )
    ends = np.cumsum(lengths)
    begins = (ends - lengths)[lengths > 0]
    if bos_id is not None and np.any(tokens[begins] != bos_id):
        raise DataError(
            f"a document does not begin with bos ({bos_id}): put it in front of every document"
        )
    return tokens, np.repeat(ends, lengths) - np.arange(len(tokens))


def grams(
    tokens: np.ndarray,
    left: np.ndarray,
    order: int,
    vocab_size: int,
    bos_id: int | None,
) -> Iterator[tuple]:
    """(last token, index without the last token, index without the first, a) of the k-grams, for k = 1 ... order.

    tokens: documents in a row; left: how many tokens of its document begin at each. The k-gram at a place is the
    (k-1)-gram there and a token more: one sort of the places for each order, and the result is sorted by tokens.
    """
    node = tokens
    token = np.arange(vocab_size, dtype=np.int32)
    parent = np.zeros(vocab_size, np.int32)
    suffix = parent
    after_bos = np.zeros(vocab_size, bool)
    occurs = np.bincount(tokens, minlength=vocab_size)
    if bos_id is not None:
        occurs[bos_id] -= np.sum(left == 1)  # documents
    for k in range(1, order):
        here = np.flatnonzero(left > k)
        keys = node[here].astype(np.int64) * vocab_size + tokens[here + k]
        keys, inverse, times = np.unique(keys, return_inverse=True, return_counts=True)
        inner = np.empty(len(keys), np.int32)
        inner[inverse] = node[here + 1]
        preceding = np.bincount(inner, minlength=len(occurs))
        yield token, parent, suffix, np.where(after_bos, occurs, preceding)
        token = (keys % vocab_size).astype(np.int32)
        parent = (keys // vocab_size).astype(np.int32)
        suffix = inner
        if k == 1:
            after_bos = parent == bos_id
        else:
            after_bos = after_bos[parent]
        occurs = times
        node = np.full(len(tokens), -1, np.int32)
        node[here] = inverse
    yield token, parent, suffix, occurs


def discounts(count: np.ndarray) -> np.ndarray:
    """float [4]: D(0) = 0, D(1), D(2), D(3 and more) for these counts (Chen & Goodman 1998, equation 26).

    n_j: how many are j. D(j) = j - (j + 1) Y n_(j+1) / n_j with Y = n_1 / (n_1 + 2 n_2). The n_j of a small or uniform
    text may put a D(j) outside of (0, j): then all three are Y, or 0.75 where Y is not in (0, 1) either.
    """
    n = np.bincount(np.minimum(count, 5), minlength=5)
    j = np.arange(1, 4)
    n_j = np.maximum(n[1:4], 1)
    n_next = n[2:5]
    Y = n[1] / max(n[1] + 2 * n[2], 1)
    D = j - (j + 1) * Y * n_next / n_j
    inside = (D > 0) & (D / j < 1)
    if np.all(inside):
        return np.array([0, *D])
    if 0 < Y < 1:
        return np.array([0, Y, Y, Y])
    return np.array([0, 0.75, 0.75, 0.75])


# ---------------------------------------------------------------- read


def child(params: dict, k: int, node: jax.Array, token: jax.Array) -> jax.Array:
    """int32: which k-gram is the (k-1)-gram `node` with `token` after it, -1 for none. Broadcasts."""
    start = jnp.asarray(params[f"start_{k - 1}"])
    tokens = jnp.asarray(params[f"token_{k}"])
    node, token = jnp.broadcast_arrays(node, token)
    end = start[node + 1]

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        right = (low < high) & (tokens[middle] < token)
        return jnp.where(right, middle + 1, low), jnp.where(right, high, middle)

    steps = params["prob_1"].shape[0].bit_length()  # no more continuations than tokens
    place, _ = jax.lax.fori_loop(0, steps, halve, (start[node], end))
    found = (node >= 0) & (place < end) & (tokens[place] == token)
    return jnp.where(found, place, -1)


def find_contexts(params: dict, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """int32 [B, T, C]: which k-gram are the last k = 1 ... order - 1 tokens at each place, -1 where it is not stored.

    positions: how many tokens of the same document are to the left of each, if the row has them; -1: not even itself.
    """
    node_BT = jnp.where(positions_BT >= 0, tokens_BT, -1)
    nodes = [node_BT]
    order = order_of(params)
    for k in range(2, order):
        before_BT = jnp.pad(node_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        before_BT = jnp.where(positions_BT >= k - 1, before_BT, -1)
        node_BT = child(params, k, before_BT, tokens_BT)
        nodes.append(node_BT)
    return jnp.stack(nodes, axis=-1)[..., : order - 1]


def log_probs_of(params: dict, x_C: jax.Array, tokens: jax.Array) -> jax.Array:
    """float32: log-probabilities, in nats, of tokens after contexts [..., C] of find_contexts. Broadcasts."""
    shape = jnp.broadcast_shapes(tokens.shape, x_C.shape[:-1])
    tokens = jnp.broadcast_to(tokens, shape)
    prob = jnp.asarray(params["prob_1"])[tokens]
    for k in range(1, x_C.shape[-1] + 1):
        node = x_C[..., k - 1]
        backoff = jnp.asarray(params[f"backoff_{k}"])
        longer = jnp.asarray(params[f"prob_{k + 1}"])
        found = child(params, k + 1, node, tokens)
        shorter = jnp.where(node >= 0, backoff[node], 1) * prob
        prob = jnp.where(found >= 0, longer[found], shorter)
    return jnp.log(prob)


def log_probs(params: dict, x_BTC: jax.Array) -> jax.Array:
    """float32 [B, T, V], in nats, of every token after contexts of find_contexts."""
    return log_probs_of(params, x_BTC[:, :, None], jnp.arange(params["prob_1"].shape[0]))


def target_log_probs(
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    targets_BT: jax.Array,
) -> jax.Array:
    """float32 [B, T], in nats: what log_probs has for each target, without the array of all tokens."""
    return log_probs_of(params, find_contexts(params, tokens_BT, positions_BT), targets_BT)


class Cache(NamedTuple):
    """The last order - 1 tokens of each row, int32 [B, C], and how many tokens its document has so far, int32 [B]."""

    tokens_BC: jax.Array
    count_B: jax.Array


class NGram(nn.Module):
    """Tokens -> contexts; `log_probs` and `log_probs_of` follow outside. Parameters: those of `fit`.

    config: the `model` section; its `ngrams` says how many k-grams are stored for k = 1 ... order.
    """

    config: FrozenConfigDict

    def init_cache(self, batch: int, length: int = 0) -> Cache:
        """An empty cache, the same for any length."""
        C = len(self.config.ngrams) - 1
        return Cache(jnp.zeros((batch, C), jnp.int32), jnp.zeros(batch, jnp.int32))

    def take_rows(self, cache: Cache, rows_B) -> Cache:
        return jax.tree.map(lambda x: jnp.take(x, rows_B, axis=0), cache)

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
        """(contexts [B, T, C], the cache with these tokens added). Arguments as those of the Transformer."""
        params = self.tables()
        B, T = tokens_BT.shape
        C = len(self.config.ngrams) - 1
        if segments_BT is None:
            segments_BT = jnp.ones((B, T), jnp.int32)
        if positions_BT is None:
            positions_BT = jnp.full((B, T), jnp.iinfo(jnp.int32).max)
        zigzag = cache is None and places_T is not None
        if zigzag:  # in the order of the text; the contexts are put back at the end
            order_T = jnp.argsort(places_T)
            tokens_BT = tokens_BT[:, order_T]
            segments_BT = segments_BT[:, order_T]
            positions_BT = positions_BT[:, order_T]
        old = cache
        if cache is None:
            old = self.init_cache(B)
        positions_BT = tokens_to_the_left(segments_BT, positions_BT, old.count_B)
        old_positions_BC = old.count_B[:, None] - C + jnp.arange(C)
        tokens_BS = jnp.concatenate([old.tokens_BC, tokens_BT], axis=1)
        positions_BS = jnp.concatenate([old_positions_BC, positions_BT], axis=1)
        x_BTC = find_contexts(params, tokens_BS, positions_BS)[:, C:]
        if zigzag:
            x_BTC = x_BTC[:, places_T]
        if cache is not None:
            cache = Cache(tokens_BS[:, T:], positions_BT[:, -1] + 1)
        return x_BTC, cache

    def tables(self) -> dict:
        """The parameters, each a vector. Made here they are zeros: `fit` counts them."""
        params = {}
        sizes = self.config.ngrams
        for k, size in enumerate(sizes, 1):
            params[f"prob_{k}"] = self.table(f"prob_{k}", size, jnp.float32)
            if k > 1:
                params[f"token_{k}"] = self.table(f"token_{k}", size, jnp.int32)
            if k < len(sizes):
                params[f"start_{k}"] = self.table(f"start_{k}", size + 1, jnp.int32)
                params[f"backoff_{k}"] = self.table(f"backoff_{k}", size, jnp.float32)
        return params

    def table(self, name: str, length: int, dtype) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
        return self.param(name, init, (length,), dtype)


def tokens_to_the_left(segments_BT, positions_BT, count_B) -> jax.Array:
    """int32 [B, T]: how many tokens of its document are before each, at most its position; -1 for padding.

    count: tokens before the row of the document that it begins with.
    """
    T = segments_BT.shape[1]
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)))
    begin_BT = jnp.where(begins_BT, jnp.arange(T), -count_B[:, None])
    begin_BT = jax.lax.cummax(begin_BT, axis=1)
    left_BT = jnp.arange(T) - begin_BT
    left_BT = jnp.minimum(positions_BT, left_BT)
    return jnp.where(segments_BT > 0, left_BT, -1)


def order_of(params: dict) -> int:
    return sum(name.startswith("prob_") for name in params)


def sizes(params: dict) -> tuple[int, ...]:
    """`ngrams` of the parameters of `fit`: how many k-grams there are for k = 1 ... order."""
    return tuple(len(params[f"prob_{k}"]) for k in range(1, order_of(params) + 1))
