"""Which rows of a table the n-grams have that end at each position: their hashes, so that none need be listed."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict


def hashed(earlier: Callable, order: int, buckets: int) -> list[jax.Array]:
    """Buckets, int32 [B, T], of the runs of 1 ... order tokens that end at each position.

    earlier(n): the tokens n places before. The hash is FNV-1a, token by token, its bits then mixed as at the end of
    MurmurHash3: a remainder would see the low ones alone.
    """
    hash_BT = jnp.uint32(2166136261)
    found = []
    for n in range(order):  # from the last token to those before it
        hash_BT = (hash_BT ^ earlier(n).astype(jnp.uint32)) * jnp.uint32(16777619)
        mixed_BT = (hash_BT ^ (hash_BT >> 16)) * jnp.uint32(0x85EBCA6B)
        mixed_BT = (mixed_BT ^ (mixed_BT >> 13)) * jnp.uint32(0xC2B2AE35)
        found.append(((mixed_BT ^ (mixed_BT >> 16)) % jnp.uint32(buckets)).astype(jnp.int32))
    return found


def runs(
    config: FrozenConfigDict, tokens_BS, segments_BS, places_T, zigzag: bool
) -> tuple[jax.Array, jax.Array]:
    """(buckets, int32 [B, T, G]; bool): the runs of 2 ... model.embed_ngrams tokens that end at these places.

    One that would begin in another document is none. Embeddings of them beside those of tokens: Pagnoni et al. 2024,
    Huang et al. 2025. config: the resolved `model` section. zigzag: the row has its tokens in the order of
    places_T, not of their places.
    """
    order = jnp.argsort(places_T) if zigzag else slice(None)
    tokens_BS = tokens_BS[:, order]
    if segments_BS is None:
        segments_BS = jnp.ones_like(tokens_BS)
    else:
        segments_BS = segments_BS[:, order]

    def earlier(x_BS, n):
        return x_BS[:, jnp.maximum(places_T - n, 0)]

    found = hashed(partial(earlier, tokens_BS), config.embed_ngrams, config.buckets)
    same = [
        (places_T >= n) & (earlier(segments_BS, n) == earlier(segments_BS, 0))
        for n in range(1, config.embed_ngrams)
    ]
    return jnp.stack(found[1:], axis=2), jnp.stack(same, axis=2)
