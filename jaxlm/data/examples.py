"""Examples as a source of batches: the records of a table become pieces, and pieces are packed into rows.

All of it is kept in memory as token ids: examples are few beside the text of pretraining.
"""

import hashlib
import json
import logging
from functools import lru_cache

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.data import tokenizer as tokenizers
from jaxlm.data import vocabulary
from jaxlm.data.rows import lay_out, piece_lengths
from jaxlm.data.tables import read_examples, refuse
from jaxlm.data.transforms import EXAMPLES, Vocabulary, split_names
from jaxlm.keys import LABELLED

TEXTS = "text text2 words question context answer source target prompt response chosen rejected".split()


def texts_of(examples: list[dict], lowercase: bool) -> list[str]:
    """All text of the examples, to make a tokenizer from."""
    texts = []
    for example in examples:
        found = [example[role] for role in TEXTS if role in example]
        if "messages" in example:
            messages = example["messages"]
            found += [m["content"] for m in (json.loads(messages) if isinstance(messages, str) else messages)]
        texts += [" ".join(x) if isinstance(x, (list, tuple)) else str(x) for x in found]
    return [text.lower() for text in texts] if lowercase else texts


@lru_cache(maxsize=4)
def training_examples(data: FrozenConfigDict, task: str) -> list[dict]:
    return read_examples(data.train, task, data.columns)


@lru_cache(maxsize=4)
def tokenizer_of(data: FrozenConfigDict, task: str):
    """The tokenizer that config.data.tokenizer names, made from data.train where it is a kind."""
    if data.tokenizer not in vocabulary.MADE:
        return tokenizers.load(data.tokenizer)
    texts = texts_of(training_examples(data, task), data.lowercase)
    return vocabulary.make(data.tokenizer, texts, data.vocab_size, data.min_count)


def encoder_of(tokenizer, lowercase: bool):
    """text -> ids."""
    return lambda text: tokenizer.encode(str(text).lower() if lowercase else str(text))


def label_names(config: ConfigDict) -> tuple[str, ...]:
    """The classes or tags of config.data.labels, or of the training examples, sorted."""
    task = config.task.name
    if config.data.labels or task not in ("classify", "multilabel", "tag"):
        return tuple(config.data.labels)
    names = set()
    for example in training_examples(FrozenConfigDict(config.data), task):
        if task == "tag":
            tags = example["tags"]
            names.update(tags.split() if isinstance(tags, str) else tags)
        else:
            names.update(split_names(example["label"]) if task == "multilabel" else [str(example["label"])])
    return tuple(sorted(names))


