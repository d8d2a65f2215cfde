"""Examples as a source of batches: the records of a table become pieces, and pieces are packed into rows.

All of it is kept in memory as token ids: examples are few beside the text of pretraining.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.config.tasks import GROUP, TASKS, TEXT_COLUMNS, task_of
from jaxlm.data.files.paths import parts_of, paths_of, relative
from jaxlm.data.files.tables import read_examples, refuse
from jaxlm.data.row_layout import lay_out, piece_lengths
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.data.tokenization import vocabulary
from jaxlm.data.tokenization.base import replace_surrogates
from jaxlm.data.transforms import (
    ALLOWED,
    EXAMPLES,
    START,
    STOP,
    Vocabulary,
    answer_text,
    first_of,
    label_of,
    messages_of,
    split_names,
    words_of,
)
from jaxlm.errors import DataError, UserError

LOGGER = logging.getLogger("jaxlm")
INEXACT = 0.01  # more answers than this share: a tokenizer that is made for them is made finer
OPEN = 64  # rows that are filled at one time
TEXTS = (*TEXT_COLUMNS, "words", "answer")


def texts_of(examples: list[dict], lowercase: bool) -> list[str]:
    """All text of the examples, to make a tokenizer from."""
    texts = []
    for example in examples:
        found = []
        for role in TEXTS:
            if role in example and not is_dialogue(example[role]):
                found.append(example[role])
        if "messages" in example or is_dialogue(example.get("prompt")):
            messages = said_in(example)
            found += [str(m.get("content", "")) for m in messages if isinstance(m, dict)]
        texts += [" ".join(map(str, x)) if isinstance(x, (list, tuple)) else str(x) for x in found]
    return [replace_surrogates(text.lower() if lowercase else text)[0] for text in texts]


def said_in(example: dict) -> list:
    """The messages of an example; none of what can't be read, which is refused with its place later."""
    try:
        return messages_of(example)
    except ValueError:
        return []


def examples_of(spec: str, task: str, columns: str) -> tuple[list[dict], list[str]]:
    """(the examples of files, where each is from). Read again when a file has changed, not when it is named anew."""
    spec = relative(spec)  # a run makes paths absolute after its first look
    return _examples_of(spec, task, columns, stamps(spec))


def stamps(spec: str) -> tuple:
    stats = []
    for path in paths_of(spec):
        for part in parts_of(path):
            if os.path.exists(part):
                stats.append((part, os.stat(part)))
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)


@lru_cache(maxsize=4)
def _examples_of(spec, task, columns, stamps):
    examples, places = read_examples(spec, task, columns)
    kept = []
    bad = []
    for example, place in zip(examples, places):
        try:
            if TASKS[task].answer == "class" and isinstance(example["label"], (list, tuple, dict)):
                raise ValueError(
                    "its label is a list, not one class; several are of task.name=multilabel"
                )
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
        example |= {
            "answer": list(answer.get("text", ())),
            "start": list(answer.get("answer_start", ())),
        }
    if "answer" in example:
        example["answer"] = answer_of(example["answer"])
    for role in TEXTS:
        value = example.get(role, "")
        if not isinstance(value, str) and role not in ("words", "answer"):
            if role == "prompt" and is_dialogue(value):
                continue
            if isinstance(value, (list, tuple, dict)):
                raise ValueError(f"its {role} is a {type(value).__name__}, not text")
            example[role] = label_of(value)
    return example


def answer_of(value):
    """An answer as text, several as a list of texts, None for none; a number is text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return [answer_of(item) for item in value]
    if isinstance(value, dict):
        raise ValueError(f"its answer is text, or a list of texts, not {str(value)[:60]}")
    return label_of(value)


def is_dialogue(value) -> bool:
    """Whether a prompt is of several messages."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(item, dict) for item in value)
    )


def training_examples(data: ConfigDict | FrozenConfigDict, task: str) -> list[dict]:
    return examples_of(data.train, task, data.columns)[0]


def tokenizer_of(data: FrozenConfigDict, task: str):
    """The tokenizer that config.data.tokenizer names, made from data.train where it is a kind."""
    if data.tokenizer not in vocabulary.MADE:
        return tokenizers.load(data.tokenizer)
    train = relative(data.train)
    return _made(data.tokenizer, data.vocab_size, data.min_count, data.lowercase, task, data.columns, train,
                 stamps(train))  # fmt: skip


