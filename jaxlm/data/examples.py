"""Examples as a source of batches: the records of a table become pieces, and pieces are packed into rows.

All of it is kept in memory as token ids: examples are few beside the text of pretraining.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.data import tokenizer as tokenizers
from jaxlm.data import vocabulary
from jaxlm.data.rows import lay_out, piece_lengths
from jaxlm.data.tables import parts_of, paths_of, read_examples, refuse
from jaxlm.data.tokenizer import replace_surrogates
from jaxlm.data.transforms import ALLOWED, EXAMPLES, STOP, Vocabulary, label_of, messages_of, split_names, words_of
from jaxlm.errors import DataError, UserError
from jaxlm.keys import GROUP, LABELLED

LOGGER = logging.getLogger("jaxlm")
OPEN = 64  # rows that are filled at one time
TEXTS = "text text2 words question context answer source target prompt response chosen rejected".split()


def texts_of(examples: list[dict], lowercase: bool) -> list[str]:
    """All text of the examples, to make a tokenizer from."""
    texts = []
    for example in examples:
        found = [example[role] for role in TEXTS if role in example]
        if "messages" in example:
            messages = messages_of(example)
            found += [str(m.get("content", "")) for m in messages if isinstance(m, dict)]
        texts += [" ".join(map(str, x)) if isinstance(x, (list, tuple)) else str(x) for x in found]
    return [replace_surrogates(text.lower() if lowercase else text)[0] for text in texts]


def examples_of(spec: str, task: str, columns: str) -> tuple[list[dict], list[str]]:
    """(the examples of files, where each is from). Read again when a file has changed."""
    return _examples_of(spec, task, columns, stamps(spec))


def stamps(spec: str) -> tuple:
    stats = [(part, os.stat(part)) for path in paths_of(spec) for part in parts_of(path) if os.path.exists(part)]
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)


@lru_cache(maxsize=4)
def _examples_of(spec, task, columns, stamps):
    examples, places = read_examples(spec, task, columns)
    kept, bad = [], []
    for example, place in zip(examples, places):
        try:
            kept.append(plain(example))
        except ValueError as error:
            bad.append(f"{place}: {error}")
    refuse(bad)
    return kept, places


def plain(example: dict) -> dict:
    """An example whose texts are str. SQuAD's {"text": [...], "answer_start": [...]} becomes answer and start."""
    example = dict(example)
    if isinstance(example.get("answer"), dict):
        answer = example["answer"]
        example |= {"answer": list(answer.get("text", ())), "start": list(answer.get("answer_start", ()))}
    for role in TEXTS:
        value = example.get(role, "")
        if not isinstance(value, str) and role not in ("words", "answer"):
            if isinstance(value, (list, tuple, dict)):
                raise ValueError(f"its {role} is a {type(value).__name__}, not text")
            example[role] = label_of(value)
    return example


def training_examples(data: ConfigDict | FrozenConfigDict, task: str) -> list[dict]:
    return examples_of(data.train, task, data.columns)[0]


def tokenizer_of(data: FrozenConfigDict, task: str):
    """The tokenizer that config.data.tokenizer names, made from data.train where it is a kind."""
    if data.tokenizer not in vocabulary.MADE:
        return tokenizers.load(data.tokenizer)
    return _made(data.tokenizer, data.vocab_size, data.min_count, data.lowercase, task, data.columns, data.train,
                 stamps(data.train))  # fmt: skip


@lru_cache(maxsize=4)
def _made(kind, vocab_size, min_count, lowercase, task, columns, train, stamps):
    texts = texts_of(examples_of(train, task, columns)[0], lowercase)
    try:
        return vocabulary.make(kind, texts, vocab_size, min_count)
    except UserError as error:  # it names the flags of jaxlm.data.prepare
        raise type(error)(str(error).replace("--", "--config.data.")) from None


def encoder_of(tokenizer, lowercase: bool):
    """text -> ids."""
    return lambda text: tokenizer.encode(str(text).lower() if lowercase else str(text))


NAMES = {  # the labels of an example
    "classify": lambda example: [label_of(example["label"])],
    "multilabel": lambda example: split_names(example["label"]),
    "tag": lambda example: words_of(example["tags"]),
}


def label_names(config: ConfigDict) -> tuple[str, ...]:
    """The classes or tags of config.data.labels, or of the training examples, sorted: 2 before 10."""
    task, train = config.task.name, config.data.train
    if config.data.labels or task not in NAMES:
        return tuple(map(str, config.data.labels))
    examples = training_examples(config.data, task)
    counts = Counter(name for example in examples for name in NAMES[task](example))
    names = sorted(counts, key=(lambda name: (len(name), name)) if all(map(str.isdecimal, counts)) else None)
    if task == "classify" and "" in counts:
        examples, places = examples_of(train, task, config.data.columns)
        refuse([f"{where}: its label is empty" for where, e in zip(places, examples) if not label_of(e["label"])])
    if task == "classify" and len(examples) >= 20 and len(names) > len(examples) / 2:
        order = 'Are the columns in another order? Say --config.data.columns="text=1 label=0"'
        order = f"Are config.data.columns={config.data.columns!r} right?" if config.data.columns else order
        raise DataError(
            f"{train}: {len(names):,} different labels in {len(examples):,} examples, such as {names[0][:60]!r}: that "
            f"is no classification. {order}, or give config.data.labels"
        )
    if len(names) < 2 and task != "multilabel":
        raise DataError(f"{train}: every example has the label {''.join(names)!r}; there is nothing to tell apart")
    return tuple(names)


