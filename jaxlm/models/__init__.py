"""Models: pure functions of parameters and a batch. `build(config)` gives the linen module that a config names.

Dimension letters in names and einsums, everywhere:
B batch, T positions (queries), S positions (keys), D embed, N query heads, K key-value heads, G = N / K, H head,
F MLP, V vocabulary, L layers.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.kernels.cross_entropy import Mix, cross_entropy, logits_of, weighted
from jaxlm.models import ngram
from jaxlm.models.bag import Bag
from jaxlm.models.encoder_decoder import EncoderDecoder
from jaxlm.models.lstm import LSTM, BiLSTM, LSTMSeq2Seq
from jaxlm.models.transformer import Transformer, unembedding
from jaxlm.models.vectors import Vectors

MODELS = {
    "decoder": Transformer,
    "encoder": partial(Transformer, causal=False),
    "encoder_decoder": EncoderDecoder,
    "lstm": LSTM,
    "bilstm": BiLSTM,
    "lstm_seq2seq": LSTMSeq2Seq,
    "ngram": ngram.NGram,
    "bag": Bag,
    "vectors": Vectors,
}
# How those of config.keys.COUNTED get their parameters: (documents, order, vocab_size, bos_id, discount) -> params.
FITS = {"ngram": ngram.fit}


def build(config: ConfigDict) -> nn.Module:
    """The model of a resolved config (jaxlm.config.recipe.resolve)."""
    return build_section(config.model)


def build_section(section: ConfigDict) -> nn.Module:
    """The model of a resolved `model` section."""
    return MODELS[section.name](FrozenConfigDict(section))


def fit(config: ConfigDict, documents: Iterable[np.ndarray], bos_id: int | None) -> dict:
    """The parameters of a model that is counted, not trained; fills in config.model.ngrams, their sizes.

    config: resolved, its model one of config.keys.COUNTED. documents: int [length] each, bos in front where there is a
    bos_id. Raises DataError where they don't suit the model.
    """
    m = config.model
    params = FITS[m.name](documents, m.order, m.vocab_size, bos_id, m.discount)
    m.ngrams = ngram.sizes(params)
    return params


# ---------------------------------------------------------------- what a model predicts


def is_counted(model: nn.Module) -> bool:
    """Whether it predicts by tables of probabilities, not by hidden states and an output table."""
    return isinstance(model, ngram.NGram)


def next_logits(model: nn.Module, params, x) -> jax.Array:
    """float32 [B, T, V]: logits of the next token, of what the model returned, [B, T, ...]."""
    if is_counted(model):
        return ngram.log_probs(params, x)
    return logits_of(x, unembedding(params), model.config.logit_softcap)


def nats_of(model: nn.Module, params, x, targets_BT, chunk: int = 0) -> tuple[jax.Array, jax.Array]:
    """(nats of each target, log of the softmax's denominator), float32 [B, T]; the logits are not kept.

    x: what the model returned, [B, T, ...]. chunk: as in cross_entropy.
    """
    if is_counted(model):
        return -ngram.log_probs_of(params, x, targets_BT), targets_BT * 0.0
    softcap = model.config.logit_softcap
    return cross_entropy(x, unembedding(params), targets_BT, softcap=softcap, chunk=chunk)


def weighted_nats_of(model: nn.Module, params, x, targets_BT, weights_BT, mix: Mix, chunk: int = 0):
    """(float32 sum over tokens of weight x mix; what `nats_of` gives, which passes no gradient on)."""
    if is_counted(model):
        nats_BT, log_z_BT = nats_of(model, params, x, targets_BT)
        return jnp.sum(weights_BT * nats_BT), nats_BT, log_z_BT
    table = unembedding(params)
    softcap = model.config.logit_softcap
    return weighted(x, table, targets_BT, weights_BT, mix, softcap=softcap, chunk=chunk)
