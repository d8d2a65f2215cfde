"""The attention layer of the Transformers and its key-value cache."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.kernels.attention import ANYWHERE, attention
from jaxlm.kernels.blockwise import FLASH
from jaxlm.models.layers import (
    Linear,
    norm,
    project_in,
    project_out,
    rotary,
    rotate,
)
from jaxlm.parallel.context_parallel import sharded_attention


class Cache(NamedTuple):
    """Keys and values of the positions seen so far. One entry of `blocks` for each distinct block of the model.

    blocks: (k, v) of [B, S, K, H], or [L/P, B, S, K, H] with scan over L/P repeats of a pattern of P blocks; in an
    encoder-decoder (k, v, k of the encoder's output, v of it). segments_BS: int32, 0 where nothing has been written.
    index: int32 scalar, positions written. enc_segments_BS: of the encoder's output, or None. tokens_BS: int32, those
    seen, where n-grams have embeddings.
    """

    blocks: tuple[tuple[jax.Array, ...], ...]
    segments_BS: jax.Array
    index: jax.Array
    enc_segments_BS: jax.Array | None = None
    tokens_BS: jax.Array | None = None


def init_cache(config: FrozenConfigDict, batch: int, length: int, enc_length: int = 0) -> Cache:
    """An empty cache for `length` positions. config: the resolved `model` section. enc_length: of an encoder's."""
    blocks = config.num_layers
    lead = ()
    if config.scan:
        blocks = len(config.layers)
        lead = (config.num_layers // blocks,)
    lengths = [length, length]
    if enc_length:
        lengths += [enc_length, enc_length]

    def zeros(size):
        shape = (*lead, batch, size, config.num_kv_heads, config.head_dim)
        return jnp.zeros(shape, config.dtype)

    def integers(size):
        return jnp.zeros((batch, size), jnp.int32)

    cache = Cache(
        blocks=tuple(tuple(map(zeros, lengths)) for _ in range(blocks)),
        segments_BS=integers(length),
        index=jnp.zeros((), jnp.int32),
    )
    if enc_length:
        cache = cache._replace(enc_segments_BS=integers(enc_length))
    if config.embed_ngrams > 1:
        cache = cache._replace(tokens_BS=integers(length))
    return cache


def take_rows(config: FrozenConfigDict, cache: Cache, rows_B: jax.Array) -> Cache:
    """The cache of these rows of the batch, for beam search. rows: int [B]."""
    batch_axis = 1 if config.scan else 0
    rows_of_blocks = partial(jnp.take, indices=rows_B, axis=batch_axis)
    rows_of = partial(jnp.take, indices=rows_B, axis=0)
    return Cache(
        blocks=jax.tree.map(rows_of_blocks, cache.blocks),
        segments_BS=rows_of(cache.segments_BS),
        index=cache.index,
        enc_segments_BS=jax.tree.map(rows_of, cache.enc_segments_BS),
        tokens_BS=jax.tree.map(rows_of, cache.tokens_BS),
    )


def write(old_BS, new_BT, index) -> jax.Array:
    """old [B, S, ...] with new [B, T, ...] at the positions from index on."""
    return jax.lax.dynamic_update_slice_in_dim(old_BS, new_BT, index, axis=1)


def write_tokens(cache: Cache, tokens_BT, segments_BT) -> Cache:
    """The cache with these tokens and their segments, before the layers write their keys; `index` is the old one."""
    cache = cache._replace(segments_BS=write(cache.segments_BS, segments_BT, cache.index))
    if cache.tokens_BS is None:
        return cache
    return cache._replace(tokens_BS=write(cache.tokens_BS, tokens_BT, cache.index))


# ---------------------------------------------------------------- what layers share


class Context(NamedTuple):
    """What every layer gets besides its input."""

    segments_BT: jax.Array | None
    segments_BS: jax.Array | None  # of the keys: those of the queries, or the cache's
    rotary: tuple[jax.Array, jax.Array] | None
    # In the sequence, where that is not 0, 1, ...; [B, T]: the last that each query sees.
    places_T: jax.Array | None
    places_S: jax.Array | None  # of the keys, in the same order
    index: jax.Array | None  # where the cache is written
    memory_BSD: jax.Array | None = None  # the encoder's output, where it is not in the cache
    enc_segments_BS: jax.Array | None = None


def self_context(
    config: FrozenConfigDict,
    segments_BT,
    segments_BS,
    positions_BT,
    reach_BT,
    places_T,
    index,
) -> Context:
    """The context of layers whose queries see the tokens of their own row. reach: as in `Transformer`."""
    rope = None
    if config.positions == "rope":
        rope = rotary(positions_BT, config.head_dim, config.rope_theta)
    last = places_T
    if reach_BT is not None:
        own_T = places_or_order(places_T, reach_BT.shape[1])
        last = jnp.maximum(reach_BT, own_T)
    return Context(segments_BT, segments_BS, rope, last, places_T, index)


def places_or_order(places_T, length: int) -> jax.Array:
    """int32 [T]: places, or 0, 1, ... where they are None."""
    if places_T is None:
        return jnp.arange(length)
    return places_T


# ---------------------------------------------------------------- the layer


class Attention(nn.Module):
    """x [B, T, D] -> (y [B, T, D], the cache of this block: (k, v), or None).

    window: tokens that a query sees, itself included. cross: queries look at the encoder's output.
    """

    config: FrozenConfigDict
    window: int
    causal: bool
    cross: bool = False

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache):
        c = self.config
        q_BTNH, k_BSKH, v_BSKH = self.project(x_BTD, context, cache)
        if context.rotary and not self.cross:
            q_BTNH = rotate(q_BTNH, context.rotary)
            k_BSKH = rotate(k_BSKH, context.rotary)
        if cache is not None:
            if not self.cross:
                k_BSKH = write(cache[0], k_BSKH, context.index)
                v_BSKH = write(cache[1], v_BSKH, context.index)
            cache = (k_BSKH, v_BSKH)
        y_BTNH = self.attend(q_BTNH, k_BSKH, v_BSKH, context, cached=cache is not None)
        out = Linear(
            c,
            (c.num_heads, c.head_dim, c.embed_dim),
            ("heads", "head_dim", "embed"),
            inputs=2,
            scale=(2 * c.num_layers) ** -0.5,
            name="out",
        )
        return project_out(y_BTNH, out()), cache

    def project(self, x_BTD, context: Context, cache):
        """(q [B, T, N, H], k and v [B, S, K, H]); those of the encoder's output from the cache where it is there."""
        c = self.config
        q_shape = (c.embed_dim, c.num_heads, c.head_dim)
        kv_shape = (c.embed_dim, c.num_kv_heads, c.head_dim)
        kv_axes = ("embed", "kv_heads", "head_dim")
        query = Linear(c, q_shape, ("embed", "heads", "head_dim"), name="query")()
        key = Linear(c, kv_shape, kv_axes, name="key")()
        value = Linear(c, kv_shape, kv_axes, name="value")()
        read_cache = self.cross and context.memory_BSD is None
        if not self.cross:
            q_BTNH, k_BSKH, v_BSKH = project_in(x_BTD, query, key, value)
        elif read_cache:
            (q_BTNH,) = project_in(x_BTD, query)
            k_BSKH, v_BSKH = cache
        else:
            (q_BTNH,) = project_in(x_BTD, query)
            k_BSKH, v_BSKH = project_in(context.memory_BSD, key, value)
        if c.qk_norm:
            q_BTNH = norm(c, "query_norm")(q_BTNH)
            if not read_cache:
                k_BSKH = norm(c, "key_norm")(k_BSKH)
        return q_BTNH, k_BSKH, v_BSKH

    def attend(self, q_BTNH, k_BSKH, v_BSKH, context: Context, cached: bool) -> jax.Array:
        """[B, T, N, H]. The factor of the logits is given here, to the kernel and to the ring's."""
        c = self.config
        scale = c.head_dim**-0.5
        segments_BS = context.segments_BS
        places_T = context.places_T
        places_S = context.places_S
        if self.cross:
            segments_BS = context.enc_segments_BS
            places_T = None
            places_S = None
        options = {
            "window": self.window,
            "softcap": c.attention_softcap,
            "implementation": c.attention,
            "causal": self.causal and not self.cross,
        }
        kernel = partial(attention, scale=scale)
        given = (q_BTNH, k_BSKH, v_BSKH, context.segments_BT, segments_BS)
        if cached:
            return kernel(*given, places_T=places_T, **options)
        return sharded_attention(
            *given,
            places_T,
            places_S,
            attend=kernel,
            flash=tuple(partial(f, scale=scale) for f in FLASH),
            anywhere=ANYWHERE,
            context_parallel="all_gather" if self.cross else c.context_parallel,
            **options,
        )
