"""Sentiment of film reviews, SST-2 (Socher et al. 2013): 6,920 sentences and nothing else, from scratch.

    python -m jaxlm.train --config=configs/sst2.py --config.data.train=train.tsv --config.data.val=dev.tsv \
        --workdir=runs/sst2
    python -m jaxlm.evaluate --workdir=runs/sst2 --pictures=runs/sst2

The files have lines of a sentence, a tab and 0 or 1. On 2 CPU cores, accuracy on the 872 sentences of dev:

ngrams (the default): a linear classifier of the runs of 1 to 6 bytes (NBSVM's weights, fastText's table), seven epochs
    in 25 seconds: 81.3% (seeds 0, 1, 2: 81.4, 81.3, 81.2), AUC 0.891; in 8-fold
    cross-validation over both files 82.0%.
lstm: words, states pooled by their maximum, 2.4M parameters, three epochs in 30 seconds: 81.0% (81.2, 81.0, 80.7); in
    cross-validation 79.9%.
"""

from jaxlm.config import base, variant


def get_config(arg="ngrams"):
    c = base()
    c.task.name = "classify"
    c.data.train, c.data.val = "data/sst2/train.tsv", "data/sst2/dev.tsv"
    c.data.lowercase, c.model.dtype, c.model.scan = True, "float32", False
    c.optim.weight_decay, c.optim.b2, c.optim.schedule, c.optim.warmup_steps = (
        0.01,
        0.999,
        "constant",
        0,
    )
    c.eval.metric = "accuracy"
    return variant(arg, {"ngrams": ngrams, "lstm": lstm})(c)


def ngrams(c):
    c.data.tokenizer, c.data.seq_len, c.data.examples_per_row = "bytes", 512, 16
    c.model.name, c.model.num_layers, c.model.embed_dim, c.model.order = "bag", 0, 4, 6
    c.model.ngram_weights, c.model.buckets, c.model.pooling = "log_count_ratio", 2**20, "sum"
    c.train.steps, c.train.batch_size, c.eval.every = 320, 32, 80
    c.optim.name, c.optim.learning_rate, c.optim.momentum, c.optim.weight_decay = (
        "sgd",
        2.0,
        0.9,
        1e-4,
    )
    c.optim.schedule, c.optim.end_factor = "linear", 0.0
    c.optim.rates = ((r"^head/", 0.01), (r".*", 1.0))
    return c


def lstm(c):
    c.data.tokenizer, c.data.vocab_size, c.data.min_count = "words", 20_000, 2
    c.data.seq_len, c.data.word_dropout = 64, 0.2
    c.model.name, c.model.num_layers, c.model.embed_dim, c.model.pooling = "lstm", 1, 256, "max"
    c.model.embed_std, c.model.embed_dropout, c.model.dropout = 0.1, 0.4, 0.2
    c.train.steps, c.train.batch_size, c.train.ema, c.eval.every = 468, 16, 0.998, 156
    c.optim.learning_rate = 1e-3
    return c
