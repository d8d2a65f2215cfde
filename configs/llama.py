"""Llama 3 (Grattafiori et al. 2024): the published shapes, to be pretrained on your own data.

    python -m jaxlm.train --config=configs/llama.py:8b --dry_run --devices=64
    python -m jaxlm.train --config=configs/llama.py:1b --workdir=runs/llama-1b --config.data.path=DIR

1b: Llama 3.2, 1,235,814,400 parameters. 8b: Llama 3.1, 8,030,261,248. Both read 128,256 tokens and 8,192 positions.
"""

from jaxlm.config import base, variant


def get_config(arg="8b"):
    c = base()
    v = variant(
        arg,
        {
            "8b": {"layers": 32, "width": 4096, "heads": 32, "mlp": 14336, "tie": False, "rate": 3e-4},
            "1b": {"layers": 16, "width": 2048, "heads": 32, "mlp": 8192, "tie": True, "rate": 6e-4},
        },
    )
    c.data.seq_len = 8192
    c.model.num_layers, c.model.embed_dim, c.model.mlp_dim = v["layers"], v["width"], v["mlp"]
    c.model.num_heads, c.model.num_kv_heads = v["heads"], 8
    c.model.vocab_size, c.model.tie_embeddings = 128_256, v["tie"]
    c.model.rope_theta, c.model.norm_eps = 500_000.0, 1e-5
    c.model.remat = "full"
    c.train.steps, c.train.batch_size = 100_000, 512
    c.optim.learning_rate, c.optim.warmup_steps = v["rate"], 2000
    c.mesh.strategy = "fsdp"
    return c
