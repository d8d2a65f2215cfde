"""Summaries: of a report with news of today among older ones, the news. Made data, from scratch.

    python configs/summarize.py data/summarize
    python -m jaxlm.train --config=configs/summarize.py --workdir=runs/summarize
    python -m jaxlm.evaluate --workdir=runs/summarize

0.2M parameters, 800 steps: under 2 minutes on one CPU core; ROUGE-L 100.0, 100.0 and 99.9 on 400 held-out reports
(seeds 0, 1, 2).
"""

import json
import random
import sys
from pathlib import Path

from jaxlm.config import base

PEOPLE = [a + b for a in "an bo cel da el".split() for b in "na ris tia mir vo".split()]
DEEDS = [
    f"{a} {b}"
    for a in "won lost found sold built".split()
    for b in "gold ships games books towers".split()
]


def get_config():
    c = base()
    c.task.name = "seq2seq"
    c.data.train, c.data.val = "data/summarize/train.jsonl", "data/summarize/val.jsonl"
    c.data.tokenizer, c.data.seq_len, c.data.enc_len = "words", 32, 128
    c.model.name, c.model.num_layers, c.model.embed_dim, c.model.num_heads = (
        "encoder_decoder",
        2,
        64,
        4,
    )
    c.model.mlp, c.model.qk_norm, c.model.dtype, c.model.scan = "relu2", True, "float32", False
    c.train.steps, c.train.batch_size = 800, 16
    c.optim.name, c.optim.learning_rate, c.optim.adam_learning_rate = "muon", 2e-2, 5e-3
    c.optim.schedule, c.optim.end_factor, c.optim.weight_decay = "linear", 0.0, 0.0
    c.eval.every, c.eval.generate, c.eval.max_tokens = 400, 100, 8
    return c


def make(rng) -> dict:
    """Four sentences, in some place that of today."""

    def said():
        return f"{rng.choice(PEOPLE)} {rng.choice(DEEDS)}"

    news = said()
    report = [f"long ago {said()} ." for _ in range(3)]
    report.insert(rng.randrange(4), f"today {news} .")
    return {"source": " ".join(report), "target": news}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python configs/summarize.py DIRECTORY")
    rng, folder = random.Random(0), Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 4000), ("val", 400)):
        lines = [json.dumps(make(rng)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
