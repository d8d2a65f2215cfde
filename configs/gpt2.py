"""GPT-2 124M (Radford et al. 2019) on about 10 billion tokens, as nanoGPT trains it.

    python -m jaxlm.data.prepare --input 'openwebtext/*.parquet' --output data/openwebtext --tokenizer sentencepiece \
        --vocab_size 50304
    python -m jaxlm.train --config=configs/gpt2.py --workdir=runs/gpt2

8 GPUs of 80 GB, or a TPU v5e-16. 124,475,904 parameters (124,439,808 with the original 50,257 tokens). nanoGPT reaches
a validation loss of about 2.85 after 300 billion tokens of OpenWebText with OpenAI's tokenizer.
"""

from jaxlm.config import base


def get_config():
    c = base()
    c.data.path = "data/openwebtext"
    c.data.seq_len = 1024
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 12, 768, 12
    c.model.vocab_size = 50304  # 50,257 in the original, padded to a multiple of 128
    c.model.norm, c.model.mlp, c.model.positions = "layer", "gelu", "learned"
    c.model.norm_eps, c.model.bias = 1e-5, True
    c.train.steps, c.train.batch_size = 20_000, 480
    c.optim.learning_rate, c.optim.warmup_steps = 6e-4, 700
    return c
