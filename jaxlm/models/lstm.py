"""LSTMs: a language model, a bidirectional encoder, and an encoder-decoder with attention.

Here H is the width of the state, G the four gates, S the encoder's positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.kernels.attention import NEVER
from jaxlm.kernels.lstm import Steps, recur
from jaxlm.models.layers import (
    Embed,
    Linear,
    Weights,
    embedding_dropout,
    output_parameters,
    parameter,
    project_in,
    project_out,
)
from jaxlm.parallel.mesh import constrain


class Cache(NamedTuple):
    """The state after the positions seen so far, and the source of an encoder-decoder (else S = 0).

    h, c: [L, B, H]. segments_B: int32, of the last position, 0 at first. keys: the encoder's output.
    """

    h: jax.Array
    c: jax.Array
    segments_B: jax.Array
    keys_BSD: jax.Array
    segments_BS: jax.Array


def borders_of(segments_BT, positions_BT, cache: Cache | None = None):
    """(left, right), float32 [B, T]: 0 where the position to that side is not of the same document, else 1.

    (None, None) where both inputs are None: every row is one document. Nothing goes into or out of padding, segment 0.
    """
    if segments_BT is None and positions_BT is None:
        return None, None
    same_BT = True
    if segments_BT is not None:
        last_B = 0
        if cache is not None:
            last_B = cache.segments_B
        before_BT = jnp.roll(segments_BT, 1, axis=1).at[:, 0].set(last_B)
        same_BT = (segments_BT != 0) & (segments_BT == before_BT)
    if positions_BT is not None:
        same_BT &= positions_BT != 0
    left_BT = same_BT.astype(jnp.float32)
    return left_BT, jnp.pad(left_BT[:, 1:], ((0, 0), (0, 1)))


def forget_one(key, shape, dtype):
    """Biases 0, of the forget gate 1 (Gers et al. 2000, Jozefowicz et al. 2015)."""
    return jnp.zeros(shape, dtype).at[1].set(1)


class Direction(nn.Module):
    """One LSTM over the positions, H = width."""

    config: FrozenConfigDict
    width: int
    train: bool
    reverse: bool = False

    @nn.compact
    def __call__(self, x_BTD, keep_BT, start_BTH=None, state=None):
        """(h [B, T, H], the last (h, c)).

        keep: float32 [B, T], 0 where a document begins, or None. start: c at the beginning of the document that a
        position is of; None: 0. state: (h, c) before the first position; None: 0.
        """
        c = self.config
        B, _, D = x_BTD.shape
        H = self.width
        axes = ("embed", None, "mlp")
        normal = nn.initializers.normal
        kernel_DGH = parameter(self, "input_kernel", normal(D**-0.5), axes, (D, 4, H), c)
        kernel_HGH = parameter(self, "recurrent_kernel", normal(H**-0.5), axes, (H, 4, H), c)
        bias_GH = parameter(self, "bias", forget_one, axes[1:], (4, H), c)
        (x_BTGH,) = project_in(
            x_BTD, Weights(kernel_DGH, bias_GH, axes)
        )  # of all positions at once
        x_TBGH = constrain(x_BTGH.swapaxes(0, 1), None, "batch", None, "mlp")
        kernel_HGH = constrain(kernel_HGH, None, None, "mlp")  # gathered once, not at each step

        keep_TB1 = None
        if keep_BT is not None:
            keep_TB1 = keep_BT.T[..., None]
        start = None
        if start_BTH is not None:
            start_TBH = (1 - keep_TB1) * start_BTH.swapaxes(0, 1)
            start = (jnp.tanh(start_TBH).astype(c.dtype), start_TBH)
        mask_BH = None
        if self.train and c.recurrent_dropout:
            drop = nn.Dropout(c.recurrent_dropout, deterministic=False)
            mask_BH = drop(jnp.ones((B, H), c.dtype))
        if state is None:
            state = (jnp.zeros((B, H), c.dtype), jnp.zeros((B, H)))
        h_BH, c_BH = state
        steps = Steps(x_TBGH, keep_TB1, start)
        h_TBH, *state = recur(self.reverse, kernel_HGH, steps, mask_BH, h_BH, c_BH)
        return constrain(h_TBH.swapaxes(0, 1), "batch", None, None), state


class Layers(nn.Module):
    """Stacked LSTMs, H wide, and a map from H to D where they differ. both: each half of H reads from its own side.

    Dropout is variational (Gal & Ghahramani 2016): one mask for all positions of a row.
    """

    config: FrozenConfigDict
    num_layers: int
    train: bool
    both: bool = False

    @nn.compact
    def __call__(self, x_BTD, borders, start_BTLH=None, cache: Cache | None = None):
        """(y [B, T, D], the last states: [h, c], each [L, B, H]; [] of both).

        borders: of `borders_of`. start: float32 [B, T, L, H], as in Direction.
        """
        c = self.config
        states = []
        drop = nn.Dropout(c.dropout, broadcast_dims=(1,), deterministic=not self.train)
        y = embedding_dropout(c, self.train, broadcast_dims=(1,))(x_BTD)
        for i in range(self.num_layers):
            if self.both:
                y = self.from_both_sides(y, borders, i)
            else:
                start_BTH = None
                if start_BTLH is not None:
                    start_BTH = start_BTLH[:, :, i]
                state = None
                if cache is not None:
                    state = (cache.h[i], cache.c[i])
                layer = Direction(c, c.hidden_dim, self.train, name=f"left_{i}")
                y, state = layer(y, borders[0], start_BTH, state)
                states.append(state)
            y = drop(y)
        if c.hidden_dim != c.embed_dim:
            out = Linear(c, (c.hidden_dim, c.embed_dim), ("mlp", "embed"), name="out")
            y = project_out(y, out())
        return constrain(y, "batch", "residual", None), [jnp.stack(x) for x in zip(*states)]

    def from_both_sides(self, y, borders, i: int) -> jax.Array:
        c = self.config
        half = c.hidden_dim // 2
        left_BT, right_BT = borders
        from_left = Direction(c, half, self.train, name=f"left_{i}")
        from_right = Direction(c, half, self.train, reverse=True, name=f"right_{i}")
        left, _ = from_left(y, left_BT)
        right, _ = from_right(y, right_BT)
        return jnp.concatenate([left, right], axis=-1)


# ---------------------------------------------------------------- attention to a source


def square(c: FrozenConfigDict, name: str, x_BTD) -> jax.Array:
    """[B, T, D], by a square kernel of this name."""
    weights = Linear(c, (c.embed_dim, c.embed_dim), ("embed", "mlp"), name=name)()
    (y_BTD,) = project_in(x_BTD, weights)
    return y_BTD


def dot(c: FrozenConfigDict, q_BTD, k_BSD):
    return jnp.einsum("BTD,BSD->BTS", q_BTD, k_BSD, preferred_element_type=jnp.float32)


def bilinear(c: FrozenConfigDict, q_BTD, k_BSD):
    """q W k: "general" of Luong et al. 2015."""
    return dot(c, square(c, "query", q_BTD), k_BSD)


def additive(c: FrozenConfigDict, q_BTD, k_BSD):
    """v tanh(W q + U k) (Bahdanau et al. 2015), a position of T at a time: [B, T, S, D] would be large."""
    q_BTD = square(c, "query", q_BTD)
    k_BSD = square(c, "key", k_BSD)
    v_D1 = Linear(c, (c.embed_dim, 1), ("mlp", None), name="score")().kernel

    @jax.checkpoint
    def of_position(q_BD):
        hidden_BSD = jnp.tanh(q_BD[:, None] + k_BSD)
        return (hidden_BSD @ v_D1)[..., 0]

    return jax.lax.map(of_position, q_BTD.swapaxes(0, 1)).swapaxes(0, 1)


SCORES = {  # model.cross_attention
    "dot": dot,
    "bilinear": bilinear,
    "additive": additive,
}


class Attention(nn.Module):
    """tanh(W [context; x]), context the keys averaged by the softmax of their scores: "global" of Luong et al. 2015."""

    config: FrozenConfigDict

    @nn.compact
    def __call__(self, x_BTD, keys_BSD, same_BTS):
        c = self.config
        q_BTD = constrain(x_BTD, "batch", None, None)
        scores_BTS = SCORES[c.cross_attention](c, q_BTD, keys_BSD).astype(jnp.float32)
        weights_BTS = jax.nn.softmax(jnp.where(same_BTS, scores_BTS, NEVER), axis=-1)
        # A document without a source has no context.
        weights_BTS = jnp.where(same_BTS, weights_BTS, 0).astype(c.dtype)
        context_BTD = jnp.einsum("BTS,BSD->BTD", weights_BTS, keys_BSD)
        out = Linear(c, (2 * c.embed_dim, c.embed_dim), ("embed", "mlp"), name="out")()
        (y_BTD,) = project_in(jnp.concatenate([context_BTD, x_BTD], axis=-1), out)
        return jnp.tanh(y_BTD)


# ---------------------------------------------------------------- the models


class Model(nn.Module):
    """What the three have in common. config: the resolved `model` section."""

    config: FrozenConfigDict

    def outputs(self, x_BTD) -> jax.Array:
        """x, once the parameters are made that losses apply to it."""
        output_parameters(self, self.config)
        return constrain(x_BTD, "batch", "residual", None)

    def init_cache(self, batch: int, length: int, enc_length: int = 0) -> Cache:
        """Empty; a state has no length. enc_length: of the source."""
        c = self.config
        state = (c.num_layers, batch, c.hidden_dim)
        return Cache(
            h=jnp.zeros(state, c.dtype),
            c=jnp.zeros(state, jnp.float32),
            segments_B=jnp.zeros(batch, jnp.int32),
            keys_BSD=jnp.zeros((batch, enc_length, c.embed_dim), c.dtype),
            segments_BS=jnp.zeros((batch, enc_length), jnp.int32),
        )

    def take_rows(self, cache: Cache, rows_B) -> Cache:
        """The cache of these rows of the batch, in their order."""
        return Cache(
            h=jnp.take(cache.h, rows_B, axis=1),
            c=jnp.take(cache.c, rows_B, axis=1),
            segments_B=jnp.take(cache.segments_B, rows_B, axis=0),
            keys_BSD=jnp.take(cache.keys_BSD, rows_B, axis=0),
            segments_BS=jnp.take(cache.segments_BS, rows_B, axis=0),
        )


class LSTM(Model):
    """Language model: tokens -> final hidden states, as jaxlm.models.transformer.Transformer.

    The state is zero where a document begins: at position 0, and where the segment changes.
    """

    both = False

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
        """(x [B, T, D], the cache after these tokens)."""
        c = self.config
        if cache is not None and segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        x_BTD = Embed(c, name="embed")(tokens_BT, positions_BT)
        borders = borders_of(segments_BT, positions_BT, cache)
        layers = Layers(c, c.num_layers, train, self.both, name="layers")
        x_BTD, states = layers(x_BTD, borders, cache=cache)
        x_BTD = self.outputs(x_BTD)
        if cache is not None:
            h_LBH, c_LBH = states
            cache = cache._replace(h=h_LBH, c=c_LBH, segments_B=segments_BT[:, -1])
        return x_BTD, cache


class BiLSTM(LSTM):
    """Encoder for classification and tagging: a token sees the whole of its document and nothing else. No cache."""

    both = True


class LSTMSeq2Seq(Model):
    """A bidirectional encoder, and a decoder that attends to it after its recurrence: of all positions at once.

    A target sees the source of its own segment. Its state begins with c, a linear map of the mean of that source's
    encoding, and h = tanh(c).
    """

    @nn.compact
    def __call__(
        self, tokens_BT, segments_BT=None, positions_BT=None, *, enc_tokens=None, enc_segments=None,
        enc_positions=None, cache=None, places_T=None, reach_BT=None, train=False,
    ):  # fmt: skip
        """(x [B, T, D], the cache after these tokens). enc_*: [B, S]; not needed once the cache has them.

        Raises ValueError without a source: neither enc_tokens nor a cache.
        """
        c = self.config
        embed = Embed(c, name="embed")
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        if enc_tokens is None and self.is_initializing():
            enc_tokens = tokens_BT
        if enc_tokens is not None:
            segments_BS = enc_segments
            if segments_BS is None:
                segments_BS = jnp.ones_like(enc_tokens)
            borders = borders_of(segments_BS, enc_positions)
            encoder = Layers(c, c.encoder_layers, train, both=True, name="encoder")
            keys_BSD, _ = encoder(embed(enc_tokens, enc_positions), borders)
            keys_BSD = constrain(keys_BSD, "batch", None, None)
        elif cache is not None:
            keys_BSD = cache.keys_BSD
            segments_BS = cache.segments_BS
        else:
            raise ValueError(
                "an encoder-decoder needs enc_tokens, or the cache of an earlier call that had them"
            )
        same_BTS = segments_BT[:, :, None] == segments_BS[:, None]
        same_BTS &= (segments_BS != 0)[:, None]
        start_BTLH = self.start_of_decoder(keys_BSD, same_BTS)
        borders = borders_of(segments_BT, positions_BT, cache)
        decoder = Layers(c, c.num_layers, train, name="decoder")
        x_BTD, states = decoder(embed(tokens_BT, positions_BT), borders, start_BTLH, cache)
        x_BTD = self.outputs(Attention(c, name="attention")(x_BTD, keys_BSD, same_BTS))
        if cache is not None:
            cache = Cache(*states, segments_BT[:, -1], keys_BSD, segments_BS)
        return x_BTD, cache

    def start_of_decoder(self, keys_BSD, same_BTS) -> jax.Array:
        """[B, T, L, H]: c where the document of each position begins."""
        c = self.config
        share_BTS = same_BTS / jnp.maximum(same_BTS.sum(axis=-1, keepdims=True), 1)
        mean_BTD = jnp.einsum("BTS,BSD->BTD", share_BTS.astype(c.dtype), keys_BSD)
        shape = (c.embed_dim, c.num_layers, c.hidden_dim)
        weights = Linear(c, shape, ("embed", None, "mlp"), name="start")()
        (start_BTLH,) = project_in(mean_BTD, weights)
        return start_BTLH
