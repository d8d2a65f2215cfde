"""Characters of Shakespeare, at the budgets of nanoGPT's two recipes.

    python -m jaxlm.data.prepare --input input.txt --output data/shakespeare_char --tokenizer chars
    python -m jaxlm.train --config=configs/shakespeare_char.py:cpu --workdir=runs/shakespeare_char

cpu: 0.80M parameters, 2,000 steps of 12 x 64 characters: 4 minutes on 2 cores, validation loss 1.572 (seeds 0, 1, 2:
1.568, 1.575, 1.574); nanoGPT at this budget: 1.88.
ngram: Kneser-Ney, up to 7 characters, counted in seconds: validation loss 1.520 (orders 5 and 6, with
--config.model.order: 1.564, 1.526).
gpu: 10.6M parameters, 5,000 steps of 64 x 256 characters: not yet measured; nanoGPT at this budget: 1.47.
"""

from jaxlm.config import base, variant


def get_config(arg="cpu"):
    c = base()
    v = variant(
        arg,
        {
            "cpu": {"layers": 4, "width": 128, "heads": 4, "length": 64, "batch": 12, "steps": 2000, "dropout": 0.0},
            "ngram": {"layers": 1, "width": 4, "heads": 1, "length": 1024, "batch": 8, "steps": 1, "dropout": 0.0},
            "gpu": {"layers": 6, "width": 384, "heads": 6, "length": 256, "batch": 64, "steps": 5000, "dropout": 0.2},
        },
    )
    c.data.path = "data/shakespeare_char"
    c.data.seq_len = v["length"]
    c.data.isolate = False  # one document
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = v["layers"], v["width"], v["heads"]
    c.model.mlp, c.model.qk_norm, c.model.dropout = "relu2", True, v["dropout"]
    c.model.dtype = "float32" if arg != "gpu" else "bfloat16"
    c.model.scan = False
    if arg == "ngram":
        c.model.name, c.model.order = "ngram", 7
    c.train.steps, c.train.batch_size = v["steps"], v["batch"]
    c.optim.name, c.optim.learning_rate, c.optim.adam_learning_rate = "muon", 2e-2, 6e-3
    c.optim.schedule = "linear"  # to 0: 1.575 where cosine gives 1.590
    c.optim.end_factor, c.optim.weight_decay = 0.0, 0.0
    c.eval.every = 500
    return c