class Examples:
    """The rows of config.data.train, or of another file, as a source of batches.

    tokenizer: a model's, or None for the config's own. examples: instead of those in files. Attributes: `examples`,
    dicts of the task's columns, `pieces` of them, and `rows`, of each row the numbers of its examples.
    """

    def __init__(self, config: ConfigDict, split: str, tokenizer=None, examples: list[dict] | None = None):
        data = FrozenConfigDict(config.data)
        spec = {"train": data.train, "val": data.val}[split] if examples is None else "examples"
        self.config, self.split = config, split
        self.tokenizer = tokenizer or tokenizer_of(data, config.task.name)
        self.vocab = Vocabulary(self.tokenizer, config.task.name)
        self.examples = read_examples(spec, config.task.name, data.columns) if examples is None else examples
        names = label_names(config)
        self.encode = encoder_of(self.tokenizer, data.lowercase)
        self.pieces, bad = [], []
        for number, example in enumerate(self.examples, 1):
            example = example | {"label": str(example["label"])} if config.task.name == "classify" else example
            try:
                self.pieces.append(EXAMPLES[config.task.name](example, self.encode, self.vocab, names))
            except (ValueError, KeyError, TypeError) as error:
                bad.append(f"example {number}: {error}")
        refuse(spec, bad)
        self.weigh(names)
        self.rows = self.pack()
        digest = hashlib.sha256(json.dumps([self.examples, names], default=str).encode())
        self.fingerprint = hashlib.sha256((digest.hexdigest() + self.tokenizer.fingerprint).encode()).hexdigest()

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(sum(piece_lengths(piece)) for piece in self.pieces)

    def weigh(self, names) -> None:
        """Gives training examples the weight of their class, so that every class weighs the same."""
        task = self.config.task
        if self.split != "train" or task.class_weights == "none" or task.name not in ("classify", "tag"):
            return
        if task.name == "classify":
            counts = np.bincount([piece["label"] for piece in self.pieces], minlength=len(names))
            for piece in self.pieces:
                piece["weight"] = len(self.pieces) / len(names) / counts[piece["label"]]
        else:
            every = np.concatenate([piece["targets"][piece["weights"] > 0] for piece in self.pieces])
            counts = np.maximum(np.bincount(every, minlength=len(names)), 1)
            for piece in self.pieces:
                piece["weights"] = piece["weights"] * (len(every) / len(names) / counts)[piece["targets"]]

    def order(self) -> np.ndarray:
        """Numbers of the examples, shuffled once; with balanced sampling the rare classes repeated."""
        rng = np.random.default_rng(self.config.seed)
        if self.split != "train":
            return np.arange(len(self.pieces))
        if self.config.task.balanced_sampling and self.config.task.name == "classify":
            labels = np.array([piece["label"] for piece in self.pieces])
            most = np.bincount(labels).max()
            repeated = lambda c: np.resize(rng.permutation(np.flatnonzero(labels == c)), most)
            return rng.permutation(np.concatenate([repeated(c) for c in np.unique(labels)]))
        return rng.permutation(len(self.pieces)) if self.config.data.shuffle else np.arange(len(self.pieces))

    def pack(self) -> list[list[int]]:
        """First fit into the rows that are still open; validation examples stay in order. Says how many are cut."""
        d, cut, rows, open_rows = self.config.data, 0, [], []
        most = d.examples_per_row if d.pack else 1
        for i in self.order():
            n, enc_n = piece_lengths(self.pieces[i])
            cut += n > d.seq_len or enc_n > d.enc_len
            n, enc_n = min(n, d.seq_len), min(enc_n, d.enc_len)
            found = next((r for r in open_rows if r[1] >= n and r[2] >= enc_n), None)
            if found is None:
                found = [len(rows), d.seq_len, d.enc_len]
                rows.append([])
                open_rows.append(found)
            rows[found[0]].append(int(i))
            found[1], found[2] = found[1] - n, found[2] - enc_n
            if len(rows[found[0]]) == most or found[1] < 4:
                open_rows.remove(found)
            open_rows = open_rows[-64:]
        if cut:
            logging.getLogger("jaxlm").warning(
                "%s of %s %s examples are longer than data.seq_len=%d%s, and cut off there", f"{cut:,}",
                f"{len(self.pieces):,}", self.split, d.seq_len, f" or enc_len={d.enc_len}" if enc_n else "",
            )  # fmt: skip
        return rows

    def read(self, rows: np.ndarray, keys: list[tuple]) -> dict[str, np.ndarray]:
        """The batch of these row numbers; one past the end is padding. keys: of what is random in each row."""
        laid = [
            lay_out([self.pieces[i] for i in self.rows[r]] if r < len(self.rows) else [], self.config) for r in rows
        ]
        batch = {key: np.stack([row[key] for row in laid]) for key in laid[0]}
        if self.config.data.word_dropout and self.split == "train":
            name = "enc_tokens" if "enc_tokens" in batch else "tokens"
            chance = np.stack([np.random.default_rng(key).random(batch[name].shape[1:]) for key in keys])
            hide = (chance < self.config.data.word_dropout) & (batch[name] < self.tokenizer.vocab_size)
            batch[name] = np.where(hide, self.vocab.mask, batch[name])
        return batch

    @property
    def unit(self) -> str:
        return "labels" if self.config.task.name in LABELLED else "tokens"
