"""The Transformer decoder (Vaswani et al. 2017; pre-norm), for training and for generation with a key-value cache."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.config import pipeline_microbatches
from jaxlm.kernels.attention import FLASH, attention
from jaxlm.models.layers import MLP, Embed, Linear, back, into, norm, parameter, rotary, rotate
from jaxlm.models.moe import MoE
from jaxlm.parallel.mesh import batch_shards, constrain, current_mesh, even_mesh
from jaxlm.parallel.pipeline import pipeline
from jaxlm.parallel.ring import sharded_attention

_policies = jax.checkpoint_policies
REMAT = {  # model.remat -> what the forward pass keeps for the backward pass; what was gathered, never
    "none": lambda primitive, *_, **__: primitive is not jax.lax.all_gather_p,
    "full": _policies.nothing_saveable,
    "dots": _policies.save_only_these_names("product"),
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
    places_T: jax.Array | None  # in the sequence, where that is not 0, 1, ...; without a cache the keys' too
    index: jax.Array | None  # where the cache is written


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
        q_BTNH, k_BSKH, v_BSKH = into(
            x_BTD,
            Linear(c, (D, N, H), ("embed", "heads", "head_dim"), name="query")(),
            Linear(c, (D, K, H), ("embed", "kv_heads", "head_dim"), name="key")(),
            Linear(c, (D, K, H), ("embed", "kv_heads", "head_dim"), name="value")(),
        )
        if c.qk_norm:
            q_BTNH, k_BSKH = norm(c, "query_norm")(q_BTNH), norm(c, "key_norm")(k_BSKH)
        if context.rotary:
            q_BTNH, k_BSKH = rotate(q_BTNH, context.rotary), rotate(k_BSKH, context.rotary)
        options = {"window": self.window, "softcap": c.attention_softcap, "implementation": c.attention}
        if cache is not None:
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, context.index, axis=1)
            k_BSKH, v_BSKH = cache = write(cache[0], k_BSKH), write(cache[1], v_BSKH)
            y_BTNH = attention(
                q_BTNH, k_BSKH, v_BSKH, context.segments_BT, context.segments_BS, places_T=context.places_T, **options
            )
        else:
            y_BTNH = sharded_attention(
                q_BTNH, k_BSKH, v_BSKH, context.segments_BT, context.places_T, attend=attention, flash=FLASH,
                context_parallel=c.context_parallel, **options,
            )  # fmt: skip
        out = Linear(
            c, (N, H, D), ("heads", "head_dim", "embed"), inputs=2, scale=(2 * c.num_layers) ** -0.5, name="out"
        )
        return back(y_BTNH, out()), cache


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
        x_BTD = constrain(x_BTD + drop(y_BTD), "batch", "residual", None)
        y_BTD = norm(c, "mlp_norm")(x_BTD)
        if c.num_experts:
            y_BTD, routing = MoE(c, self.train, name="mlp")(y_BTD, context.segments_BT, context.places_T)
            self.sow("aux", "routing", routing, init_fn=dict, reduce_fn=lambda _, new: new)
        else:
            y_BTD = MLP(c, c.mlp_dim, name="mlp")(y_BTD)
        return constrain(x_BTD + drop(y_BTD), "batch", "residual", None), cache


class Pattern(nn.Module):
    """One round of config.layers: the body of the scan over layers."""

    config: FrozenConfigDict
    kinds: str
    train: bool

    @nn.compact
    def __call__(self, x_BTD, context: Context, caches):
        remat = self.config.remat
        block = Block if remat == "none" and current_mesh() is None else nn.remat(
            Block, policy=REMAT[remat], prevent_cse=not self.config.scan
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
    `context_length`, in training and in generation of any length. Mixture-of-experts layers leave what the loss needs
    of them in the collection `aux`.
    """

    config: FrozenConfigDict

    @nn.compact
    def __call__(
        self, tokens_BT, segments_BT=None, positions_BT=None, *, cache: Cache | None = None, places_T=None, train=False
    ):
        """(x [B, T, D], the cache with these tokens added). segments: None where every row is one document.

        places: int32 [T], of the tokens in their rows where they are in another order than 0, 1, ... (zig-zag).
        """
        c = self.config
        B, T = tokens_BT.shape
        segments_BS, index = segments_BT, None
        if cache is not None:
            segments_BT = jnp.ones((B, T), jnp.int32) if segments_BT is None else segments_BT
            index, places_T = cache.index, cache.index + jnp.arange(T)
            segments_BS = jax.lax.dynamic_update_slice_in_dim(cache.segments_BS, segments_BT, index, axis=1)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T) if places_T is None else places_T, (B, T))
        caches = None if cache is None else tuple(zip(cache.k, cache.v))

        x_BTD = Embed(c, name="embed")(tokens_BT, positions_BT)
        x_BTD = nn.Dropout(c.dropout, deterministic=not train)(x_BTD)
        mesh = even_mesh(B, T)
        if mesh is not None and mesh.shape["stage"] > 1 and cache is None and not self.is_initializing():
            x_BTD = self.staged(x_BTD, segments_BT, positions_BT, places_T, train, mesh)
        else:
            rope = rotary(positions_BT, c.head_dim, c.rope_theta) if c.positions == "rope" else None
            context = Context(segments_BT, segments_BS, rope, places_T, index)
            x_BTD, caches = stack(c, train, name="layers")(x_BTD, context, caches)
        x_BTD = norm(c, "final_norm")(x_BTD)
        if not c.tie_embeddings:
            init = nn.initializers.normal(c.embed_dim**-0.5)
            parameter(self, "unembed", init, ("vocab", "embed"), (c.vocab_size, c.embed_dim), c)
        if cache is not None:
            k, v = zip(*caches)
            cache = Cache(k, v, segments_BS, index + T)
        return x_BTD, cache

    def staged(self, x_BTD, segments_BT, positions_BT, places_T, train: bool, mesh) -> jax.Array:
        """The layers as stages of a pipeline, of the same parameters as `stack` without one."""
        c, stages = self.config, mesh.shape["stage"]
        key = self.make_rng("dropout") if train and c.dropout else None
        microbatches = pipeline_microbatches(c, x_BTD.shape[0] // batch_shards(mesh), stages)

        def apply(layers, x_BTD, rows, number):
            segments_BT, positions_BT = rows
            rope = rotary(positions_BT, c.head_dim, c.rope_theta) if c.positions == "rope" else None
            context = Context(segments_BT, segments_BT, rope, places_T, None)
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, number)}
            length = jax.tree.leaves(layers)[0].shape[0]
            (x_BTD, _), made = stack(c, train, length, parent=None).apply(
                {"params": layers}, x_BTD, context, None, rngs=rngs, mutable=["aux"]
            )
            return x_BTD, dict(made)

        x_BTD, made = pipeline(
            apply, self.variables["params"]["layers"], x_BTD, (segments_BT, positions_BT), stages=stages,
            microbatches=microbatches, rounds=c.pipeline_rounds,
        )  # fmt: skip
        if self.is_mutable_collection("aux") and made:
            self.put_variable("aux", "layers", jax.tree_util.tree_map_with_path(of_all_layers, made["aux"]))
        return x_BTD


def of_all_layers(path, leaf):
    """What pipeline calls returned, [rounds, stages, microbatches, layers, ...], as without one: [R, ...].

    Per row ([..., B / microbatches], a name in _B) the rows are put back in order; else microbatches are summed.
    """
    if path[-1].key.endswith("_B"):
        leaf = jnp.moveaxis(leaf, 2, -1)
        return leaf.reshape(math.prod(leaf.shape[:3]), -1)
    leaf = leaf.sum(axis=2)
    return leaf.reshape(-1, *leaf.shape[3:])


def stack(config: FrozenConfigDict, train: bool, length: int | None = None, **place) -> nn.Module:
    """All layers, or `length` rounds of their pattern; one compiled round where config.scan. place: name or parent."""
    if not config.scan:
        kinds = (config.layers * config.num_layers)[: config.num_layers]
        return Pattern(config, kinds, train, **place)
    scanned = nn.scan(
        Pattern,
        variable_axes={"params": 0, "aux": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),
        length=length or config.num_layers // len(config.layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, config.layers, train, **place)


def unembedding(params) -> jax.Array:
    """[V, D]: the output table, the input's where they are tied."""
    return params.get("unembed", params["embed"]["tokens"])
