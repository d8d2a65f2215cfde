"""Random tokens as a prepared directory: to measure with, where there is no text."""

import json
from pathlib import Path

import numpy as np

from jaxlm.data.store import MANIFEST, VERSION, ShardWriter, token_dtype
from jaxlm.data.tokenization.tokenizer import Bytes


def random_tokens(path: Path, vocab_size: int, num_tokens: int, seed: int, mean: int = 500) -> None:
    """Writes documents of `mean` tokens on average to `path`, a directory that is not there yet.

    Its tokenizer is that of bytes, which has another vocabulary: nothing can be read out of these tokens.
    """
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    dtype = token_dtype(vocab_size)
    writer = ShardWriter(path / "train-00000", dtype)
    for length in rng.integers(1, 2 * mean, num_tokens // mean).tolist():
        writer.add(rng.integers(0, vocab_size, length), length, True)
    shard = {"file": "train-00000", "split": "train"} | writer.close()
    totals = {key: shard[key] for key in ("tokens", "documents", "bytes")}
    tokenizer = Bytes()
    known = {"name": tokenizer.name, "file": tokenizer.filename, "sha256": tokenizer.fingerprint}
    known |= {"vocab_size": vocab_size, "bos_id": None, "eos_id": None}
    manifest = {
        "version": VERSION,
        "input": [],
        "options": {},
        "sources": {},
        "counts": {},
        "dtype": dtype.str,
    }
    manifest |= {
        "splits": {"train": totals, "val": dict.fromkeys(totals, 0)},
        "shards": [shard],
        "tokenizer": known,
    }
    (path / tokenizer.filename).write_bytes(tokenizer.to_bytes())
    (path / MANIFEST).write_text(json.dumps(manifest))
