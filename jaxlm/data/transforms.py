"""What is learned, as data: a document or an example becomes a *piece*, which row_layout.py lays out in a batch.

A piece is a dict of 1-D arrays: `tokens`, and of their length `targets`, `weights` and `reach` where the task has them;
`enc_tokens`, the source; and `label`. TOKENS makes one of a stretch of a document (its ids, the inputs that predict
them), EXAMPLES of an example (a dict of its columns). To add an objective, add a function to one of the two tables and
name it in a record of jaxlm/config/tasks.py.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jaxlm.cli import did_you_mean
from jaxlm.config.tasks import TASKS
from jaxlm.data.answers import (
    ALLOWED,
    START,
    STOP,
    encode_context,
    place_of_answer,
    tokens_of,
    without_spaces,
)
from jaxlm.data.files.dialogues import messages_of, refuse_message, weight_of

# Ids after the tokenizer's, in order.
SPECIALS = "begin end mask user assistant system prefix suffix middle".split()
MODES = "span_mode long_mode tail_mode".split()  # UL2's denoisers
SENTINELS = 100  # T5: as many
NOISE_POWER = 0.75  # of the counts by which negatives are drawn (Mikolov et al. 2013)
LABELS_SHOWN = 20


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the special ids of a task: attributes begin, end, mask, ..., `sentinel(i)`.

    shares: of each token in the training data, float64 [vocabulary], where the task asks for them.
    """

    tokenizer: object
    task: str
    shares: np.ndarray | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        added = {
            "none": 0,
            "roles": len(SPECIALS),
            "sentinels": len(SPECIALS) + len(MODES) + SENTINELS,
        }
        return self.tokenizer.vocab_size + added[TASKS[self.task].special_tokens]

    def __getattr__(self, name: str) -> int:
        names = SPECIALS + MODES
        if name not in names:
            raise AttributeError(name)
        return self.tokenizer.vocab_size + names.index(name)

    def sentinel(self, i: int) -> int:
        return self.tokenizer.vocab_size + len(SPECIALS) + len(MODES) + i

    @property
    def end_id(self) -> int | None:
        """What ends a text that the model writes."""
        if TASKS[self.task].special_tokens == "none":
            return self.tokenizer.eos_id
        return self.end

    @cached_property
    def spaces(self) -> np.ndarray:
        """bool [2, vocabulary]: whether a token begins a word, and ends one: a space goes with the word after it."""
        size = self.tokenizer.vocab_size
        if self.tokenizer.name == "words":
            return np.ones((2, size), bool)
        spaces = np.zeros((2, size), bool)
        for i, text in enumerate(self._texts()):
            spaces[0, i] = text[:1].isspace()
            spaces[1, i] = text[-1:].isspace() and not text.isspace()
        if self.tokenizer.eos_id is not None:
            spaces[:, self.tokenizer.eos_id] = True
        return spaces

    def _texts(self) -> list[str]:
        """The text of each token after another one: some decoders drop a space that comes first."""
        decode = self.tokenizer.decode
        ids = range(self.tokenizer.vocab_size)
        before = next((i for i in ids if decode([i]).strip()), 0)
        known = len(decode([before]))
        return [decode([before, i])[known:] for i in ids]

    @cached_property
    def noise(self) -> np.ndarray:
        """float64 [vocabulary]: summed up to each token, the chances by which negatives are drawn."""
        summed = np.cumsum(self.shares**NOISE_POWER)
        return summed / summed[-1]

    def words(self, ids: np.ndarray) -> np.ndarray:
        """int [len(ids)]: the number of the word that each token is of."""
        begins, ends = self.spaces[:, np.minimum(ids, self.tokenizer.vocab_size - 1)]
        return np.cumsum(begins | np.roll(ends, 1))


# ---------------------------------------------------------------- of a stream of tokens


def mlm(ids, inputs, rng, task, vocab) -> dict:
    """Masked tokens (Devlin et al. 2019): of those chosen 80% are hidden, 10% replaced, 10% left as they are."""
    if task.whole_words:
        groups = vocab.words(ids)
    else:
        groups = np.arange(len(ids))
    _, group = np.unique(groups, return_inverse=True)
    chosen = (rng.random(group.max() + 1) < task.mask_rate)[group] & (ids != vocab.tokenizer.eos_id)
    fate = rng.random(len(ids))
    tokens = np.where(chosen & (fate < 0.8), vocab.mask, ids)
    random = rng.integers(0, vocab.tokenizer.vocab_size, len(ids))
    tokens = np.where(chosen & (fate >= 0.8) & (fate < 0.9), random, tokens)
    return {"tokens": tokens, "targets": ids, "weights": chosen.astype(np.float32)}


