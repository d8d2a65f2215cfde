"""The examples of files as Python values, read again where a file changes, and the tokenizer made of their text."""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.config.tasks import TASKS, TEXT_COLUMNS
from jaxlm.data.files.dialogues import messages_of
from jaxlm.data.files.paths import parts_of, paths_of, relative
from jaxlm.data.files.tables import read_examples, refuse
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.data.tokenization import vocabulary
from jaxlm.data.tokenization.base import replace_surrogates
from jaxlm.data.transforms import EXAMPLES, Vocabulary, label_of
from jaxlm.errors import UserError

LOGGER = logging.getLogger("jaxlm")
INEXACT = 0.01  # more answers than this share: a tokenizer that is made for them is made finer
TRIED = 1000  # examples, to see whether answers are inexact
TEXTS = (*TEXT_COLUMNS, "words", "answer")


def examples_of(spec: str, task: str, columns: str) -> tuple[list[dict], list[str]]:
    """(the examples of files, where each is from). Read again only when a file has changed.

    Raises DataError of all that is wrong with them.
    """
    spec = relative(spec)  # a run makes paths absolute after its first look
    return _examples_of(spec, task, columns, stamps(spec))


def training_examples(data: ConfigDict | FrozenConfigDict, task: str) -> list[dict]:
    return examples_of(data.train, task, data.columns)[0]


def stamps(spec: str) -> tuple:
    """(path, time of the last change in ns, bytes) of each file of a spec."""
    stats = []
    for path in paths_of(spec):
        for part in parts_of(path):
            if os.path.exists(part):
                stat = os.stat(part)
                stats.append((part, stat.st_mtime_ns, stat.st_size))
    return tuple(stats)


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
    """An example whose texts are str. SQuAD's {"text": [...], "answer_start": [...]} becomes answer and start.

    Raises ValueError where a text is something else.
    """
    example = dict(example)
    answer = example.get("answer")
    if isinstance(answer, dict):
        example["answer"] = list(answer.get("text", ()))
        example["start"] = list(answer.get("answer_start", ()))
    if "answer" in example:
        example["answer"] = answer_of(example["answer"])
    for role in TEXTS:
        value = example.get(role, "")
        if isinstance(value, str) or role in ("words", "answer"):
            continue
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
        return list(map(answer_of, value))
    if isinstance(value, dict):
        raise ValueError(f"its answer is text, or a list of texts, not {str(value)[:60]}")
    return label_of(value)


def is_dialogue(value) -> bool:
    """Whether a prompt is of several messages."""
    return isinstance(value, (list, tuple)) and set(map(type, value)) == {dict}


# ---------------------------------------------------------------- their text, and a tokenizer made of it


def texts_of(examples: list[dict], lowercase: bool) -> list[str]:
    """All text of the examples, to make a tokenizer from."""
    texts = []
    for example in examples:
        for value in texts_in(example):
            text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            if lowercase:
                text = text.lower()
            texts.append(replace_surrogates(text)[0])
    return texts


def texts_in(example: dict) -> list:
    """The texts of an example, those of its messages too, as they are there."""
    found = [example[role] for role in TEXTS if role in example and not is_dialogue(example[role])]
    if "messages" in example or is_dialogue(example.get("prompt")):
        for message in readable_messages(example):
            if isinstance(message, dict):
                found.append(str(message.get("content", "")))
    return found


def readable_messages(example: dict) -> list:
    """The messages of an example; none of what can't be read, which is refused with its place later."""
    try:
        return messages_of(example)
    except ValueError:
        return []


def tokenizer_of(data: FrozenConfigDict, task: str):
    """The tokenizer that config.data.tokenizer names, made from data.train where it is a kind.

    Raises DataError where a file can't be read, ConfigError where data.vocab_size is too small for the text.
    """
    if data.tokenizer not in vocabulary.MADE:
        return tokenizers.load(data.tokenizer)
    train = relative(data.train)
    options = (data.tokenizer, data.vocab_size, data.min_count)
    return _made(options, data.lowercase, task, data.columns, train, stamps(train))


@lru_cache(maxsize=4)
def _made(options, lowercase, task, columns, train, stamps):
    examples = examples_of(train, task, columns)[0]
    texts = texts_of(examples, lowercase)
    if TASKS[task].answer == "span":
        # It stands for all white space of a context, also where it has new lines alone.
        texts.append(" ")
    kind, vocab_size, min_count = options
    make = partial(vocabulary.make, kind, texts, vocab_size, min_count)
    try:
        if TASKS[task].answer != "span" or kind not in ("words", "sentencepiece"):
            return make()
        return _fit_for_answers(make, examples, lowercase)
    except UserError as error:  # it names the flags of jaxlm.data.prepare
        raise type(error)(str(error).replace("--", "--config.data.")) from None


def _fit_for_answers(make: Callable, examples: list[dict], lowercase: bool):
    """A tokenizer, or where answers begin or end inside of its tokens and a finer one mends that, the finer one."""
    made = make()
    share = inexact_answers(made, examples, lowercase)
    if share <= INEXACT:
        return made
    finer = make(apart=True)
    left = inexact_answers(finer, examples, lowercase)
    if left > share / 2:
        return made
    LOGGER.warning(
        f"{share:.0%} of the answers of data.train begin or end inside of a token, so data.tokenizer={made.name} is "
        f"made finer: punctuation marks, and characters of scripts without spaces, are apart ({left:.0%} are left)"
    )
    return finer


def inexact_answers(tokenizer, examples: list[dict], lowercase: bool) -> float:
    """The share of the first TRIED examples whose answers begin or end inside of a token."""
    encode = Encoder(tokenizer, lowercase)
    vocab = Vocabulary(tokenizer, "qa")
    exact = []
    for example in examples[:TRIED]:
        # What is wrong is reported where all examples are read.
        with suppress(KeyError, ValueError, TypeError, AttributeError):
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