@lru_cache(maxsize=4)
def _made(kind, vocab_size, min_count, lowercase, task, columns, train, stamps):
    examples = examples_of(train, task, columns)[0]
    texts = texts_of(examples, lowercase)
    if TASKS[task].answer == "span":
        texts.append(
            " "
        )  # which stands for all white space of a context, also where it has new lines alone
    try:
        made = vocabulary.make(kind, texts, vocab_size, min_count)
        if TASKS[task].answer != "span" or kind not in ("words", "sentencepiece"):
            return made
        finer = partial(vocabulary.make, kind, texts, vocab_size, min_count, apart=True)
        return _fit_for_answers(made, finer, examples, lowercase)
    except UserError as error:  # it names the flags of jaxlm.data.prepare
        raise type(error)(str(error).replace("--", "--config.data.")) from None


def _fit_for_answers(made, make_finer: Callable, examples: list[dict], lowercase: bool):
    """A tokenizer, or where answers begin or end inside of its tokens and a finer one mends that, the finer one."""
    share = inexact_answers(made, examples, lowercase)
    if share <= INEXACT:
        return made
    finer = make_finer()
    left = inexact_answers(finer, examples, lowercase)
    if left > share / 2:
        return made
    LOGGER.warning(
        f"{share:.0%} of the answers of data.train begin or end inside of a token, so data.tokenizer={made.name} is "
        f"made finer: punctuation marks, and characters of scripts without spaces, are apart ({left:.0%} are left)"
    )
    return finer


def inexact_answers(tokenizer, examples: list[dict], lowercase: bool) -> float:
    """The share of the first 1,000 examples whose answers begin or end inside of a token."""
    encode = Encoder(tokenizer, lowercase)
    vocab = Vocabulary(tokenizer, "qa")
    exact = []
    for example in examples[:1000]:
        with suppress(
            KeyError, ValueError, TypeError, AttributeError
        ):  # told where all examples are read
            exact.append(EXAMPLES["qa"](example, encode, vocab, ())["exact"])
    return exact.count(False) / max(len(exact), 1)


