"""A first model: the source of the Python standard library, in minutes on a laptop.

    bash launch/quickstart.sh

2 CPU cores: about 3 minutes of training, to about 1.61 bits per byte on files that it has not seen (gzip -9: 2.04).
1.3M parameters, 600 steps of 16 x 128 tokens.
"""

from jaxlm.config import base


def get_config():
    c = base()
    c.data.path = "runs/quickstart/data"
    c.data.seq_len = 128
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 4, 128, 4
    c.model.mlp, c.model.qk_norm = "relu2", True
    c.model.dtype, c.model.scan = "float32", False
    c.train.steps, c.train.batch_size = 600, 16
    c.optim.name, c.optim.learning_rate, c.optim.adam_learning_rate = "muon", 3e-2, 1.2e-2
    c.optim.end_factor, c.optim.weight_decay = 0.0, 0.0
    c.eval.every, c.checkpoint.every = 300, 300
    return c
