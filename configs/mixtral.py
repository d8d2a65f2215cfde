"""Mixtral (Jiang et al. 2024): a mixture of experts of the published shape, to be pretrained on your own data.

    python -m jaxlm.plan --config=configs/mixtral.py:8x7b,v5p-128 --topology=v5p-128
    python -m jaxlm.train --config=configs/mixtral.py:small --workdir=runs/mixtral --config.data.path=DIR

8x7b: 46,702,792,704 parameters, of which a token meets 12,879,925,248. small: 8 layers of width 512, 214,213,120 and
82,092,544 parameters. What plan says of a chip, with model.remat=full:

    recipe              memory            step       MFU
    8x7b,v5p-128        19.48 of 95 GiB     4.34 s   34.1%
"""

from jaxlm.config import base, variant

SIZES = {
    "8x7b": {"layers": 32, "width": 4096, "heads": 32, "mlp": 14336, "length": 8192, "batch": 512},
    "small": {"layers": 8, "width": 512, "heads": 8, "mlp": 1792, "length": 1024, "batch": 128},
}
PODS = {"8x7b,v5p-128": {"length": 4096, "batch": 128}}


def get_config(arg="8x7b"):
    c = base()
    v = variant(arg.partition(",")[0], SIZES) | (variant(arg, PODS) if "," in arg else {})
    c.data.seq_len = v["length"]
    c.model.num_layers, c.model.embed_dim, c.model.mlp_dim = v["layers"], v["width"], v["mlp"]
    c.model.num_heads, c.model.num_kv_heads = v["heads"], v["heads"] // 4
    c.model.num_experts, c.model.experts_per_token = 8, 2
    c.model.vocab_size, c.model.tie_embeddings = 32_000, False
    c.model.rope_theta, c.model.norm_eps = 1e6, 1e-5
    c.model.remat = "full"
    c.train.steps, c.train.batch_size = 100_000, v["batch"]
    c.optim.learning_rate, c.optim.warmup_steps = 3e-4, 2000
    c.mesh.strategy = "fsdp"
    return c
