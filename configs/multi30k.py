"""German to English on Multi30k (Elliott et al. 2016), from scratch: 29,000 pairs, lowercased.

python -m jaxlm.train --config=configs/multi30k.py:cpu --workdir=runs/multi30k
python -m jaxlm.evaluate --workdir=runs/multi30k --step=best
"""

from jaxlm.config import base, variant


def get_config(arg="cpu"):
    c = base()
    v = variant(arg, {"cpu": {"width": 256, "layers": 3, "steps": 2000, "batch": 32}})
    c.task.name, c.task.label_smoothing = "seq2seq", 0.1
    c.data.train, c.data.val = "data/multi30k/train.de.gz+train.en.gz", "data/multi30k/val.de.gz+val.en.gz"
    c.data.tokenizer, c.data.vocab_size, c.data.lowercase = "sentencepiece", 4000, True
    c.data.seq_len, c.data.enc_len = 128, 128
    c.model.name, c.model.num_layers, c.model.embed_dim = "encoder_decoder", v["layers"], v["width"]
    c.model.num_heads, c.model.mlp_dim = 4, 2 * v["width"]
    c.model.mlp, c.model.qk_norm, c.model.dropout = "relu2", True, 0.3
    c.model.scan, c.model.dtype = False, "float32"
    c.train.steps, c.train.batch_size = v["steps"], v["batch"]
    c.optim.name, c.optim.learning_rate, c.optim.adam_learning_rate = "muon", 2e-2, 5e-3
    c.optim.schedule, c.optim.end_factor, c.optim.weight_decay = "linear", 0.0, 0.0
    c.eval.every, c.eval.metric = 500, "loss"
    return c