def prefix_lm(ids, inputs, rng, task, vocab) -> dict:
    """A random prefix is read in both directions, the rest is learned (Raffel et al. 2020).

    reach: int [tokens], the last place that each token sees.
    """
    cut = rng.integers(1, max(len(ids), 2))
    place = np.arange(len(ids))
    reach = np.where(place < cut, cut - 1, place)
    return {"tokens": inputs, "targets": ids, "weights": place + 1 >= cut, "reach": reach}


def fim(ids, inputs, rng, task, vocab) -> dict:
    """Fill in the middle (Bavarian et al. 2022), in the order prefix, suffix, middle, of part of the documents."""
    if len(ids) < 3 or rng.random() >= task.fim_rate:
        return {"tokens": inputs, "targets": ids}
    first, second = np.sort(rng.integers(0, len(ids) + 1, 2))
    parts = (
        vocab.prefix,
        ids[:first],
        vocab.suffix,
        ids[second:],
        vocab.middle,
        ids[first:second],
        vocab.end,
    )
    return shifted(join(*parts))


def join(*parts) -> np.ndarray:
    """Ids and arrays of ids, one after the other, int32."""
    return np.concatenate([np.atleast_1d(np.asarray(part, np.int32)) for part in parts])


def shifted(ids) -> dict:
    """Each token predicts the next."""
    return {"tokens": ids[:-1], "targets": ids[1:]}


def spans(length: int, rate: float, mean: float, rng) -> np.ndarray:
    """bool [length]: hidden spans of about `mean` tokens, `rate` of all (T5: random_spans_noise_mask)."""
    hidden = min(max(round(length * rate), 1), max(length - 1, 1))
    count = min(max(round(hidden / mean), 1), hidden, max(length - hidden, 1), SENTINELS)
    if length - hidden < count:
        return np.ones(length, bool)
    shown_lengths = random_lengths(length - hidden, count, rng)
    hidden_lengths = random_lengths(hidden, count, rng)
    lengths = np.stack([shown_lengths, hidden_lengths], 1).ravel()
    return np.repeat(np.arange(2 * count) % 2 == 1, lengths)


def random_lengths(total: int, count: int, rng) -> np.ndarray:
    """int [count]: the lengths of parts, each 1 or more, that a total is cut into at random."""
    cuts = rng.choice(np.arange(1, total), count - 1, replace=False)
    return np.diff([0, *np.sort(cuts), total])


def corrupt(ids, hidden, vocab) -> dict:
    """Source: a sentinel for each hidden span; target: the sentinels, each with its span (Raffel et al. 2020)."""
    begins = hidden & ~np.roll(hidden, 1)
    begins[0] = hidden[0]
    source = np.where(hidden, vocab.sentinel(np.cumsum(begins) - 1), ids)[~hidden | begins]
    sentinels = vocab.sentinel(np.arange(begins.sum()))
    places = np.flatnonzero(begins[hidden])
    target = np.insert(ids[hidden], places, sentinels)
    return two_sided(source, target, vocab)


def two_sided(source, target, vocab) -> dict:
    return {"enc_tokens": join(source, vocab.end)} | shifted(join(vocab.begin, target, vocab.end))


def span_corruption(ids, inputs, rng, task, vocab) -> dict:
    return corrupt(ids, spans(len(ids), task.mask_rate, task.span_length, rng), vocab)


def ul2(ids, inputs, rng, task, vocab) -> dict:
    """A mixture of denoisers (Tay et al. 2022): short spans, long or many spans, or the tail; the source says which."""
    mode = rng.integers(len(MODES))
    name = MODES[mode]
    length = len(ids)
    if name == "tail_mode":
        kept = round(length * (1 - rng.uniform(0.1, 0.5)))
        hidden = np.arange(length) >= max(kept, 1)
    elif name == "long_mode":
        kinds = ((0.5, task.span_length), (task.mask_rate, 32.0), (0.5, 32.0))
        rate, mean = kinds[rng.integers(len(kinds))]
        hidden = spans(length, rate, mean, rng)
    else:
        hidden = spans(length, task.mask_rate, task.span_length, rng)
    if not hidden.any():
        hidden = np.ones(length, bool)
    piece = corrupt(ids, hidden, vocab)
    return piece | {"enc_tokens": join(getattr(vocab, name), piece["enc_tokens"])}


