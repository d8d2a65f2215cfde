"""The Transformer (Vaswani et al. 2017), decoder or encoder, for training and for generation with a key-value cache."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.config.recipe import pipeline_microbatches
from jaxlm.kernels.attention import ANYWHERE, FLASH, attention
from jaxlm.models.layers import (
    MLP,
    Embed,
    Head,
    Linear,
    back,
    embedding_dropout,
    into,
    norm,
    parameter,
    rotary,
    rotate,
)
from jaxlm.models.moe import MoE
from jaxlm.models.ngram_hash import runs
from jaxlm.parallel.context_parallel import sharded_attention
from jaxlm.parallel.mesh import batch_shards, constrain, current_mesh, even_mesh
from jaxlm.parallel.pipeline_parallel import pipeline

_policies = jax.checkpoint_policies
REMAT = {  # model.remat -> what the forward pass keeps for the backward pass; what was gathered, never
    "none": lambda primitive, *_, **__: primitive is not jax.lax.all_gather_p,
    "full": _policies.nothing_saveable,
    "dots": _policies.save_only_these_names("product"),
    "attention": _policies.save_only_these_names("attention"),
}


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


class Context(NamedTuple):
    """What every layer is told besides its input."""

    segments_BT: jax.Array | None
    segments_BS: jax.Array | None  # of the keys: those of the queries, or the cache's
    rotary: tuple[jax.Array, jax.Array] | None
    places_T: (
        jax.Array | None
    )  # in the sequence, where that is not 0, 1, ...; [B, T]: the last that each query sees
    places_S: jax.Array | None  # of the keys, in the same order
    index: jax.Array | None  # where the cache is written
    memory_BSD: jax.Array | None = None  # the encoder's output, where it is not in the cache
    enc_segments_BS: jax.Array | None = None


def init_cache(config: FrozenConfigDict, batch: int, length: int, enc_length: int = 0) -> Cache:
    """An empty cache for `length` positions. config: the resolved `model` section. enc_length: of an encoder's."""
    blocks = len(config.layers) if config.scan else config.num_layers
    lead = (config.num_layers // blocks,) if config.scan else ()

    def zeros(size):
        return jnp.zeros((*lead, batch, size, config.num_kv_heads, config.head_dim), config.dtype)

    if enc_length:
        lengths = (length, length, enc_length, enc_length)
    else:
        lengths = (length, length)

    def integers(size):
        return jnp.zeros((batch, size), jnp.int32)

    return Cache(
        tuple(tuple(map(zeros, lengths)) for _ in range(blocks)), integers(length), jnp.zeros((), jnp.int32),
        integers(enc_length) if enc_length else None, integers(length) if config.embed_ngrams > 1 else None,
    )  # fmt: skip


def take_rows(config: FrozenConfigDict, cache: Cache, rows_B: jax.Array) -> Cache:
    """The cache of these rows of the batch, for beam search."""
    blocks = jax.tree.map(lambda x: jnp.take(x, rows_B, axis=1 if config.scan else 0), cache.blocks)
    whole = cache.segments_BS, cache.enc_segments_BS, cache.tokens_BS
    segments_BS, *others = (None if x is None else jnp.take(x, rows_B, axis=0) for x in whole)
    return Cache(blocks, segments_BS, cache.index, *others)


class Attention(nn.Module):
    config: FrozenConfigDict
    window: int  # tokens that a query sees, itself included
    causal: bool
    cross: bool = False  # queries look at the encoder's output

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache):
        c = self.config
        D = c.embed_dim
        N = c.num_heads
        K = c.num_kv_heads
        H = c.head_dim
        query = Linear(c, (D, N, H), ("embed", "heads", "head_dim"), name="query")()
        keys = []
        for name in ("key", "value"):
            keys.append(Linear(c, (D, K, H), ("embed", "kv_heads", "head_dim"), name=name)())
        if not self.cross:
            q_BTNH, k_BSKH, v_BSKH = into(x_BTD, query, *keys)
        elif context.memory_BSD is not None:
            (q_BTNH,), (k_BSKH, v_BSKH) = into(x_BTD, query), into(context.memory_BSD, *keys)
        else:
            (q_BTNH,), (k_BSKH, v_BSKH) = into(x_BTD, query), cache
        if c.qk_norm:
            q_BTNH = norm(c, "query_norm")(q_BTNH)
            key_norm = norm(c, "key_norm")
            if self.cross and context.memory_BSD is None:
                k_BSKH = k_BSKH
            else:
                k_BSKH = key_norm(k_BSKH)
        options = {
            "window": self.window,
            "softcap": c.attention_softcap,
            "implementation": c.attention,
        }
        segments_BS = context.segments_BS
        places_T = context.places_T
        places_S = context.places_S
        if self.cross:
            segments_BS = context.enc_segments_BS
            places_T = None
            places_S = None
            cache = None if cache is None else (k_BSKH, v_BSKH)
        else:
            if context.rotary:
                q_BTNH = rotate(q_BTNH, context.rotary)
                k_BSKH = rotate(k_BSKH, context.rotary)
            if cache is not None:

                def write(old, new):
                    return jax.lax.dynamic_update_slice_in_dim(old, new, context.index, axis=1)

                k_BSKH, v_BSKH = cache = write(cache[0], k_BSKH), write(cache[1], v_BSKH)
        options |= {"causal": self.causal and not self.cross}
        if cache is not None:
            y_BTNH = attention(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                context.segments_BT,
                segments_BS,
                places_T=places_T,
                **options,
            )
        else:
            y_BTNH = sharded_attention(
                q_BTNH, k_BSKH, v_BSKH, context.segments_BT, segments_BS, places_T, places_S, attend=attention,
                flash=FLASH, anywhere=ANYWHERE,
                context_parallel="all_gather" if self.cross else c.context_parallel, **options,
            )  # fmt: skip
        out = Linear(
            c,
            (N, H, D),
            ("heads", "head_dim", "embed"),
            inputs=2,
            scale=(2 * c.num_layers) ** -0.5,
            name="out",
        )
        return back(y_BTNH, out()), cache


