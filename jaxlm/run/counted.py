"""Parameters that are counted in the training data and not trained: n-gram models, and log-count ratios of a bag."""

from itertools import pairwise

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.data.batches import open_stores
from jaxlm.data.examples import Examples
from jaxlm.models import fit
from jaxlm.models.bag import log_count_ratios


def count_parameters(config: ConfigDict) -> dict:
    """The parameters of a model that is counted, of the training data; see jaxlm.models.fit."""
    stores = open_stores(config, "train")
    return fit(config, documents(stores), stores[0].bos_id)


def documents(stores):
    """Each document's tokens, int32, with bos in front where the tokenizer has one."""
    for store in stores:
        front = [] if store.bos_id is None else [store.bos_id]
        starts = [*store.document_starts(0, store.num_tokens), store.num_tokens]
        for start, stop in pairwise(starts):
            tokens = store.read(int(start), int(stop - start))
            yield np.concatenate([front, tokens]).astype(np.int32)


def weigh_ngrams(params: dict, config: ConfigDict) -> dict:
    """The parameters of a bag of n-grams, with the log-count ratios of the training examples (NBSVM) filled in."""
    m = config.model
    pieces = Examples(config, "train").pieces
    texts = [piece["tokens"] for piece in pieces]
    labels = np.array([piece["label"] for piece in pieces])
    ratio = log_count_ratios(texts, labels, m.num_labels, m.order, m.buckets)
    old = params["embed"]["ratio"]
    new = jax.device_put(ratio.astype(old.dtype), old.sharding)
    return params | {"embed": params["embed"] | {"ratio": new}}
