"""Examples as a source of batches: the records of a table become pieces, and pieces are packed into rows.

All of it is kept in memory as token ids: examples are few beside the text of pretraining.
"""

import hashlib
import json
import logging

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.config.tasks import GROUP, TASKS, task_of
from jaxlm.data.answers import ALLOWED, START, STOP, answer_text, first_of
from jaxlm.data.example_records import Encoder, examples_of, plain, tokenizer_of
from jaxlm.data.files.tables import refuse
from jaxlm.data.labels import label_names, with_known_labels
from jaxlm.data.row_layout import lay_out, piece_lengths
from jaxlm.data.transforms import EXAMPLES, Vocabulary
from jaxlm.errors import DataError

LOGGER = logging.getLogger("jaxlm")
OPEN = 64  # rows that are filled at one time


def first_learned(piece: dict, task: str) -> int:
    """How many positions of a piece, from its beginning, hold something to learn: a target that counts.

    Of a pair (dpo) that is one of each side, of qa the whole answer; what has no weights is learned from the first on.
    """
    if TASKS[task].answer == "span":  # half an answer is none
        return int(np.argmax(piece["targets"] & STOP > 0)) + 1
    if TASKS[task].labels_examples or "weights" not in piece:
        return 1
    counts = piece["weights"] > 0
    return int(counts.argmax(axis=-1).max()) + 1