class Block(nn.Module):
    config: FrozenConfigDict
    kind: str  # S or L, a letter of config.layers
    train: bool
    causal: bool
    cross: bool  # attends to an encoder's output too

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache):
        c = self.config
        drop = nn.Dropout(c.dropout, deterministic=not self.train)
        if self.kind == "S":
            window = min(c.window, c.context_length)
        else:
            window = c.context_length
        caches = [None, None] if cache is None else [cache[:2], cache[2:]]

        def residual(x_BTD, name, function):
            """x + function(norm(x)), or norm(x + function(x)) as in 2017."""
            before = c.norm_place == "pre"
            y_BTD = function(norm(c, name)(x_BTD) if before else x_BTD)
            x_BTD = constrain(x_BTD + drop(y_BTD), "batch", "residual", None)
            if before:
                return x_BTD
            return norm(c, name)(x_BTD)

        def attend(y_BTD, i, **options):
            y_BTD, caches[i] = Attention(c, window, self.causal, **options)(
                y_BTD, context, caches[i]
            )
            return y_BTD

        def mlp(y_BTD):
            if not c.num_experts:
                return MLP(c, c.mlp_dim, name="mlp")(y_BTD)
            y_BTD, routing = MoE(c, self.train, name="mlp")(
                y_BTD, context.segments_BT, context.places_S
            )
            self.sow("aux", "routing", routing, init_fn=dict, reduce_fn=lambda _, new: new)
            return y_BTD

        x_BTD = residual(x_BTD, "attention_norm", partial(attend, i=0, name="attention"))
        if self.cross:
            x_BTD = residual(
                x_BTD,
                "cross_attention_norm",
                partial(attend, i=1, cross=True, name="cross_attention"),
            )
        x_BTD = residual(x_BTD, "mlp_norm", mlp)
        return x_BTD, None if cache is None else (*caches[0], *(caches[1] or ()))


