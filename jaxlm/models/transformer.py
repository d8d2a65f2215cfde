"""The Transformer decoder (Vaswani et al. 2017; pre-norm), for training and for generation with a key-value cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from ml_collections import FrozenConfigDict

from jaxlm.kernels.attention import attention
from jaxlm.models.layers import MLP, Embed, Linear, norm, parameter, rotary, rotate
from jaxlm.parallel.mesh import constrain

_policies = jax.checkpoint_policies
REMAT = {  # model.remat -> what the forward pass keeps for the backward pass
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "attention": _policies.save_only_these_names("attention"),
}


class Cache(NamedTuple):
    """Keys and values of the positions seen so far. One entry of k and v for each distinct block of the model.

    k, v: tuples of [B, S, K, H], or [L/P, B, S, K, H] with scan over L/P repeats of a pattern of P blocks.
    segments_BS: int32, 0 where nothing has been written. index: int32 scalar, positions written.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    segments_BS: jax.Array
    index: jax.Array


class Context(NamedTuple):
    """What every layer is told besides its input."""

    segments_BT: jax.Array | None
    segments_BS: jax.Array | None  # of the keys: those of the queries, or the cache's
    rotary: tuple[jax.Array, jax.Array] | None
    index: jax.Array | int  # place of the first query among the keys


def init_cache(config: FrozenConfigDict, batch: int, length: int) -> Cache:
    """An empty cache for `length` positions. config: the resolved `model` section."""
    blocks = len(config.layers) if config.scan else config.num_layers
    lead = (config.num_layers // blocks,) if config.scan else ()
    shape = (*lead, batch, length, config.num_kv_heads, config.head_dim)
    zeros = tuple(jnp.zeros(shape, config.dtype) for _ in range(blocks))
    return Cache(zeros, zeros, jnp.zeros((batch, length), jnp.int32), jnp.zeros((), jnp.int32))


class Attention(nn.Module):
    config: FrozenConfigDict
    window: int  # tokens that a query sees, itself included

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache):
        c = self.config
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        q_BTNH = Linear(c, "BTD,DNH->BTNH", (D, N, H), ("embed", "heads", "head_dim"), name="query")(x_BTD)
        k_BTKH = Linear(c, "BTD,DKH->BTKH", (D, K, H), ("embed", "kv_heads", "head_dim"), name="key")(x_BTD)
        v_BTKH = Linear(c, "BTD,DKH->BTKH", (D, K, H), ("embed", "kv_heads", "head_dim"), name="value")(x_BTD)
        if c.qk_norm:
            q_BTNH, k_BTKH = norm(c, "query_norm")(q_BTNH), norm(c, "key_norm")(k_BTKH)
        if context.rotary:
            q_BTNH, k_BTKH = rotate(q_BTNH, context.rotary), rotate(k_BTKH, context.rotary)
        q_BTNH = constrain(q_BTNH, "batch", "length", "heads", None)
        k_BSKH = constrain(k_BTKH, "batch", "length", "kv_heads", None)
        v_BSKH = constrain(v_BTKH, "batch", "length", "kv_heads", None)
        if cache is not None:
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, context.index, axis=1)
            k_BSKH, v_BSKH = cache = write(cache[0], k_BSKH), write(cache[1], v_BSKH)
        y_BTNH = attention(
            q_BTNH, k_BSKH, v_BSKH, context.segments_BT, context.segments_BS, offset=context.index,
            window=self.window, softcap=c.attention_softcap, implementation=c.attention,
        )  # fmt: skip
        y_BTNH = checkpoint_name(constrain(y_BTNH, "batch", "length", "heads", None), "attention")
        out = Linear(
            c, "BTNH,NHD->BTD", (N, H, D), ("heads", "head_dim", "embed"), inputs=2,
            scale=(2 * c.num_layers) ** -0.5, name="out",
        )  # fmt: skip
        return out(y_BTNH), cache


class Block(nn.Module):
    config: FrozenConfigDict
    kind: str  # S or L, a letter of config.layers
    train: bool

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache):
        c = self.config
        drop = nn.Dropout(c.dropout, deterministic=not self.train)
        window = min(c.window, c.context_length) if self.kind == "S" else c.context_length
        y_BTD, cache = Attention(c, window, name="attention")(norm(c, "attention_norm")(x_BTD), context, cache)
        x_BTD = constrain(x_BTD + drop(y_BTD), "batch", "length", None)
        y_BTD = MLP(c, name="mlp")(norm(c, "mlp_norm")(x_BTD))
        return constrain(x_BTD + drop(y_BTD), "batch", "length", None), cache


class Pattern(nn.Module):
    """One round of config.layers: the body of the scan over layers."""

    config: FrozenConfigDict
    kinds: str
    train: bool

    @nn.compact
    def __call__(self, x_BTD, context: Context, caches):
        block = Block if self.config.remat == "none" else nn.remat(
            Block, policy=REMAT[self.config.remat], prevent_cse=not self.config.scan
        )  # fmt: skip
        new = []
        for i, kind in enumerate(self.kinds):
            cache = None if caches is None else caches[i]
            x_BTD, cache = block(self.config, kind, self.train, name=f"block_{i}")(x_BTD, context, cache)
            new.append(cache)
        return x_BTD, None if caches is None else tuple(new)


class Decoder(nn.Module):
    """Tokens -> final hidden states; `unembedding(params)` and cross-entropy or logits follow outside.

    config: the resolved `model` section. With positions rope or none, no token looks further back than
    `context_length`, in training and in generation of any length.
    """

    config: FrozenConfigDict

    @nn.compact
    def __call__(self, tokens_BT, segments_BT=None, positions_BT=None, *, cache: Cache | None = None, train=False):
        """(x [B, T, D], the cache with these tokens added). segments: None where every row is one document."""
        c = self.config
        B, T = tokens_BT.shape
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T) + (0 if cache is None else cache.index), (B, T))
        segments_BS, index = segments_BT, 0
        if cache is not None:
            segments_BT = jnp.ones((B, T), jnp.int32) if segments_BT is None else segments_BT
            index = cache.index
            segments_BS = jax.lax.dynamic_update_slice_in_dim(cache.segments_BS, segments_BT, index, axis=1)
        rope = rotary(positions_BT, c.head_dim, c.rope_theta) if c.positions == "rope" else None
        context = Context(segments_BT, segments_BS, rope, index)
        caches = None if cache is None else tuple(zip(cache.k, cache.v))

        x_BTD = Embed(c, name="embed")(tokens_BT, positions_BT)
        x_BTD = nn.Dropout(c.dropout, deterministic=not train)(x_BTD)
        if c.scan:
            layers = nn.scan(
                Pattern,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),
                length=c.num_layers // len(c.layers),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, c.layers, train, name="layers")
        else:
            kinds = (c.layers * c.num_layers)[: c.num_layers]
            layers = Pattern(c, kinds, train, name="layers")
        x_BTD, caches = layers(x_BTD, context, caches)
        x_BTD = norm(c, "final_norm")(x_BTD)
        if not c.tie_embeddings:
            init = nn.initializers.normal(c.embed_dim**-0.5)
            parameter(self, "unembed", init, ("vocab", "embed"), (c.vocab_size, c.embed_dim), c)
        if cache is not None:
            k, v = zip(*caches)
            cache = Cache(k, v, segments_BS, index + T)
        return x_BTD, cache


def unembedding(params) -> jax.Array:
    """[V, D]: the output table, the input's where they are tied."""
    return params.get("unembed", params["embed"]["tokens"])