def skipgram(ids, inputs, rng, task, vocab) -> dict:
    """Each token predicts one at a random distance of at most task.window (Mikolov et al. 2013).

    task.subsample passes over common ones before distances are counted; those that are left then have several turns,
    so that the piece stays as long. negatives: int [task.negatives, tokens].
    """
    length = len(ids)
    turns = 1
    if task.subsample:
        ids = thinned(ids, task.subsample, rng, vocab)
        turns = -(-length // len(ids))
    place = np.tile(np.arange(len(ids)), turns)[:length]
    furthest = np.minimum(np.maximum(place, len(ids) - 1 - place), task.window)
    distance = rng.integers(1, np.maximum(furthest, 1) + 1) * rng.choice([-1, 1], length)
    ahead = place + distance
    there = np.where((ahead >= 0) & (ahead < len(ids)), ahead, place - distance)
    inside = (there >= 0) & (there < len(ids))
    piece = {"tokens": ids[place], "targets": ids[np.where(inside, there, 0)], "weights": inside}
    if task.negatives:
        chances = rng.random((task.negatives, length))
        piece["negatives"] = np.searchsorted(vocab.noise, chances, side="right")
    return piece


def thinned(ids, subsample: float, rng, vocab) -> np.ndarray:
    """The ids without some of the common ones; where none would be left, the first."""
    chances = np.sqrt(subsample / np.maximum(vocab.shares[ids], subsample))
    kept = ids[rng.random(len(ids)) < chances]
    if len(kept):
        return kept
    return ids[:1]


TOKENS: dict[str, Callable] = {
    "mlm": mlm,
    "prefix_lm": prefix_lm,
    "fim": fim,
    "span_corruption": span_corruption,
    "ul2": ul2,
    "skipgram": skipgram,
}


# ---------------------------------------------------------------- of examples


def classify(example, encode, vocab, labels) -> dict:
    """label: one of `labels`, as its number."""
    label = number_of(label_of(example["label"]), labels)
    return {"tokens": encode_texts(example, encode, vocab), "label": label}


def encode_texts(example, encode, vocab) -> np.ndarray:
    """int32 [tokens]: begin, then the text, or both texts, each with `end`."""
    parts = [vocab.begin]
    for name in ("text", "text2"):
        if name in example:
            parts += [encode(example[name]), vocab.end]
    return join(*parts)


def label_of(value) -> str:
    """The name of a label: 1, 1.0 and "1" are the same one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def number_of(label: str, labels) -> int:
    """The number of a label. Raises ValueError where it is none of them."""
    if label in labels:
        return labels.index(label)
    if not label:
        raise ValueError("its label is empty")
    known = ", ".join(labels[:LABELS_SHOWN])
    if len(labels) > LABELS_SHOWN:
        known += f" and {len(labels) - LABELS_SHOWN} more"
    raise ValueError(
        f"{label[:60]!r} is not one of the labels {known}{did_you_mean(label, labels)} (they are those of data.train, "
        "or of data.labels)"
    )


def multilabel(example, encode, vocab, labels) -> dict:
    """label: float32 [labels], 1 for each name; the names are joined by commas, or a list, and may be none."""
    given = np.zeros(len(labels), np.float32)
    for name in split_names(example["label"]):
        given[number_of(name, labels)] = 1
    return {"tokens": encode_texts(example, encode, vocab), "label": given}


def split_names(value) -> list[str]:
    """The names of labels, joined by commas or in a list."""
    if not isinstance(value, (list, tuple)):
        value = label_of(value).split(",")
    return list(filter(None, map(label_of, value)))


def regress(example, encode, vocab, labels) -> dict:
    """label: float32. Raises ValueError where it is no number, or beyond float32."""
    given = str(example["label"])[:60]
    try:
        label = float(example["label"])
    except (ValueError, TypeError):
        label = math.nan
    if not math.isfinite(label):
        hint = ""
        if re.fullmatch(r"\s*[+-]?\d+,\d+\s*", given):
            hint = "; a decimal point is meant"
        raise ValueError(f"its label {given!r} is not a number{hint}")
    largest = float(np.finfo(np.float32).max)
    if abs(label) > largest:
        raise ValueError(
            f"its label {given!r} is too large: a float32 holds up to {largest:.2g}; scale them all down"
        )
    label = np.float32(example["label"])
    return {"tokens": encode_texts(example, encode, vocab), "label": label}


def tag(example, encode, vocab, labels) -> dict:
    """The tag of a word is that of its first token. words, tags: lists, or joined by spaces.

    Raises ValueError where there are not as many tags as words, or none.
    """
    words = words_of(example["words"])
    tags = words_of(example["tags"])
    if not words:
        raise ValueError("it has no words")
    if len(words) != len(tags):
        raise ValueError(f"{len(words)} words and {len(tags)} tags")
    ids, owners = encode_words(words, encode, vocab.mask)
    numbers = np.array([number_of(name, labels) for name in tags], np.int32)
    first = np.diff(owners, prepend=-1) > 0
    return {"tokens": ids, "targets": numbers[owners], "weights": first.astype(np.float32)}


def encode_words(words: list[str], encode, missing: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids of the words with a space between two, int: the number of the word that each token is of).

    A space goes with the word after it. A word without a token of its own gets `missing`.
    """
    text = " ".join(words)
    ids, offsets = encode.with_offsets(text)
    lengths = [len(word) + 1 for word in words]
    begins = np.cumsum([0, *lengths[:-1]])
    owners = np.searchsorted(begins, without_spaces(text, offsets)[:, 0], side="right") - 1
    absent = np.setdiff1d(np.arange(len(words)), owners)
    places = np.searchsorted(owners, absent)
    return join(np.insert(ids, places, missing)), np.insert(owners, places, absent)


def words_of(value) -> list[str]:
    """Words, or tags, of a list or of a text with spaces between them."""
    if isinstance(value, str):
        return value.split()
    return list(map(label_of, value))


def qa(example, encode, vocab, labels) -> dict:
    """The first and the last token of the answer's characters; without an answer (SQuAD 2), the first token of all.

    answer: text, or a list of texts of which the first is learned; start: its character, else where it is first found.
    `exact`: whether the answer is just what these tokens stand for.
    """
    context = example["context"]
    answer, start = place_of_answer(example)
    ids, offsets = encode_context(context, encode)
    question = join(vocab.begin, encode(example["question"]), vocab.end)
    tokens = join(question, ids)
    targets = np.zeros(len(tokens), np.int32)
    targets[0] = ALLOWED
    targets[len(question) :] = ALLOWED
    first = 0
    last = 0
    exact = True
    if answer:
        first, last = tokens_of(start, start + len(answer), offsets)
        exact = context[offsets[first, 0] : offsets[last, 1]] == answer
        first = len(question) + first
        last = len(question) + last
    targets[first] |= START
    targets[last] |= STOP
    weights = (targets & START != 0).astype(np.float32)
    return {"tokens": tokens, "targets": targets, "weights": weights, "exact": exact}


def seq2seq(example, encode, vocab, labels) -> dict:
    return two_sided(encode(example["source"]), encode(example["target"]), vocab)


def chat(messages, encode, vocab) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [tokens], bool [tokens]: which of them are learned): begin, then of each message its role, its text and
    `end`.

    Learned is what the assistant says, but for messages of weight 0. Raises ValueError of what is no message.
    """
    ids = [vocab.begin]
    learned = [np.zeros(1, bool)]
    for message in messages:
        refuse_message(message)
        role = message["role"]
        text = join(encode(message["content"]), vocab.end)
        is_learned = role == "assistant" and weight_of(message) == 1
        ids += [getattr(vocab, role), text]
        learned += [np.zeros(1, bool), np.full(len(text), is_learned)]
    return join(*ids), np.concatenate(learned)


def sft(example, encode, vocab, labels) -> dict:
    """Only what the assistant says is learned. Raises ValueError where that is nothing."""
    messages = messages_of(example)
    ids, learned = chat(messages, encode, vocab)
    if not {"messages", "response"} & set(example):
        raise ValueError(
            f"it has no messages, and its response is missing or empty; it has {', '.join(example)}"
        )
    if not learned.any():
        reason = "the assistant says nothing in it"
        if any(message["role"] == "assistant" for message in messages):
            reason = "all that the assistant says in it has weight 0"
        raise ValueError(f"{reason}, so that there is nothing to learn")
    return shifted(ids) | {"weights": learned[1:].astype(np.float32)}


def dpo(example, encode, vocab, labels) -> dict:
    """Two dialogues with the same prompt, [2, tokens]: the chosen and the rejected; only these answers count."""
    before = []
    for message in messages_of({"prompt": example["prompt"]}):
        before.append(message | {"weight": 0})
    both = []
    for name in ("chosen", "rejected"):
        answer = {"role": "assistant", "content": example[name]}
        both.append(sft({"messages": [*before, answer]}, encode, vocab, labels))
    length = max(len(side["tokens"]) for side in both)
    pair = {"label": 0}
    for key in both[0]:
        sides = [np.pad(side[key], (0, length - len(side[key]))) for side in both]
        pair[key] = np.stack(sides)
    return pair


EXAMPLES: dict[str, Callable] = {
    "classify": classify,
    "multilabel": multilabel,
    "regress": regress,
    "tag": tag,
    "qa": qa,
    "seq2seq": seq2seq,
    "sft": sft,
    "dpo": dpo,
}