class Pattern(nn.Module):
    """One round of config.layers: the body of the scan over layers."""

    config: FrozenConfigDict
    kinds: str
    train: bool
    causal: bool
    cross: bool

    @nn.compact
    def __call__(self, x_BTD, context: Context, caches):
        remat = self.config.remat
        if remat == "none" and current_mesh() is None:
            block = Block
        else:
            block = nn.remat(Block, policy=REMAT[remat], prevent_cse=not self.config.scan)
        new = []
        for i, kind in enumerate(self.kinds):
            cache = None if caches is None else caches[i]
            layer = block(self.config, kind, self.train, self.causal, self.cross, name=f"block_{i}")
            x_BTD, cache = layer(x_BTD, context, cache)
            new.append(cache)
        return x_BTD, None if caches is None else tuple(new)


class Transformer(nn.Module):
    """Tokens -> final hidden states; `unembedding(params)` and cross-entropy or logits follow outside.

    config: the resolved `model` section. Causal: a decoder; with positions rope or none, no token looks further back
    than `context_length`, in training and in generation of any length. Not causal: an encoder, whose tokens see their
    whole document. Mixture-of-experts layers leave what the loss needs of them in the collection `aux`.
    """

    config: FrozenConfigDict
    causal: bool = True

    def init_cache(self, batch: int, length: int) -> Cache:
        return init_cache(self.config, batch, length)

    def take_rows(self, cache: Cache, rows_B) -> Cache:
        return take_rows(self.config, cache, rows_B)

    @nn.compact
    def __call__(
        self, tokens_BT, segments_BT=None, positions_BT=None, *, cache: Cache | None = None, places_T=None,
        reach_BT=None, train=False,
    ):  # fmt: skip
        """(x [B, T, D], the cache with these tokens added). segments: None where every row is one document.

        places: int32 [T], of the tokens in their rows where they are in another order than 0, 1, ... (zig-zag).
        reach: int32 [B, T], the last place that each token sees where that is later than its own (a prefix).
        """
        c = self.config
        B, T = tokens_BT.shape
        segments_BS = segments_BT
        tokens_BS = tokens_BT
        index = None
        if cache is not None:
            if segments_BT is None:
                segments_BT = jnp.ones((B, T), jnp.int32)
            else:
                segments_BT = segments_BT
            index = cache.index
            places_T = cache.index + jnp.arange(T)
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=1)
            segments_BS = write(cache.segments_BS, segments_BT)
            if cache.tokens_BS is None:
                tokens_BS = None
            else:
                tokens_BS = write(cache.tokens_BS, tokens_BT)
        here_T = jnp.arange(T) if places_T is None else places_T
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(here_T, (B, T))

        zigzag = cache is None and places_T is not None
        if c.embed_ngrams > 1:
            ngrams = runs(c, tokens_BS, segments_BS, here_T, zigzag)
        else:
            ngrams = None
        x_BTD = Embed(c, name="embed")(tokens_BT, positions_BT, ngrams)
        x_BTD = embedding_dropout(c, train)(x_BTD)
        mesh = even_mesh(B, T)
        caches = None if cache is None else cache.blocks
        if (
            mesh is not None
            and mesh.shape["stage"] > 1
            and cache is None
            and not self.is_initializing()
        ):
            x_BTD = self.staged(x_BTD, (segments_BT, positions_BT, reach_BT), places_T, train, mesh)
        else:
            context = self_context(
                c, segments_BT, segments_BS, positions_BT, reach_BT, places_T, index
            )
            x_BTD, caches = stack(c, train, causal=self.causal, name="layers")(
                x_BTD, context, caches
            )
        if c.norm_place == "pre":
            x_BTD = norm(c, "final_norm")(x_BTD)
        heads(self, c)
        if cache is not None:
            cache = Cache(caches, segments_BS, index + T, tokens_BS=tokens_BS)
        return x_BTD, cache

    def staged(self, x_BTD, rows, places_T, train: bool, mesh) -> jax.Array:
        """The layers as stages of a pipeline, of the same parameters as `stack` without one.

        rows: (segments, positions, reach), each [B, T] or None.
        """
        c = self.config
        stages = mesh.shape["stage"]
        key = self.make_rng("dropout") if train and c.dropout else None
        microbatches = pipeline_microbatches(c, x_BTD.shape[0] // batch_shards(mesh), stages)

        def apply(layers, x_BTD, rows, number):
            segments_BT, positions_BT, reach_BT = rows
            context = self_context(
                c, segments_BT, segments_BT, positions_BT, reach_BT, places_T, None
            )
            if key is None:
                rngs = None
            else:
                rngs = {"dropout": jax.random.fold_in(key, number)}
            length = jax.tree.leaves(layers)[0].shape[0]
            (x_BTD, _), made = stack(c, train, length, causal=self.causal, parent=None).apply(
                {"params": layers}, x_BTD, context, None, rngs=rngs, mutable=["aux"]
            )
            return x_BTD, dict(made)

        x_BTD, made = pipeline(
            apply, self.variables["params"]["layers"], x_BTD, rows, stages=stages,
            microbatches=microbatches, rounds=c.pipeline_rounds,
        )  # fmt: skip
        if self.is_mutable_collection("aux") and made:
            self.put_variable(
                "aux", "layers", jax.tree_util.tree_map_with_path(of_all_layers, made["aux"])
            )
        return x_BTD


def self_context(
    config, segments_BT, segments_BS, positions_BT, reach_BT, places_T, index
) -> Context:
    """The context of layers whose queries see the tokens of their own row."""
    if config.positions == "rope":
        rope = rotary(positions_BT, config.head_dim, config.rope_theta)
    else:
        rope = None
    last = places_T
    if reach_BT is not None:
        last = jnp.maximum(
            reach_BT, jnp.arange(reach_BT.shape[1]) if places_T is None else places_T
        )
    return Context(segments_BT, segments_BS, rope, last, places_T, index)


def heads(module: nn.Module, c: FrozenConfigDict) -> None:
    """The parameters of a model's outputs, which the losses apply: `unembed` where it is not tied, `head` of labels."""
    if not c.tie_embeddings:
        init = nn.initializers.normal(c.embed_dim**-0.5)
        parameter(module, "unembed", init, ("vocab", "embed"), (c.vocab_size, c.embed_dim), c)
    if c.num_labels:
        Head(c, name="head")()


def of_all_layers(path, leaf):
    """What pipeline calls returned, [rounds, stages, microbatches, layers, ...], as without one: [R, ...].

    Per row ([..., B / microbatches], a name in _B) the rows are put back in order; else microbatches are summed.
    """
    if path[-1].key.endswith("_B"):
        leaf = jnp.moveaxis(leaf, 2, -1)
        return leaf.reshape(math.prod(leaf.shape[:3]), -1)
    leaf = leaf.sum(axis=2)
    return leaf.reshape(-1, *leaf.shape[3:])


def stack(
    config: FrozenConfigDict,
    train: bool,
    length: int | None = None,
    *,
    causal=True,
    cross=False,
    **place,
) -> nn.Module:
    """All layers (there may be none), or `length` rounds of their pattern; one compiled round where config.scan.

    place: name or parent.
    """
    if not (config.scan and config.num_layers):
        kinds = (config.layers * config.num_layers)[: config.num_layers]
        return Pattern(config, kinds, train, causal, cross, **place)
    scanned = nn.scan(
        Pattern,
        variable_axes={"params": 0, "aux": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),
        length=length or config.num_layers // len(config.layers),
        unroll=config.scan_unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, config.layers, train, causal, cross, **place)


def unembedding(params) -> jax.Array:
    """[V, D]: the output table, the input's where they are tied."""
    return params.get("unembed", params["embed"]["tokens"])