def with_known_labels(examples: list[dict], places: list[str], config: ConfigDict) -> tuple[list[dict], list[str]]:
    """Those whose labels the model knows, and where they are from; how many others there are is told.

    All of them where it knows the labels of none: then these are probably no labels, which is refused later.
    """
    names_of, known = NAMES.get(config.task.name), set(label_names(config))
    kept, others = [], Counter()
    for example, place in zip(examples, places):
        unknown = labels_beside(example, names_of, known)
        others.update(unknown)
        if not unknown:
            kept.append((example, place))
    if not others or not kept:
        return examples, places
    most = ", ".join(f"{name[:40]!r} {count:,}" for name, count in others.most_common(5))
    most += ", ..." if len(others) > 5 else ""
    LOGGER.warning(
        f"left out of all figures: {len(examples) - len(kept):,} of {len(examples):,} examples, whose labels the model "
        f"was not trained with, so that it can't be right there: {most}"
    )
    return [example for example, _ in kept], [place for _, place in kept]


def labels_beside(example: dict, names_of: Callable | None, known: set[str]) -> set[str]:
    """The labels of an example that are not among these; none where it has no labels, or odd ones."""
    if names_of is None:
        return set()
    try:
        return {name for name in names_of(example) if name and name not in known}
    except (KeyError, ValueError, TypeError, AttributeError):
        return set()


class Examples:
    """The rows of config.data.train, or of another file, as a source of batches.

    tokenizer: a model's, or None for the config's own. examples: instead of those in files. Attributes: `examples`,
    dicts of the task's columns, `pieces` of them, and `rows`, of each row the numbers of its examples.
    only_known_labels: examples of other labels than the training's are left out, which is told, instead of refused.
    """

    def __init__(
        self,
        config: ConfigDict,
        split: str,
        tokenizer=None,
        examples: list[dict] | None = None,
        only_known_labels: bool = False,
    ):
        data, task = FrozenConfigDict(config.data), config.task.name
        self.config, self.split = config, split
        self.tokenizer = tokenizer or tokenizer_of(data, task)
        self.vocab = Vocabulary(self.tokenizer, task)
        if examples is None:
            self.examples, places = examples_of({"train": data.train, "val": data.val}[split], task, data.columns)
        else:
            self.examples, places = list(examples), [f"example {number}" for number in range(1, len(examples) + 1)]
        if only_known_labels:
            self.examples, places = with_known_labels(self.examples, places, config)
        names = label_names(config)
        self.encode = encoder_of(self.tokenizer, data.lowercase)
        self.pieces, bad = [], []
        for i, example in enumerate(self.examples):
            try:
                if examples is not None:
                    self.examples[i] = example = plain(example)
                self.pieces.append(EXAMPLES[task](example, self.encode, self.vocab, names))
            except KeyError as error:
                bad.append(f"{places[i]}: no {error.args[0]}; it has {', '.join(example)}")
            except (ValueError, TypeError, AttributeError) as error:
                bad.append(f"{places[i]}: {error}")
        refuse(bad)
        self.weigh(names)
        self.rows = self.pack()
        learned = [{role: x for role, x in example.items() if role != GROUP} for example in self.examples]
        digest = hashlib.sha256(json.dumps([learned, names, data.lowercase], default=str).encode())
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
        d, rows, lost = self.config.data, [], 0
        most = d.examples_per_row if d.pack else 1
        lengths = np.array([piece_lengths(piece) for piece in self.pieces]).reshape(-1, 2)
        taken, space = np.minimum(lengths, (d.seq_len, d.enc_len)), np.zeros((OPEN, 2), int)
        numbers, slot = np.zeros(OPEN, int), 0  # of the open rows; the one that was opened first gives way
        for i in self.order():
            fits = (space[:, 0] >= taken[i, 0]) & (space[:, 1] >= taken[i, 1])
            at = int(fits.argmax())
            if not fits[at]:
                at, slot = slot, (slot + 1) % OPEN
                numbers[at], space[at] = len(rows), (d.seq_len, d.enc_len)
                rows.append([])
            rows[numbers[at]].append(int(i))
            space[at] -= taken[i]
            if len(rows[numbers[at]]) == most:
                space[at] = -1
        cut = np.flatnonzero((lengths > taken).any(axis=1))
        for i in cut if self.config.task.name == "qa" else ():  # half an answer is none
            targets = self.pieces[i]["targets"]
            if not (targets[: d.seq_len] & STOP).any():
                self.pieces[i] |= {"targets": targets & ALLOWED, "weights": np.zeros(len(targets), np.float32)}
        if len(cut):
            if self.config.task.name not in LABELLED:
                lost = sum(
                    not self.pieces[i]["weights"][..., : d.seq_len].any() for i in cut if "weights" in self.pieces[i]
                )
            source = f" (sources: data.enc_len={d.enc_len})" if lengths[:, 1].any() else ""
            LOGGER.warning(
                f"{len(cut):,} of {len(self.pieces):,} {self.split} examples are longer than data.seq_len={d.seq_len}"
                f"{source} and are cut off there, the longest has {lengths.max():,} tokens"
                + (f"; of {lost:,} of them nothing is left to learn" if lost else "")
            )
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
            real = batch["enc_segments" if name == "enc_tokens" else "segments"] > 0
            hide = (chance < self.config.data.word_dropout) & (batch[name] < self.tokenizer.vocab_size) & real
            batch[name] = np.where(hide, self.vocab.mask, batch[name])
        return batch

    @property
    def unit(self) -> str:
        return "labels" if self.config.task.name in LABELLED else "tokens"
