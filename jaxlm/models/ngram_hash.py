"""Which rows of a table the n-grams have that end at each position: their hashes, so that none need be listed."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict


def hash_ngrams(earlier: Callable, order: int, buckets: int) -> list[jax.Array]:
    """Buckets, int32 [B, T], of the n-grams of 1 ... order tokens that end at each position.

    earlier(n): the tokens n places before. The hash is FNV-1a, token by token, its bits then mixed as at the end of
    MurmurHash3: a remainder would see the low ones alone.
    """
    hash_BT = jnp.uint32(2166136261)
    found = []
    for n in range(order):  # from the last token to those before it
        token_BT = earlier(n).astype(jnp.uint32)
        hash_BT = (hash_BT ^ token_BT) * jnp.uint32(16777619)
        bucket_BT = mix_bits(hash_BT) % jnp.uint32(buckets)
        found.append(bucket_BT.astype(jnp.int32))
    return found


def mix_bits(hash_BT) -> jax.Array:
    """uint32: MurmurHash3's finalizer (Appleby 2011)."""
    hash_BT = (hash_BT ^ (hash_BT >> 16)) * jnp.uint32(0x85EBCA6B)
    hash_BT = (hash_BT ^ (hash_BT >> 13)) * jnp.uint32(0xC2B2AE35)
    return hash_BT ^ (hash_BT >> 16)


def hashed_ngrams(
    config: FrozenConfigDict, tokens_BS, segments_BS, places_T, zigzag: bool
) -> tuple[jax.Array, jax.Array]:
    """(buckets, int32 [B, T, G]; whether each is there, bool) of the n-grams that end at these places.

    Of 2 ... model.embed_ngrams tokens; one that would begin in another document is not there. Embeddings of them beside
    those of tokens: Pagnoni et al. 2024, Huang et al. 2025. config: the resolved `model` section. zigzag: the row has
    its tokens in the order of places_T, not of their places.
    """
    order = slice(None)
    if zigzag:
        order = jnp.argsort(places_T)
    tokens_BS = tokens_BS[:, order]
    if segments_BS is None:
        segments_BS = jnp.ones_like(tokens_BS)
    else:
        segments_BS = segments_BS[:, order]

    def earlier(x_BS, n):
        return x_BS[:, jnp.maximum(places_T - n, 0)]

    found = hash_ngrams(partial(earlier, tokens_BS), config.embed_ngrams, config.buckets)
    own_BT = earlier(segments_BS, 0)
    same = []
    for n in range(1, config.embed_ngrams):
        same.append((places_T >= n) & (earlier(segments_BS, n) == own_BT))
    return jnp.stack(found[1:], axis=2), jnp.stack(same, axis=2)
