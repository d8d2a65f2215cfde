"""Questions about a text, answered with a place in it: made data, from scratch. SQuAD's columns are the same.

    python configs/qa.py data/qa
    python -m jaxlm.train --config=configs/qa.py --workdir=runs/qa
    python -m jaxlm.evaluate --workdir=runs/qa

0.1M parameters, 800 steps: 3 minutes on one CPU core; exact match 100.0, 100.0 and 99.5 on 400 held-out questions
(seeds 0, 1, 2).
"""

import json
import random
import sys
from pathlib import Path

from jaxlm.config import base

PEOPLE = [a + b for a in "an bo cel da el".split() for b in "na ris tia mir vo".split()]
TOWNS = [a + b for a in "ber lo mar os vi".split() for b in "lin dem tova wick zen".split()]


def get_config():
    c = base()
    c.task.name = "qa"
    c.data.train, c.data.val = "data/qa/train.jsonl", "data/qa/val.jsonl"
    c.data.tokenizer, c.data.seq_len = "words", 128
    c.model.name, c.model.num_layers, c.model.embed_dim, c.model.num_heads = "encoder", 2, 64, 4
    c.model.mlp, c.model.qk_norm, c.model.dtype, c.model.scan = "relu2", True, "float32", False
    c.train.steps, c.train.batch_size = 800, 16
    c.optim.name, c.optim.learning_rate, c.optim.adam_learning_rate = "muon", 2e-2, 5e-3
    c.optim.schedule, c.optim.end_factor, c.optim.weight_decay = "linear", 0.0, 0.0
    c.eval.every, c.eval.metric = 400, "f1"
    return c


def make(rng) -> dict:
    """Three people, each in a town; where is one of them?"""
    facts = list(zip(rng.sample(PEOPLE, 3), rng.sample(TOWNS, 3)))
    who, where = rng.choice(facts)
    return {
        "question": f"where is {who} ?",
        "context": " ".join(f"{a} is in {b} ." for a, b in facts),
        "answer": where,
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python configs/qa.py DIRECTORY")
    rng, folder = random.Random(0), Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 4000), ("val", 400)):
        lines = [json.dumps(make(rng)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
