"""GPT-2 (Radford et al. 2019) on about 10 billion tokens, as nanoGPT trains it: without biases.

    python -m jaxlm.data.prepare --input 'openwebtext/*.parquet' --output data/openwebtext --tokenizer sentencepiece \
        --vocab_size 50304
    python -m jaxlm.train --config=configs/gpt2.py --workdir=runs/gpt2

124m: 124,373,760 parameters (OpenAI's 124,439,808 have biases, --config.model.bias=True, and 50,257 tokens); 8 GPUs of
80 GB, or a TPU v5e-16. nanoGPT reaches a validation loss of about 2.85 after 300 billion tokens of OpenWebText with
OpenAI's tokenizer.
350m, 1.3b: 354,599,936 and 1,315,276,800 parameters, in the shapes of GPT-2 medium and of GPT-3 XL (Brown et al. 2020).

On one H100 (docs/speed.md): 508,000, 206,000 and 64,500 tokens/s.
"""

from jaxlm.config import base, variant

SIZES = {
    "124m": {"layers": 12, "width": 768, "heads": 12, "length": 1024, "batch": 480, "rate": 6e-4},
    "350m": {"layers": 24, "width": 1024, "heads": 16, "length": 1024, "batch": 480, "rate": 3e-4},
    "1.3b": {
        "layers": 24,
        "width": 2048,
        "heads": 16,
        "length": 2048,
        "batch": 512,
        "rate": 2e-4,
        "parts": 8,
    },
}


def get_config(arg="124m"):
    c = base()
    v = variant(arg, SIZES)
    c.data.path = "data/openwebtext"
    c.data.seq_len = v["length"]
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = v["layers"], v["width"], v["heads"]
    c.model.vocab_size = 50304  # 50,257 in the original, padded to a multiple of 128
    c.model.norm, c.model.mlp, c.model.positions = "layer", "gelu", "learned"
    c.model.norm_eps, c.model.scan = 1e-5, False
    c.train.steps, c.train.batch_size = 20_000, v["batch"]
    c.train.grad_accumulation = v.get("parts", 1)  # 8 rows of a GPU at a time, of 8 GPUs
    c.optim.learning_rate, c.optim.warmup_steps = v["rate"], 700
    return c
