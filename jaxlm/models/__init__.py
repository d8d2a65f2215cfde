"""Models: pure functions of parameters and a batch. `build(config)` gives the linen module that a config names.

Dimension letters in names and einsums, everywhere:
B batch, T positions (queries), S positions (keys), D embed, N query heads, K key-value heads, G = N / K, H head,
F MLP, V vocabulary, L layers.
"""

from functools import partial

from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.models.encoder_decoder import EncoderDecoder
from jaxlm.models.transformer import Transformer

MODELS = {
    "decoder": Transformer,
    "encoder": partial(Transformer, causal=False),
    "encoder_decoder": EncoderDecoder,
}


def build(config: ConfigDict) -> nn.Module:
    """The model of a resolved config (jaxlm.config.resolve)."""
    return build_section(config.model)


def build_section(section: ConfigDict) -> nn.Module:
    """The model of a resolved `model` section."""
    return MODELS[section.name](FrozenConfigDict(section))