class Encoder:
    """text -> int32 ids of the text of examples, which is made lower case where config.data.lowercase says so."""

    def __init__(self, tokenizer, lowercase: bool):
        self.tokenizer = tokenizer
        self.lowercase = lowercase

    def __call__(self, text, after: str = "") -> np.ndarray:
        """after: what comes before it in its document; see Tokenizer.encode."""
        return self.tokenizer.encode(self.spelling(str(text)), after)

    def with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids, the characters of `text` that each stands for): see Tokenizer.encode_with_offsets."""
        spelled = self.spelling(text)
        ids, offsets = self.tokenizer.encode_with_offsets(spelled)
        if len(spelled) == len(text):
            return ids, offsets
        # A few letters become two in lower case: \u0130 is i and a dot.
        lengths = [len(self.spelling(character)) for character in text]
        origin = np.repeat(np.arange(len(text)), lengths)
        first = np.append(origin, len(text))[offsets[:, 0]]
        last = np.append(0, origin + 1)[offsets[:, 1]]
        return ids, np.stack([first, np.maximum(first, last)], axis=1)

    def spelling(self, text: str) -> str:
        if self.lowercase:
            return text.lower()
        return text


NAMES = {  # Task.answer -> the labels of an example
    "class": lambda example: [label_of(example["label"])],
    "labels": lambda example: split_names(example["label"]),
    "tags": lambda example: words_of(example["tags"]),
}


def label_names(config: ConfigDict) -> tuple[str, ...]:
    """The classes or tags of config.data.labels, or of the training examples, sorted: 2 before 10."""
    task = config.task.name
    train = config.data.train
    if config.data.labels or not TASKS[task].has_label_names:
        return tuple(map(str, config.data.labels))
    examples = training_examples(config.data, task)
    counts = Counter(name for example in examples for name in NAMES[TASKS[task].answer](example))
    names = sorted(
        counts, key=(lambda name: (len(name), name)) if all(map(str.isdecimal, counts)) else None
    )
    if TASKS[task].answer == "class" and "" in counts:
        examples, places = examples_of(train, task, config.data.columns)
        refuse(
            [
                f"{where}: its label is empty"
                for where, e in zip(places, examples)
                if not label_of(e["label"])
            ]
        )
    if TASKS[task].answer == "class" and len(examples) >= 20 and len(names) > len(examples) / 2:
        order = 'Are the columns in another order? Say --config.data.columns="text=1 label=0"'
        if config.data.columns:
            order = f"Are config.data.columns={config.data.columns!r} right?"
        else:
            order = order
        raise DataError(
            f"{train}: {len(names):,} different labels in {len(examples):,} examples, such as {names[0][:60]!r}: that "
            f"is no classification. {order}, or give config.data.labels"
        )
    if len(names) < 2 and TASKS[task].answer != "labels":
        raise DataError(
            f"{train}: every example has the label {''.join(names)!r}; there is nothing to tell apart"
        )
    return tuple(names)


def first_learned(piece: dict, task: str) -> int:
    """Positions of a piece, from its beginning, that hold something to learn: a target that counts.

    Of a pair (dpo) that is one of each side, of qa the whole answer; what has no weights is learned from the first on.
    """
    if TASKS[task].answer == "span":  # half an answer is none
        return int(np.argmax(piece["targets"] & STOP > 0)) + 1
    if TASKS[task].labels_examples or "weights" not in piece:
        return 1
    counts = piece["weights"] > 0
    return int(counts.argmax(axis=-1).max()) + 1


def with_known_labels(
    examples: list[dict], places: list[str], config: ConfigDict
) -> tuple[list[dict], list[str]]:
    """Those whose labels the model knows, and where they are from; how many others there are is told.

    All of them where it knows the labels of none: then these are probably no labels, which is refused later.
    """
    names_of = NAMES.get(task_of(config).answer)
    known = set(label_names(config))
    kept = []
    others = Counter()
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
        data = FrozenConfigDict(config.data)
        task = config.task.name
        self.config = config
        self.split = split
        self.tokenizer = tokenizer or tokenizer_of(data, task)
        self.vocab = Vocabulary(self.tokenizer, task)
        if examples is None:
            self.examples, places = examples_of(
                {"train": data.train, "val": data.val}[split], task, data.columns
            )
        else:
            self.examples = list(examples)
            places = [f"example {number}" for number in range(1, len(examples) + 1)]
        if only_known_labels:
            self.examples, places = with_known_labels(self.examples, places, config)
        names = label_names(config)
        self.encode = Encoder(self.tokenizer, data.lowercase)
        self.pieces = []
        bad = []
        for i, example in enumerate(self.examples):
            try:
                if examples is not None:
                    self.examples[i] = example = plain(example)
                self.pieces.append(
                    EXAMPLES[TASKS[task].transform](example, self.encode, self.vocab, names)
                )
            except KeyError as error:
                bad.append(f"{places[i]}: no {error.args[0]}; it has {', '.join(example)}")
            except (ValueError, TypeError, AttributeError) as error:
                bad.append(f"{places[i]}: {error}")
        refuse(bad)
        if TASKS[task].answer == "span" and examples is None:
            self.tell_inexact()
        if TASKS[task].is_preference and examples is None:
            self.tell_equal()
        self.weigh(names)
        self.learnable = np.ones(
            len(self.pieces), bool
        )  # of which a target is left where they are cut off
        if examples is None:
            self.leave_out()
        self.rows = self.pack()
        learned = [
            {role: x for role, x in example.items() if role != GROUP} for example in self.examples
        ]
        known = [learned, names, data.lowercase]
        if not self.learnable.all():  # the batches of older versions had them
            known.append(int(self.learnable.sum()))
        digest = hashlib.sha256(json.dumps(known, default=str).encode())
        self.fingerprint = hashlib.sha256(
            (digest.hexdigest() + self.tokenizer.fingerprint).encode()
        ).hexdigest()

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(sum(piece_lengths(piece)) for piece in self.pieces)

    def tell_inexact(self) -> None:
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

    def tell_equal(self) -> None:
        """Says how many pairs teach nothing, because both answers are the same. Raises DataError where all are so."""
        equal = []
        for example in self.examples:
            if example["chosen"] == example["rejected"]:
                equal.append(example)
        if not equal:
            return
        told = (
            f"{len(equal):,} of {len(self.examples):,} {self.split} pairs have the same answer as chosen and as "
            f"rejected, so that nothing is learned of them, such as {str(equal[0]['chosen'])[:40]!r}"
        )
        if len(equal) == len(self.examples):
            if self.split == "train":
                files = self.config.data.train
            else:
                files = self.config.data.val
            raise DataError(f"{files}: {told}; are the columns right?")
        LOGGER.warning(told)

    def weigh(self, names) -> None:
        """Gives training examples the weight of their class, so that every class weighs the same."""
        task = self.config.task
        if (
            self.split != "train"
            or task.class_weights == "none"
            or not task_of(self.config).has_classes
        ):
            return
        if task_of(self.config).answer == "class":
            counts = np.bincount([piece["label"] for piece in self.pieces], minlength=len(names))
            for piece in self.pieces:
                piece["weight"] = len(self.pieces) / len(names) / counts[piece["label"]]
        else:
            every = np.concatenate(
                [piece["targets"][piece["weights"] > 0] for piece in self.pieces]
            )
            counts = np.maximum(np.bincount(every, minlength=len(names)), 1)
            for piece in self.pieces:
                piece["weights"] = (
                    piece["weights"] * (len(every) / len(names) / counts)[piece["targets"]]
                )

    def leave_out(self) -> None:
        """Finds the training examples of which cutting leaves nothing to learn. Raises DataError where all are so."""
        needs = np.array(
            [first_learned(piece, self.config.task.name) for piece in self.pieces], int
        )
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
        """What is wrong where no example has a target left, and the lengths that would do."""
        d = self.config.data
        files = d.train if self.split == "train" else d.val
        longest = max(piece_lengths(piece)[0] for piece in self.pieces)
        if needs.min() == needs.max():
            some = ""
        else:
            some = f", {needs.min()} for something of one"
        return (
            f"{files}: nothing is left to learn of any of the {len(needs):,} {self.split} examples: what comes before "
            f"it fills data.seq_len={d.seq_len}, and the rest is cut off. Give --config.data.seq_len={longest}, which "
            f"holds all of them whole; {needs.max()} would do for something of each{some}"
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
            labels = np.array([piece["label"] for piece in self.pieces])
            most = np.bincount(labels).max()

            def repeated(c):
                return np.resize(rng.permutation(np.flatnonzero(labels == c)), most)

            return rng.permutation(np.concatenate([repeated(c) for c in np.unique(labels)]))
        if self.config.data.shuffle:
            return rng.permutation(len(self.pieces))
        return np.arange(len(self.pieces))

    def pack(self) -> list[list[int]]:
        """First fit into the rows that are still open; validation examples stay in order. Says how many are cut."""
        d = self.config.data
        rows = []
        most = d.examples_per_row if d.pack else 1
        lengths = np.array([piece_lengths(piece) for piece in self.pieces]).reshape(-1, 2)
        taken = np.minimum(lengths, (d.seq_len, d.enc_len))
        space = np.zeros((OPEN, 2), int)
        # of the open rows; the one that was opened first gives way
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
        for i in cut if task_of(self.config).answer == "span" else ():  # half an answer is none
            targets = self.pieces[i]["targets"]
            if not (targets[: d.seq_len] & STOP).any():
                self.pieces[i] |= {
                    "targets": targets & ALLOWED,
                    "weights": np.zeros(len(targets), np.float32),
                }
        if len(cut):
            if lengths[:, 1].any():
                source = f" (sources: data.enc_len={d.enc_len})"
            else:
                source = ""
            LOGGER.warning(
                f"{len(cut):,} of {len(self.pieces):,} {self.split} examples are longer than data.seq_len={d.seq_len}"
                f"{source} and are cut off there, the longest has {lengths.max():,} tokens"
            )
        return rows

    def read(self, rows: np.ndarray, keys: list[tuple]) -> dict[str, np.ndarray]:
        """The batch of these row numbers; one past the end is padding. keys: of what is random in each row."""
        laid = []
        for r in rows:
            laid.append(
                lay_out(
                    [self.pieces[i] for i in self.rows[r]] if r < len(self.rows) else [],
                    self.config,
                )
            )
        batch = {}
        for key in laid[0]:
            batch[key] = np.stack([row[key] for row in laid])
        if self.config.data.word_dropout and self.split == "train":
            name = "enc_tokens" if "enc_tokens" in batch else "tokens"
            chance = np.stack(
                [np.random.default_rng(key).random(batch[name].shape[1:]) for key in keys]
            )
            real = batch["enc_segments" if name == "enc_tokens" else "segments"] > 0
            hide = (
                (chance < self.config.data.word_dropout)
                & (batch[name] < self.tokenizer.vocab_size)
                & real
            )
            batch[name] = np.where(hide, self.vocab.mask, batch[name])
        return batch

    @property
    def unit(self) -> str:
        if task_of(self.config).labels_examples:
            return "labels"
        return "tokens"
