"""Models: pure functions of parameters and a batch. `build(config)` gives the linen module that a config names.

Dimension letters in names and einsums, everywhere:
B batch, T positions (queries), S positions (keys), D embed, N query heads, K key-value heads, G = N / K, H head,
F MLP, V vocabulary, L layers.
"""

from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.models.transformer import Decoder

MODELS = {"decoder": Decoder}


def build(config: ConfigDict) -> nn.Module:
    """The model of a resolved config (jaxlm.config.resolve)."""
    return MODELS[config.model.name](FrozenConfigDict(config.model))
