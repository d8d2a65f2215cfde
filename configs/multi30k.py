"""German to English on Multi30k (Elliott et al. 2016), from scratch: 29,000 pairs, lowercased.

    python -m jaxlm.train --config=configs/multi30k.py:cpu --workdir=runs/multi30k \
        --config.data.train=train.de.gz+train.en.gz --config.data.val=val.de.gz+val.en.gz
    python -m jaxlm.evaluate --workdir=runs/multi30k --beams=5 --data=test.de.gz+test.en.gz

BLEU on the 1,014 validation pairs, sacrebleu's 13a:

cpu: an encoder-decoder of 5.0M parameters, 1,300 steps in 28 minutes on 2 cores: 43.4 by 5 beams, 42.1 greedy.
lstm: a bidirectional LSTM, and one that attends to it (Luong et al. 2015), 4.2M parameters, 2,000 steps in half an hour
    on 2 cores: 41.5 by 5 beams, 40.1 greedy.
2017: the layers and the optimizer of Vaswani et al. 2017 (post-norm, sinusoidal positions) in cpu's sizes: 23.1 greedy
    after 239 steps, 17 minutes on 2 cores that others used too; the whole 1,300 are not yet measured.
gpu: more epochs of a deeper one: not yet measured.
"""

from jaxlm.config import base, variant

VARIANTS = {
    "cpu": {"layers": 3, "steps": 1300, "dropout": 0.2, "dtype": "float32"},
    "lstm": {"layers": 1, "steps": 2000, "dropout": 0.3, "dtype": "float32"},
    "2017": {"layers": 3, "steps": 1300, "dropout": 0.1, "dtype": "float32"},
    "gpu": {"layers": 4, "steps": 5000, "dropout": 0.3, "dtype": "bfloat16"},
}


def get_config(arg="cpu"):
    c = base()
    v = variant(arg, VARIANTS)
    c.task.name, c.task.label_smoothing = "seq2seq", 0.1
    c.data.train, c.data.val = (
        "data/multi30k/train.de.gz+train.en.gz",
        "data/multi30k/val.de.gz+val.en.gz",
    )
    c.data.tokenizer, c.data.vocab_size, c.data.lowercase = "sentencepiece", 4000, True
    c.data.seq_len, c.data.enc_len = 128, 128
    c.model.name, c.model.num_layers, c.model.embed_dim = "encoder_decoder", v["layers"], 256
    c.model.num_heads, c.model.mlp_dim = 4, 512
    c.model.mlp, c.model.qk_norm, c.model.dropout = "relu2", True, v["dropout"]
    c.model.scan, c.model.dtype = arg == "gpu", v["dtype"]
    c.train.steps, c.train.batch_size = v["steps"], 32
    c.optim.name, c.optim.learning_rate, c.optim.adam_learning_rate = "muon", 2e-2, 5e-3
    c.optim.schedule, c.optim.end_factor, c.optim.weight_decay = "linear", 0.0, 0.0
    c.eval.every, c.eval.metric = v["steps"] // 4, "loss"
    if arg == "lstm":
        c.model.name, c.model.hidden_dim, c.model.embed_std = (
            "lstm_seq2seq",
            512,
            0.1,
        )  # 0.02: nothing in an epoch
        c.optim.name, c.optim.learning_rate = "adamw", 4e-3
    elif arg == "2017":
        as_in_2017(c)
    return c


def as_in_2017(c):
    """The layers and the optimizer of Vaswani et al. 2017, but for the sizes and the warm-up: 400 steps, not 4,000."""
    c.model.norm_place, c.model.norm, c.model.bias = "post", "layer", True  # LayerNorm(x + f(x))
    c.model.positions, c.model.mlp, c.model.qk_norm = "sinusoidal", "relu", False
    c.model.tie_embeddings, c.model.scale_embeddings = True, True
    c.model.embed_std = c.model.embed_dim**-0.5  # 1 after the scale by sqrt(embed_dim)
    c.optim.name, c.optim.b1, c.optim.b2, c.optim.eps, c.optim.clip = "adam", 0.9, 0.98, 1e-9, 0.0
    c.optim.schedule, c.optim.warmup_steps = "inverse_sqrt", 400
    c.optim.learning_rate = (c.model.embed_dim * c.optim.warmup_steps) ** -0.5
    c.optim.adam_learning_rate = 0.0
