"""Sentiment of film reviews, SST-2 (Socher et al. 2013): 6,920 sentences and nothing else, from scratch.

    python -m jaxlm.train --config=configs/sst2.py --config.data.train=train.tsv --config.data.val=dev.tsv \
        --workdir=runs/sst2
    python -m jaxlm.evaluate --workdir=runs/sst2 --pictures=runs/sst2

The files have lines of a sentence, a tab and 0 or 1. An LSTM whose states are pooled by their maximum, 1.06M parameters
and 3 epochs: under a minute on 2 CPU cores, accuracy 80.7% and AUC 0.885 on the 872 sentences of dev (one seed).
"""

from jaxlm.config import base


def get_config():
    c = base()
    c.task.name = "classify"
    c.data.train, c.data.val = "data/sst2/train.tsv", "data/sst2/dev.tsv"
    c.data.tokenizer, c.data.vocab_size, c.data.min_count, c.data.lowercase = "words", 20_000, 2, True
    c.data.seq_len, c.data.word_dropout = 64, 0.2
    c.model.name, c.model.num_layers, c.model.embed_dim, c.model.pooling = "lstm", 1, 128, "max"
    c.model.embed_std, c.model.embed_dropout, c.model.dropout = 0.1, 0.4, 0.2
    c.model.dtype, c.model.scan = "float32", False
    c.train.steps, c.train.batch_size, c.train.ema = 468, 16, 0.998
    c.optim.learning_rate, c.optim.weight_decay, c.optim.b2 = 1e-3, 0.01, 0.999
    c.optim.schedule, c.optim.warmup_steps = "constant", 0
    c.eval.every, c.eval.metric = 156, "accuracy"
    return c
