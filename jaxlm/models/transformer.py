"""The Transformer (Vaswani et al. 2017), decoder or encoder, for training and for generation with a key-value cache."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.config.recipe import pipeline_microbatches
from jaxlm.models.attention import (
    Attention,
    Cache,
    Context,
    init_cache,
    places_or_order,
    self_context,
    take_rows,
    write_tokens,
)
from jaxlm.models.layers import (
    MLP,
    Embed,
    embedding_dropout,
    final_norm,
    output_parameters,
    residual,
)
from jaxlm.models.moe import MoE
from jaxlm.models.ngram_hash import hashed_ngrams
from jaxlm.parallel.mesh import batch_shards, current_mesh, even_mesh
from jaxlm.parallel.pipeline_parallel import pipeline


def all_but_gathered(primitive, *_, **__) -> bool:
    return primitive is not jax.lax.all_gather_p


_policies = jax.checkpoint_policies
REMAT = {  # model.remat -> what the forward pass keeps for the backward pass; never what was gathered
    "none": all_but_gathered,
    "full": _policies.nothing_saveable,
    "dots": _policies.save_only_these_names("product"),
    "attention": _policies.save_only_these_names("attention"),
}


class Block(nn.Module):
    """x [B, T, D] -> (x, the cache of this block): attention, attention to an encoder where `cross`, and an MLP.

    kind: S or L, a letter of config.layers.
    """

    config: FrozenConfigDict
    kind: str
    train: bool
    causal: bool
    cross: bool

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache):
        c = self.config
        self_cache = None
        cross_cache = None
        if cache is not None:
            self_cache = cache[:2]
            cross_cache = cache[2:]
        window = c.context_length
        if self.kind == "S":
            window = min(c.window, c.context_length)
        drop = nn.Dropout(c.dropout, deterministic=not self.train)
        add = partial(residual, drop=drop)

        def attend(y_BTD):
            layer = Attention(c, window, self.causal, name="attention")
            return layer(y_BTD, context, self_cache)

        def cross_attend(y_BTD):
            layer = Attention(c, window, self.causal, cross=True, name="cross_attention")
            return layer(y_BTD, context, cross_cache)

        x_BTD, self_cache = add(c, "attention_norm", attend, x_BTD)
        if self.cross:
            x_BTD, cross_cache = add(c, "cross_attention_norm", cross_attend, x_BTD)
        x_BTD, _ = add(c, "mlp_norm", partial(self.feed_forward, context), x_BTD)
        if cache is None:
            return x_BTD, None
        return x_BTD, (*self_cache, *cross_cache)

    def feed_forward(self, context: Context, y_BTD):
        """(y [B, T, D], None)."""
        c = self.config
        if not c.num_experts:
            return MLP(c, c.mlp_dim, name="mlp")(y_BTD), None
        experts = MoE(c, self.train, name="mlp")
        y_BTD, routing = experts(y_BTD, context.segments_BT, context.places_S)
        self.sow("aux", "routing", routing, init_fn=dict, reduce_fn=lambda _, new: new)
        return y_BTD, None


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
        block = Block
        if remat != "none" or current_mesh() is not None:
            block = nn.remat(Block, policy=REMAT[remat], prevent_cse=not self.config.scan)
        new = []
        for i, kind in enumerate(self.kinds):
            cache = None
            if caches is not None:
                cache = caches[i]
            layer = block(
                self.config,
                kind,
                self.train,
                self.causal,
                self.cross,
                name=f"block_{i}",
            )
            x_BTD, cache = layer(x_BTD, context, cache)
            new.append(cache)
        if caches is None:
            return x_BTD, None
        return x_BTD, tuple(new)


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
        """(x [B, T, D], the cache with these tokens added). tokens, segments, positions: int32 [B, T].

        segments: None where every row is one document. places: int32 [T], of the tokens in their rows where they are in
        another order than 0, 1, ... (zig-zag). reach: int32 [B, T], the last place that each token sees where that is
        later than its own (a prefix).
        """
        c = self.config
        B, T = tokens_BT.shape
        zigzag = cache is None and places_T is not None
        segments_BS = segments_BT
        tokens_BS = tokens_BT
        index = None
        blocks = None
        if cache is not None:
            if segments_BT is None:
                segments_BT = jnp.ones((B, T), jnp.int32)
            index = cache.index
            places_T = index + jnp.arange(T)
            cache = write_tokens(cache, tokens_BT, segments_BT)
            segments_BS = cache.segments_BS
            tokens_BS = cache.tokens_BS
            blocks = cache.blocks
        here_T = places_or_order(places_T, T)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(here_T, (B, T))
        ngrams = None
        if c.embed_ngrams > 1:
            ngrams = hashed_ngrams(c, tokens_BS, segments_BS, here_T, zigzag)
        x_BTD = Embed(c, name="embed")(tokens_BT, positions_BT, ngrams)
        x_BTD = embedding_dropout(c, train)(x_BTD)
        mesh = even_mesh(B, T)
        stages = 1 if mesh is None else mesh.shape["stage"]
        if stages > 1 and cache is None and not self.is_initializing():
            x_BTD = self.staged(x_BTD, (segments_BT, positions_BT, reach_BT), places_T, train, mesh)
        else:
            context = self_context(
                c, segments_BT, segments_BS, positions_BT, reach_BT, places_T, index
            )
            layers = stack(c, train, causal=self.causal, name="layers")
            x_BTD, blocks = layers(x_BTD, context, blocks)
        x_BTD = final_norm(c, x_BTD)
        output_parameters(self, c)
        if cache is not None:
            cache = cache._replace(blocks=blocks, index=index + T)
        return x_BTD, cache

    def staged(self, x_BTD, rows, places_T, train: bool, mesh) -> jax.Array:
        """The layers as stages of a pipeline, of the same parameters as `stack` without one.

        rows: (segments, positions, reach), each [B, T] or None.
        """
        c = self.config
        stages = mesh.shape["stage"]
        microbatches = pipeline_microbatches(c, x_BTD.shape[0] // batch_shards(mesh), stages)
        key = None
        if train and c.dropout:
            key = self.make_rng("dropout")

        def apply(layers, x_BTD, rows, number):
            segments_BT, positions_BT, reach_BT = rows
            context = self_context(
                c, segments_BT, segments_BT, positions_BT, reach_BT, places_T, None
            )
            rngs = None
            if key is not None:
                rngs = {"dropout": jax.random.fold_in(key, number)}
            length = jax.tree.leaves(layers)[0].shape[0]
            module = stack(c, train, length, causal=self.causal, parent=None)
            (x_BTD, _), made = module.apply(
                {"params": layers}, x_BTD, context, None, rngs=rngs, mutable=["aux"]
            )
            return x_BTD, dict(made)

        x_BTD, made = pipeline(
            apply, self.variables["params"]["layers"], x_BTD, rows, stages=stages,
            microbatches=microbatches, rounds=c.pipeline_rounds,
        )  # fmt: skip
        if self.is_mutable_collection("aux") and made:
            aux = jax.tree_util.tree_map_with_path(of_all_layers, made["aux"])
            self.put_variable("aux", "layers", aux)
        return x_BTD


def of_all_layers(path, leaf):
    """What pipeline calls returned, [rounds, stages, microbatches, layers, ...], as without a pipeline: [R, ...].

    Per row ([..., B / microbatches], a name in _B) the rows are put back in order; else microbatches are summed.
    """
    if path[-1].key.endswith("_B"):
        leaf = jnp.moveaxis(leaf, 2, -1)
        return leaf.reshape(math.prod(leaf.shape[:3]), -1)
    leaf = leaf.sum(axis=2)
    return leaf.reshape(-1, *leaf.shape[3:])


def unembedding(params) -> jax.Array:
    """[V, D]: the output table, the input's where they are tied."""
    return params.get("unembed", params["embed"]["tokens"])
