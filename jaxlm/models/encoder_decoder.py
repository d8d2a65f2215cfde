"""The Transformer encoder-decoder (Vaswani et al. 2017): a source is read as a whole, a target is written after it."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.models.attention import (
    Cache,
    Context,
    init_cache,
    places_or_order,
    self_context,
    take_rows,
    write_tokens,
)
from jaxlm.models.layers import (
    Embed,
    embedding_dropout,
    final_norm,
    output_parameters,
)
from jaxlm.models.transformer import stack


class Encoder(nn.Module):
    """Embedded tokens [B, S, D] -> [B, S, D]; each sees its whole segment."""

    config: FrozenConfigDict
    train: bool

    @nn.compact
    def __call__(self, x_BSD, segments_BS, positions_BS) -> jax.Array:
        c = self.config
        context = self_context(c, segments_BS, segments_BS, positions_BS, None, None, None)
        x_BSD, _ = stack(c, self.train, causal=False, name="layers")(x_BSD, context, None)
        return final_norm(c, x_BSD)


class CausalDecoder(nn.Module):
    """Embedded targets [B, T, D] -> ([B, T, D], caches), with a look at the encoder's output."""

    config: FrozenConfigDict
    train: bool

    @nn.compact
    def __call__(self, x_BTD, context: Context, caches):
        layers = stack(self.config, self.train, cross=True, name="layers")
        x_BTD, caches = layers(x_BTD, context, caches)
        return final_norm(self.config, x_BTD), caches


class EncoderDecoder(nn.Module):
    """(source, target so far) -> final hidden states of the target; `unembedding(params)` and the loss follow outside.

    config: the resolved `model` section. One vocabulary and one table for both sides. Pairs are packed: a target looks
    at the source of its own segment.
    """

    config: FrozenConfigDict

    def init_cache(self, batch: int, length: int, enc_length: int) -> Cache:
        return init_cache(self.config, batch, length, enc_length)

    def take_rows(self, cache: Cache, rows_B) -> Cache:
        return take_rows(self.config, cache, rows_B)

    @nn.compact
    def __call__(
        self, tokens_BT, segments_BT=None, positions_BT=None, *, enc_tokens=None, enc_segments=None,
        enc_positions=None, cache: Cache | None = None, places_T=None, train=False,
    ):  # fmt: skip
        """(x [B, T, D], the cache with these tokens added). enc_*: [B, S]; None where the cache has read the source.

        segments: of both sides, or None where every row is one pair.
        """
        c = self.config
        B, T = tokens_BT.shape
        embed = Embed(c, name="embed")
        drop = embedding_dropout(c, train)
        if enc_tokens is None and cache is None:  # to make the parameters
            enc_tokens = jnp.zeros((B, 1), jnp.int32)
        memory_BSD = None
        if enc_tokens is not None:
            if enc_positions is None:
                place_S = jnp.arange(enc_tokens.shape[1])
                enc_positions = jnp.broadcast_to(place_S, enc_tokens.shape)
            encoder = Encoder(of_encoder(c), train, name="encoder")
            memory_BSD = encoder(
                drop(embed(enc_tokens, enc_positions)), enc_segments, enc_positions
            )
        segments_BS = segments_BT
        index = None
        blocks = None
        if cache is not None:
            if segments_BT is None:
                segments_BT = jnp.ones((B, T), jnp.int32)
            index = cache.index
            places_T = index + jnp.arange(T)
            cache = write_tokens(cache, tokens_BT, segments_BT)
            segments_BS = cache.segments_BS
            blocks = cache.blocks
            if enc_tokens is None:
                enc_segments = cache.enc_segments_BS
            elif enc_segments is None:
                enc_segments = jnp.ones(enc_tokens.shape, jnp.int32)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(places_or_order(places_T, T), (B, T))
        context = self_context(c, segments_BT, segments_BS, positions_BT, None, places_T, index)
        context = context._replace(memory_BSD=memory_BSD, enc_segments_BS=enc_segments)
        decoder = CausalDecoder(c, train, name="decoder")
        x_BTD = drop(embed(tokens_BT, positions_BT))
        x_BTD, blocks = decoder(x_BTD, context, blocks)
        output_parameters(self, c)
        if cache is not None:
            cache = cache._replace(blocks=blocks, index=index + T, enc_segments_BS=enc_segments)
        return x_BTD, cache


def of_encoder(config: FrozenConfigDict) -> FrozenConfigDict:
    """The same model section with the encoder's number of layers."""
    config = ConfigDict(config)
    config.num_layers = config.encoder_layers
    return FrozenConfigDict(config)
