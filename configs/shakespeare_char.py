"""Characters of Shakespeare, at the budgets of nanoGPT's two recipes, and the classics beside them.

    python -m jaxlm.data.prepare --input input.txt --output data/shakespeare_char --tokenizer chars
    python -m jaxlm.train --config=configs/shakespeare_char.py:cpu --workdir=runs/shakespeare_char
    bash launch/baselines.sh input.txt   # cpu, lstm, masked and ngram, each trained, and one table of all

cpu: 0.80M parameters and 4.2M of embeddings of 2 to 4 characters, 2,000 steps of 12 x 64 characters: 3 minutes on 2
cores, validation loss 1.564 (seeds 0, 1, 2: 1.560, 1.572, 1.561), after 125 steps 1.88; nanoGPT at this budget: 1.88.
With embeddings of characters alone, no average of parameters and lower rates for them: 1.572, and 430 steps to 1.88.
lstm: two layers of 256, 1.07M parameters, the same steps: 3 minutes, validation loss 1.757.
masked: cpu's layers looking both ways, a hidden 15% of the characters foretold: 1.286 (another task: of those alone).
ngram: Kneser-Ney, up to 7 characters, counted in seconds: validation loss 1.520 (orders 5 and 6, with
--config.model.order: 1.564, 1.526).
gpu: 10.6M parameters, 700 steps of 64 x 256 characters (11 epochs): 23 seconds on an H100, validation loss 1.518 (seed
0); in 5,000 steps at twice the rate it learns the text by heart: 1.517 at step 500, 2.28 at 2,500. nanoGPT: 1.47.
"""

from jaxlm.config import base, variant

CPU = {
    "layers": 4,
    "width": 128,
    "heads": 4,
    "length": 64,
    "batch": 12,
    "steps": 2000,
    "dropout": 0.0,
}
VARIANTS = {
    "cpu": CPU,
    "lstm": CPU | {"layers": 2, "width": 256},
    "masked": CPU,
    "ngram": CPU | {"layers": 1, "width": 4, "heads": 1, "length": 1024, "batch": 8, "steps": 1},
    "gpu": {
        "layers": 6,
        "width": 384,
        "heads": 6,
        "length": 256,
        "batch": 64,
        "steps": 700,
        "dropout": 0.3,
    },
}


def get_config(arg="cpu"):
    c = base()
    v = variant(arg, VARIANTS)
    c.data.path = "data/shakespeare_char"
    c.data.seq_len = v["length"]
    c.data.isolate = False  # one document
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = v["layers"], v["width"], v["heads"]
    c.model.mlp, c.model.qk_norm, c.model.dropout = "relu2", True, v["dropout"]
    c.model.dtype = "float32" if arg != "gpu" else "bfloat16"
    c.model.scan = arg == "gpu"
    c.train.steps, c.train.batch_size = v["steps"], v["batch"]
    c.optim.name, c.optim.learning_rate, c.optim.adam_learning_rate = "muon", 2e-2, 6e-3
    c.optim.schedule = "linear"  # to 0: 1.575 where cosine gives 1.590
    c.optim.end_factor, c.optim.weight_decay = 0.0, 0.0
    c.eval.every = 500
    if arg == "cpu":
        c.model.embed_ngrams, c.model.buckets, c.train.ema = 4, 32_768, 0.95
        c.optim.adam_learning_rate, c.optim.warmup_steps = 3e-2, 20
    elif arg == "gpu":
        c.optim.learning_rate, c.optim.adam_learning_rate, c.optim.weight_decay = 1e-2, 3e-3, 0.1
        c.eval.every = 100
    elif arg == "ngram":
        c.model.name, c.model.order = "ngram", 7
    elif arg == "lstm":
        c.model.name, c.optim.name, c.optim.learning_rate = "lstm", "adamw", 4e-3
    elif arg == "masked":
        c.task.name, c.model.name, c.data.isolate = "mlm", "encoder", True
    return c