class Examples:
    """The rows of config.data.train, or of another file, as a source of batches.

    tokenizer: a model's, or None for the config's own. examples: instead of those in files. Attributes: `examples`,
    dicts of the task's columns, `pieces` of them, and `rows`, of each row the numbers of its examples.
    only_known_labels: examples of other labels than the training's are left out, with a warning, instead of refused.
    """

    def __init__(
        self,
        config: ConfigDict,
        split: str,
        tokenizer=None,
        examples: list[dict] | None = None,
        only_known_labels: bool = False,
    ):
        data = FrozenConfigDict(config.data)
        task = config.task.name
        self.config = config
        self.split = split
        self.tokenizer = tokenizer or tokenizer_of(data, task)
        self.vocab = Vocabulary(self.tokenizer, task)
        self.encode = Encoder(self.tokenizer, data.lowercase)
        in_files = examples is None
        if in_files:
            files = {"train": data.train, "val": data.val}[split]
            self.examples, places = examples_of(files, task, data.columns)
        else:
            self.examples = list(examples)
            places = [f"example {number}" for number in range(1, len(examples) + 1)]
        if only_known_labels:
            self.examples, places = with_known_labels(self.examples, places, config)
        names = label_names(config)
        self.pieces = self.make_pieces(places, names, are_plain=in_files)
        if TASKS[task].answer == "span" and in_files:
            self.warn_of_inexact_answers()
        if TASKS[task].is_preference and in_files:
            self.warn_of_equal_answers()
        self.weigh(names)
        # Of which a target is left where they are cut off.
        self.learnable = np.ones(len(self.pieces), bool)
        if in_files:
            self.leave_out()
        self.rows = self.pack()
        self.fingerprint = self.hash_examples(names)

    def make_pieces(self, places: list[str], names: tuple[str, ...], are_plain: bool) -> list[dict]:
        """The piece of each example. Raises DataError that names every example that is wrong."""
        make = EXAMPLES[task_of(self.config).transform]
        pieces = []
        bad = []
        for i, place in enumerate(places):
            try:
                if not are_plain:
                    self.examples[i] = plain(self.examples[i])
                pieces.append(make(self.examples[i], self.encode, self.vocab, names))
            except KeyError as error:
                bad.append(f"{place}: no {error.args[0]}; it has {', '.join(self.examples[i])}")
            except (ValueError, TypeError, AttributeError) as error:
                bad.append(f"{place}: {error}")
        refuse(bad)
        return pieces

    def hash_examples(self, names: tuple[str, ...]) -> str:
        """SHA-256, in hex, of what is learned from the examples, and of the tokenizer."""
        examples = []
        for example in self.examples:
            examples.append({role: value for role, value in example.items() if role != GROUP})
        known = [examples, names, self.config.data.lowercase]
        if not self.learnable.all():  # the batches of older versions had them
            known.append(int(self.learnable.sum()))
        digest = hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()
        return hashlib.sha256((digest + self.tokenizer.fingerprint).encode()).hexdigest()

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, map(piece_lengths, self.pieces)))

    def warn_of_inexact_answers(self) -> None:
        """Says how many answers begin or end inside of a token, so that no model can give just them."""
        inexact = [number for number, piece in enumerate(self.pieces) if not piece["exact"]]
        if not inexact:
            return
        example = self.examples[inexact[0]]
        piece = self.pieces[inexact[0]]
        first = int(np.flatnonzero(piece["targets"] & START)[0])
        last = int(np.flatnonzero(piece["targets"] & STOP)[0])
        given = answer_text(example, self.encode, first, last)
        LOGGER.warning(
            f"{len(inexact):,} of {len(self.pieces):,} {self.split} answers begin or end inside of a token of the "
            f"{self.tokenizer.name} tokenizer and can't be given exactly, such as {first_of(example['answer'])[:40]!r} "
            f"in {given[:60]!r}; data.tokenizer=bytes and chars have no such tokens"
        )

    def warn_of_equal_answers(self) -> None:
        """Says how many pairs teach nothing, because both answers are the same. Raises DataError where all are so."""
        equal = [example for example in self.examples if example["chosen"] == example["rejected"]]
        if not equal:
            return
        message = (
            f"{len(equal):,} of {len(self.examples):,} {self.split} pairs have the same answer as chosen and as "
            f"rejected, so that nothing is learned of them, such as {str(equal[0]['chosen'])[:40]!r}"
        )
        if len(equal) == len(self.examples):
            raise DataError(f"{self.files}: {message}; are the columns right?")
        LOGGER.warning(message)

    @property
    def files(self) -> str:
        """The files of this split, as config.data names them."""
        if self.split == "train":
            return self.config.data.train
        return self.config.data.val

    def labels(self) -> np.ndarray:
        """int [examples]: the class of each example."""
        return np.array([piece["label"] for piece in self.pieces])

    def weigh(self, names) -> None:
        """Gives training examples the weight of their class, so that every class weighs the same."""
        task = self.config.task
        if self.split != "train" or task.class_weights == "none":
            return
        answer = task_of(self.config).answer
        if answer == "class":
            counts = np.bincount(self.labels(), minlength=len(names))
            for piece in self.pieces:
                piece["weight"] = len(self.pieces) / len(names) / counts[piece["label"]]
        if answer == "tags":
            tags = [piece["targets"][piece["weights"] > 0] for piece in self.pieces]
            every = np.concatenate(tags)
            counts = np.maximum(np.bincount(every, minlength=len(names)), 1)
            weights = len(every) / len(names) / counts
            for piece in self.pieces:
                piece["weights"] = piece["weights"] * weights[piece["targets"]]

    def leave_out(self) -> None:
        """Finds the training examples of which cutting leaves nothing to learn. Raises DataError where all are so."""
        task = self.config.task.name
        needs = np.array([first_learned(piece, task) for piece in self.pieces], int)
        left = needs <= self.config.data.seq_len
        if left.all():
            return
        if not left.any():
            raise DataError(self.nothing_left(needs))
        then = "do not count in the loss"
        if self.split == "train":
            self.learnable = left
            then = "are left out"
        LOGGER.warning(
            f"{(~left).sum():,} of {len(left):,} {self.split} examples {then}: what is to be learned of them lies "
            f"beyond data.seq_len={self.config.data.seq_len}; --config.data.seq_len={needs.max()} would reach it in all"
        )

    def nothing_left(self, needs: np.ndarray) -> str:
        """What is wrong where no example has a target left, and the lengths that would do. needs: int [examples]."""
        longest = max(piece_lengths(piece)[0] for piece in self.pieces)
        some = ""
        if needs.min() != needs.max():
            some = f", {needs.min()} for something of one"
        return (
            f"{self.files}: nothing is left to learn of any of the {len(needs):,} {self.split} examples: what comes "
            f"before it fills data.seq_len={self.config.data.seq_len}, and the rest is cut off. Give "
            f"--config.data.seq_len={longest}, which holds all of them whole; {needs.max()} would do for something of "
            f"each{some}"
        )

    def order(self) -> np.ndarray:
        """Numbers of the examples to learn or to measure on, shuffled once; balanced sampling repeats rare classes."""
        numbers = self.shuffled()
        return numbers[self.learnable[numbers]]

    def shuffled(self) -> np.ndarray:
        rng = np.random.default_rng(self.config.seed)
        if self.split != "train":
            return np.arange(len(self.pieces))
        if self.config.task.balanced_sampling and task_of(self.config).answer == "class":
            labels = self.labels()
            most = np.bincount(labels).max()
            repeated = []
            for label in np.unique(labels):
                of_label = rng.permutation(np.flatnonzero(labels == label))
                repeated.append(np.resize(of_label, most))
            return rng.permutation(np.concatenate(repeated))
        if self.config.data.shuffle:
            return rng.permutation(len(self.pieces))
        return np.arange(len(self.pieces))

    def pack(self) -> list[list[int]]:
        """Numbers of the examples in each row. Each goes into the first of the open rows that has room for it;
        validation examples stay in order. Says how many are cut off."""
        d = self.config.data
        rows = []
        most = d.examples_per_row if d.pack else 1
        lengths = np.array(list(map(piece_lengths, self.pieces))).reshape(-1, 2)
        taken = np.minimum(lengths, (d.seq_len, d.enc_len))
        # Of the open rows: what is left of each, and its number. The one that was opened first gives way.
        space = np.zeros((OPEN, 2), int)
        numbers = np.zeros(OPEN, int)
        slot = 0
        for i in self.order():
            fits = (space[:, 0] >= taken[i, 0]) & (space[:, 1] >= taken[i, 1])
            at = int(fits.argmax())
            if not fits[at]:
                at = slot
                slot = (slot + 1) % OPEN
                numbers[at] = len(rows)
                space[at] = (d.seq_len, d.enc_len)
                rows.append([])
            rows[numbers[at]].append(int(i))
            space[at] -= taken[i]
            if len(rows[numbers[at]]) == most:
                space[at] = -1
        cut = np.flatnonzero((lengths > taken).any(axis=1))
        if len(cut):
            self.drop_half_answers(cut)
            source = f" (sources: data.enc_len={d.enc_len})" if lengths[:, 1].any() else ""
            LOGGER.warning(
                f"{len(cut):,} of {len(self.pieces):,} {self.split} examples are longer than data.seq_len={d.seq_len}"
                f"{source} and are cut off there, the longest has {lengths.max():,} tokens"
            )
        return rows

    def drop_half_answers(self, cut: np.ndarray) -> None:
        """Takes the answer out of the pieces of qa whose answer is cut off: half an answer is none."""
        if task_of(self.config).answer != "span":
            return
        for i in cut:
            targets = self.pieces[i]["targets"]
            if not (targets[: self.config.data.seq_len] & STOP).any():
                self.pieces[i]["targets"] = targets & ALLOWED
                self.pieces[i]["weights"] = np.zeros(len(targets), np.float32)

    def read(self, rows: np.ndarray, keys: list[tuple]) -> dict[str, np.ndarray]:
        """The batch of these row numbers; one past the end is padding. keys: of what is random in each row."""
        laid = []
        for row in rows:
            numbers = self.rows[row] if row < len(self.rows) else []
            laid.append(lay_out([self.pieces[i] for i in numbers], self.config))
        batch = {}
        for key in laid[0]:
            batch[key] = np.stack([row[key] for row in laid])
        if self.config.data.word_dropout and self.split == "train":
            self.hide_words(batch, keys)
        return batch

    def hide_words(self, batch: dict[str, np.ndarray], keys: list[tuple]) -> None:
        """Puts the mask in place of words of a batch, or of its sources, by chance; what follows from keys[i] in row
        i."""
        prefix = "enc_" if "enc_tokens" in batch else ""
        tokens = batch[prefix + "tokens"]
        chances = []
        for key in keys:
            chances.append(np.random.default_rng(key).random(tokens.shape[1:]))
        hide = np.stack(chances) < self.config.data.word_dropout
        hide &= (tokens < self.tokenizer.vocab_size) & (batch[prefix + "segments"] > 0)
        batch[prefix + "tokens"] = np.where(hide, self.vocab.mask, tokens)

    @property
    def unit(self) -> str:
        if task_of(self.config).labels_examples:
            return "labels"
        return "tokens"
