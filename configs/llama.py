"""Llama 2 (Touvron et al. 2023) and 3 (Grattafiori et al. 2024): the published shapes, to be pretrained on your data.

    python -m jaxlm.plan --config=configs/llama.py:8b,v5p-128 --topology=v5p-128
    python -m jaxlm.train --config=configs/llama.py:1b --workdir=runs/llama-1b --config.data.path=DIR

2-7b: 6,738,415,616 parameters (Llama 2). 1b: 1,235,814,400 (Llama 3.2). 8b, 70b, 405b: 8,030,261,248,
70,553,706,496 and 405,853,388,800 (Llama 3.1). A second word sets batch and mesh for a pod, by the name of its
topology. What plan says of a chip, with model.remat=full:

    recipe              memory            step       MFU
    2-7b,v5e-256         4.35 of 16 GiB     3.11 s   61.6%
    8b,v5e-256           5.60 of 16 GiB     3.74 s   64.4%
    8b,v5p-128           6.75 of 95 GiB     1.65 s   62.7%
    8b,v6e-256           8.99 of 32 GiB     2.32 s   44.5%
    70b,v5p-256         25.37 of 95 GiB    12.87 s   66.8%
    70b,v6e-256         20.80 of 32 GiB     9.74 s   44.1%
    405b,v5p-1024x2     59.94 of 95 GiB    73.85 s   63.4%   two slices of 512 chips
    8b,v5p-256,1m        5.65 of 95 GiB   308.56 s    9.8%   1,048,576 tokens in a ring; by blocks in XLA, no kernel yet
"""

from jaxlm.config import base, variant

SIZES = {
    "2-7b": {
        "layers": 32,
        "width": 4096,
        "heads": 32,
        "kv": 32,
        "mlp": 11008,
        "rate": 3e-4,
        "vocab": 32_000,
    },
    "1b": {
        "layers": 16,
        "width": 2048,
        "heads": 32,
        "kv": 8,
        "mlp": 8192,
        "rate": 6e-4,
        "tie": True,
    },
    "8b": {"layers": 32, "width": 4096, "heads": 32, "kv": 8, "mlp": 14336, "rate": 3e-4},
    "70b": {"layers": 80, "width": 8192, "heads": 64, "kv": 8, "mlp": 28672, "rate": 1.5e-4},
    "405b": {"layers": 126, "width": 16384, "heads": 128, "kv": 8, "mlp": 53248, "rate": 8e-5},
}
PODS = {  # rows of a step, and the mesh besides fsdp
    "2-7b,v5e-256": {"batch": 512},
    "8b,v5e-256": {"batch": 256},
    "8b,v5p-128": {"batch": 64},
    "8b,v6e-256": {"batch": 512},
    "70b,v5p-256": {"batch": 128},
    "70b,v6e-256": {"batch": 256},
    "405b,v5p-1024x2": {"batch": 1024, "mesh": {"data": 2, "tensor": 8}},
    "8b,v5p-256,1m": {"batch": 1, "length": 1_048_576, "mesh": {"sequence": 128}},
}


def get_config(arg="8b"):
    c = base()
    v = variant(arg.partition(",")[0], SIZES)
    pod = variant(arg, PODS) if "," in arg else {"batch": 512}
    llama2 = "vocab" in v
    c.data.seq_len = pod.get("length", 4096 if llama2 else 8192)
    c.model.num_layers, c.model.embed_dim, c.model.mlp_dim = v["layers"], v["width"], v["mlp"]
    c.model.num_heads, c.model.num_kv_heads = v["heads"], v["kv"]
    c.model.vocab_size, c.model.tie_embeddings = v.get("vocab", 128_256), v.get("tie", False)
    c.model.rope_theta, c.model.norm_eps = 10_000.0 if llama2 else 500_000.0, 1e-5
    c.model.remat = "full"
    c.train.steps, c.train.batch_size = 100_000, pod["batch"]
    c.optim.learning_rate, c.optim.warmup_steps = v["rate"], 2000
    c.mesh.strategy = "fsdp"
    c.mesh.update(pod.get("mesh", {}))
    return c
