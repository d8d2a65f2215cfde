"""Two vectors for each word, one of itself and one of it as a context, and no layers: word2vec and GloVe.

The score of a pair is the product of the first's own vector and the second's as a context (Mikolov et al. 2013), with
model.bias plus a number of each (Pennington et al. 2014). The losses compute it from what `Vectors` returns.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.models.layers import embedding_dropout, parameter
from jaxlm.models.transformer import unembedding
from jaxlm.parallel.linear import lookup
from jaxlm.parallel.mesh import constrain

AXES = ("vocab", "embed")


def word_table(module: nn.Module, config: FrozenConfigDict, table: str, bias: str) -> jax.Array:
    """[V, D]: the parameter named `table`; with model.bias `bias`, [V], is made too."""
    init = nn.initializers.normal(config.embed_std)
    shape = (config.vocab_size, config.embed_dim)
    table_VD = parameter(module, table, init, AXES, shape, config)
    if config.bias:
        zeros = nn.initializers.zeros
        parameter(module, bias, zeros, AXES[:1], shape[:1], config)
    return table_VD


class Words(nn.Module):
    """Tokens [B, T] -> their own vectors [B, T, D]."""

    config: FrozenConfigDict

    @nn.compact
    def __call__(self, tokens_BT):
        table_VD = word_table(self, self.config, "tokens", "bias")
        return constrain(lookup(table_VD, tokens_BT, AXES), "batch", "residual", None)


class Vectors(nn.Module):
    """As jaxlm.models.transformer.Transformer, without a cache. config: the resolved `model` section."""

    config: FrozenConfigDict

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
        """(x [B, T, D], None)."""
        x_BTD = Words(self.config, name="embed")(tokens_BT)
        word_table(self, self.config, "unembed", "unembed_bias")
        return embedding_dropout(self.config, train)(x_BTD), None


def pair_scores(params, x_BTD, tokens_BT, contexts_BTN) -> jax.Array:
    """float32 [B, T, N]: the score of each token, whose vector is x, with each of its N contexts."""
    B, T, N = contexts_BTN.shape
    flat = contexts_BTN.reshape(B, T * N)
    y_BTND = lookup(unembedding(params), flat, AXES).reshape(B, T, N, -1)
    x_BTD = x_BTD.astype(jnp.float32)
    scores_BTN = jnp.einsum("BTD,BTND->BTN", x_BTD, y_BTND.astype(jnp.float32))
    if "unembed_bias" not in params:
        return scores_BTN
    own_BT1 = look_up_bias(params["embed"]["bias"], tokens_BT)
    context_BTN = look_up_bias(params["unembed_bias"], flat).reshape(B, T, N)
    return scores_BTN + own_BT1 + context_BTN


def look_up_bias(table_V, ids_BT) -> jax.Array:
    """float32 [B, T, 1]."""
    return lookup(table_V[:, None].astype(jnp.float32), ids_BT, ("vocab", None))


def word_vectors(params) -> jax.Array:
    """[V, D]: of each word, its vector; of a model with biases (GloVe) the sum of both, as published."""
    own_VD = params["embed"]["tokens"]
    if "unembed_bias" in params:
        return own_VD + params["unembed"]
    return own_VD
