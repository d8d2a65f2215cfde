"""Vectors of words from a text: skip-gram with negative sampling (word2vec), or GloVe.

    tr 'A-Z' 'a-z' <input.txt | tr -cs "a-z'" ' ' >words.txt
    python -m jaxlm.data.prepare --input=words.txt --output=data/words --tokenizer=words --vocab_size=5000
    python -m jaxlm.train --config=configs/vectors.py:glove --config.data.path=data/words --workdir=runs/words
    python -c 'import jaxlm; lm = jaxlm.load("runs/words"); print(lm.neighbors("king"))'
    python -c 'import jaxlm; lm = jaxlm.load("runs/words"); print(lm.analogy("man", "king", "woman"))'

The first line makes the text lower case, and leaves out all but words. On tiny Shakespeare (204,062 words), with 2 CPU
cores:

skipgram (the default): 5 words drawn, common ones passed over, 45 epochs in a minute: validation loss 2.704; near king
    are richard, plantagenet, vi, claim; father: son, wales, grandfather, heir; night: light, wedding, bed.
glove: 928,861 pairs of words at most 10 apart, counted in 2 seconds, 18 epochs in 40: training loss 0.033; near king
    are richard, edward, henry, ii; father: son, brother, prince; night: good, last, morrow, morning.
"""

from jaxlm.config import base, variant


def get_config(arg="skipgram"):
    c = base()
    c.data.path = "data/words"
    c.model.name, c.model.embed_dim, c.model.dtype = "vectors", 100, "float32"
    c.optim.weight_decay, c.optim.b2, c.optim.clip = 0.0, 0.999, 0.0
    return variant(arg, {"skipgram": skipgram, "glove": glove})(c)


def skipgram(c):
    c.task.name, c.task.negatives, c.task.subsample = "skipgram", 5, 1e-3
    c.data.seq_len, c.train.batch_size, c.train.steps = 256, 16, 2000
    c.optim.learning_rate = 2e-3
    return c


def glove(c):
    c.task.name, c.task.window, c.task.x_max = "glove", 10, 10.0
    c.data.seq_len, c.train.batch_size, c.train.steps = 256, 16, 4000
    c.eval.every = 0  # other text has other counts, of pairs that were never fitted
    c.optim.learning_rate = 2e-3
    return c
