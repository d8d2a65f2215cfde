"""Dialogues: an assistant that remembers what it was told. Made data, from scratch.

    python configs/dialogue.py data/dialogue
    python -m jaxlm.train --config=configs/dialogue.py --workdir=runs/dialogue
    python -m jaxlm.evaluate --workdir=runs/dialogue

0.1M parameters, 400 steps: a minute on one CPU core; ROUGE-L 100.0 on the last answers of 400 held-out dialogues (seeds
0, 1, 2).
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
    c.task.name = "sft"
    c.data.train, c.data.val = "data/dialogue/train.jsonl", "data/dialogue/val.jsonl"
    c.data.tokenizer, c.data.seq_len = "words", 128
    c.model.name, c.model.num_layers, c.model.embed_dim, c.model.num_heads = "decoder", 2, 64, 4
    c.model.mlp, c.model.qk_norm, c.model.dtype, c.model.scan = "relu2", True, "float32", False
    c.train.steps, c.train.batch_size = 400, 16
    c.optim.name, c.optim.learning_rate, c.optim.adam_learning_rate = "muon", 2e-2, 5e-3
    c.optim.schedule, c.optim.end_factor, c.optim.weight_decay = "linear", 0.0, 0.0
    c.eval.every, c.eval.generate, c.eval.max_tokens = 200, 100, 8
    return c


def make(rng) -> dict:
    """A name and a town are told, and one of them is asked for."""
    name, town = rng.choice(PEOPLE), rng.choice(TOWNS)
    asked = rng.choice([("where am i from ?", f"from {town}"), ("who am i ?", f"you are {name}")])
    said = f"i am {name} from {town}", f"hello {name}", *asked
    return {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)
        ]
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python configs/dialogue.py DIRECTORY")
    rng, folder = random.Random(0), Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 4000), ("val", 400)):
        lines = [json.dumps(make(rng)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
