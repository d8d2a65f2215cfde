"""What is learned, as data: a document or an example becomes a *piece*, which row_layout.py lays out in a batch.

A piece is a dict of 1-D arrays: `tokens`, and of their length `targets`, `weights` and `reach` where the task has them;
`enc_tokens`, the source; and `label`. TOKENS makes one of a stretch of a document (its ids, the inputs that foretell
them), EXAMPLES of an example (a dict of its columns). To add an objective, add a function to one of the two tables and
name it in a record of jaxlm/config/tasks.py.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jaxlm.cli import did_you_mean
from jaxlm.config.tasks import TASKS

SPECIALS = (
    "begin end mask user assistant system prefix suffix middle".split()
)  # ids after the tokenizer's, in order
MODES = "span_mode long_mode tail_mode".split()  # UL2's denoisers
SENTINELS = 100  # T5: as many
NOISE_POWER = 0.75  # of the counts by which negatives are drawn (Mikolov et al. 2013)


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
        decode = self.tokenizer.decode
        size = self.tokenizer.vocab_size
        if self.tokenizer.name == "words":
            return np.ones((2, size), bool)
        before = next(
            (i for i in range(size) if decode([i]).strip()), 0
        )  # some decoders drop a space that comes first
        known = len(decode([before]))
        texts = [decode([before, i])[known:] for i in range(size)]
        ends = []
        for text in texts:
            ends.append((text[:1].isspace(), text[-1:].isspace() and not text.isspace()))
        spaces = np.array(ends, bool).T
        if self.tokenizer.eos_id is not None:
            spaces[:, self.tokenizer.eos_id] = True
        return spaces

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
    """A random prefix is read in both directions, the rest is learned (Raffel et al. 2020)."""
    cut = rng.integers(1, max(len(ids), 2))
    place = np.arange(len(ids))
    return {
        "tokens": inputs,
        "targets": ids,
        "weights": place + 1 >= cut,
        "reach": np.where(place < cut, cut - 1, place),
    }


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
    """Each token foretells the next."""
    return {"tokens": ids[:-1], "targets": ids[1:]}


def spans(length: int, rate: float, mean: float, rng) -> np.ndarray:
    """bool [length]: hidden spans of about `mean` tokens, `rate` of all (T5: random_spans_noise_mask)."""
    hidden = min(max(round(length * rate), 1), max(length - 1, 1))
    count = min(max(round(hidden / mean), 1), hidden, max(length - hidden, 1), SENTINELS)

    def cut(total):
        return np.diff(
            [0, *np.sort(rng.choice(np.arange(1, total), count - 1, replace=False)), total]
        )

    if length - hidden < count:
        return np.ones(length, bool)
    lengths = np.stack([cut(length - hidden), cut(hidden)], 1).ravel()
    return np.repeat(np.arange(2 * count) % 2 == 1, lengths)


def corrupt(ids, hidden, vocab) -> dict:
    """Source: a sentinel for each hidden span; target: the sentinels, each with its span (Raffel et al. 2020)."""
    begins = hidden & ~np.roll(hidden, 1)
    begins[0] = hidden[0]
    source = np.where(hidden, vocab.sentinel(np.cumsum(begins) - 1), ids)[~hidden | begins]
    sentinels = vocab.sentinel(np.arange(begins.sum()))
    return two_sided(
        source, np.insert(ids[hidden], np.flatnonzero(begins[hidden]), sentinels), vocab
    )


def two_sided(source, target, vocab) -> dict:
    return {"enc_tokens": join(source, vocab.end)} | shifted(join(vocab.begin, target, vocab.end))


def span_corruption(ids, inputs, rng, task, vocab) -> dict:
    return corrupt(ids, spans(len(ids), task.mask_rate, task.span_length, rng), vocab)


def ul2(ids, inputs, rng, task, vocab) -> dict:
    """A mixture of denoisers (Tay et al. 2022): short spans, long or many spans, or the tail; the source says which."""
    mode = rng.integers(3)
    if mode == 2:
        hidden = np.arange(len(ids)) >= max(round(len(ids) * (1 - rng.uniform(0.1, 0.5))), 1)
    else:
        long = ((0.5, task.span_length), (task.mask_rate, 32.0), (0.5, 32.0))
        rate, mean = long[rng.integers(3)] if mode else (task.mask_rate, task.span_length)
        hidden = spans(len(ids), rate, mean, rng)
    piece = corrupt(ids, hidden if hidden.any() else np.ones(len(ids), bool), vocab)
    return piece | {"enc_tokens": join(getattr(vocab, MODES[mode]), piece["enc_tokens"])}


def skipgram(ids, inputs, rng, task, vocab) -> dict:
    """Each token foretells one at a random distance of at most task.window (Mikolov et al. 2013).

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
    there = np.where(
        (place + distance >= 0) & (place + distance < len(ids)), place + distance, place - distance
    )
    inside = (there >= 0) & (there < len(ids))
    piece = {"tokens": ids[place], "targets": ids[np.where(inside, there, 0)], "weights": inside}
    if task.negatives:
        piece["negatives"] = np.searchsorted(
            vocab.noise, rng.random((task.negatives, length)), side="right"
        )
    return piece


def thinned(ids, subsample: float, rng, vocab) -> np.ndarray:
    """The ids without some of the common ones; where none would be left, the first."""
    chances = np.sqrt(subsample / np.maximum(vocab.shares[ids], subsample))
    kept = ids[rng.random(len(ids)) < chances]
    if len(kept):
        return kept
    return ids[:1]


TOKENS: dict[str, Callable] = {
    f.__name__: f for f in (mlm, prefix_lm, fim, span_corruption, ul2, skipgram)
}


# ---------------------------------------------------------------- of examples


def classify(example, encode, vocab, labels) -> dict:
    return {
        "tokens": texts_of(example, encode, vocab),
        "label": number_of(label_of(example["label"]), labels),
    }


def texts_of(example, encode, vocab) -> np.ndarray:
    texts = [example[name] for name in ("text", "text2") if name in example]
    return join(vocab.begin, *(part for text in texts for part in (encode(text), vocab.end)))


def label_of(value) -> str:
    """The name of a label: 1, 1.0 and "1" are the same one."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def number_of(label: str, labels) -> int:
    if label in labels:
        return labels.index(label)
    if not label:
        raise ValueError("its label is empty")
    known = ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
    raise ValueError(
        f"{label[:60]!r} is not one of the labels {known}{did_you_mean(label, labels)} (they are those of data.train, "
        "or of data.labels)"
    )


def multilabel(example, encode, vocab, labels) -> dict:
    """label: names joined by commas, or a list; none is allowed."""
    given = np.zeros(len(labels), np.float32)
    given[[number_of(name, labels) for name in split_names(example["label"])]] = 1
    return {"tokens": texts_of(example, encode, vocab), "label": given}


def split_names(value) -> list[str]:
    if isinstance(value, (list, tuple)):
        value = value
    else:
        value = label_of(value).split(",")
    return [name for name in map(label_of, value) if name]


def regress(example, encode, vocab, labels) -> dict:
    given = str(example["label"])[:60]
    try:
        label = float(example["label"])
    except (ValueError, TypeError):
        label = math.nan
    if not math.isfinite(label):
        if re.fullmatch(r"\s*[+-]?\d+,\d+\s*", given):
            hint = "; a decimal point is meant"
        else:
            hint = ""
        raise ValueError(f"its label {given!r} is not a number{hint}")
    largest = float(np.finfo(np.float32).max)
    if abs(label) > largest:
        raise ValueError(
            f"its label {given!r} is too large: a float32 holds up to {largest:.2g}; scale them all down"
        )
    label = np.float32(example["label"])
    return {"tokens": texts_of(example, encode, vocab), "label": label}


def tag(example, encode, vocab, labels) -> dict:
    """The tag of a word is that of its first token. words, tags: lists, or joined by spaces."""
    words = words_of(example["words"])
    tags = words_of(example["tags"])
    if len(words) != len(tags) or not words:
        raise ValueError(f"{len(words)} words and {len(tags)} tags" if words else "it has no words")
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


def without_spaces(text: str, offsets: np.ndarray) -> np.ndarray:
    """Offsets without the space that a token begins or ends with. text: has single spaces, and no others."""
    spaces = np.array([character == " " for character in text] + [False])
    begin = offsets[:, 0]
    end = offsets[:, 1]
    begin = begin + (spaces[begin] & (begin < end))
    end = end - (spaces[end - 1] & (begin < end))
    return np.stack([begin, end], axis=1)


def words_of(value) -> list[str]:
    if isinstance(value, str):
        return value.split()
    return [label_of(item) for item in value]


# bits of qa's targets: the answer's first and last token, and where it may lie
START = 1
STOP = 2
ALLOWED = 4


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


def tokens_of(start: int, stop: int, offsets: np.ndarray) -> tuple[int, int]:
    """The first and the last token of characters `start` to `stop`; a space in front goes with the word after it."""
    inside = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
    if not len(inside):
        raise ValueError("the tokenizer has no token for its answer")
    first = int(inside[0])
    last = int(inside[-1])
    while first > 0 and (offsets[first - 1] == offsets[first, 0]).all():
        first -= 1
    return first, last


def place_of_answer(example) -> tuple[str, int]:
    """(the answer without white space around it, its first character in the context); ("", 0) where there is none."""
    context = example["context"]
    answer = first_of(example["answer"])
    start = first_of(example.get("start", -1))
    if not answer or not answer.strip():
        return "", 0
    start = whole_number(-1 if start in ("", None) else start, "start")
    there = context[start : start + len(answer)]
    if start >= 0 and there != answer:
        raise ValueError(
            f"at character start={start} of its context is {there[:40]!r}, not the answer {answer[:40]!r}; without the "
            "column start the answer is looked for"
        )
    if start < 0:
        start = context.find(answer)
    if start < 0:
        raise ValueError(f"its answer {answer[:60]!r} is not in its context")
    return answer.strip(), start + len(answer) - len(answer.lstrip())


def whole_number(value, name: str) -> int:
    try:
        number = float(value)
    except (ValueError, TypeError):
        number = float("nan")
    if not number.is_integer():
        raise ValueError(f"its {name} {str(value)[:60]!r} is not a whole number")
    return int(number)


def first_of(value):
    if isinstance(value, (list, tuple)):
        if value:
            return value[0]
        return None
    return value


def encode_context(context: str, encode) -> tuple[np.ndarray, np.ndarray]:
    """(ids of the words of a context with one space between two, [ids, 2]: the characters of the context of each).

    Spaces around a token's characters are left out.
    """
    spans = [word.span() for word in re.finditer(r"\S+", context)]
    text = " ".join(context[begin:end] for begin, end in spans)
    ids, offsets = encode.with_offsets(text)
    offsets = without_spaces(text, offsets)
    # The place of each character of `text` in the context; a space is at the end of the word before it.
    places = np.concatenate(
        [np.arange(begin, end + 1) for begin, end in spans] or [np.zeros(1, int)]
    )
    begin = offsets[:, 0]
    end = offsets[:, 1]
    after = np.where(begin < end, places[end - 1] + 1, places[begin])
    return ids, np.stack([places[begin], after], axis=1)


def answer_text(example, encode, first: int, last: int) -> str:
    """The characters of the context that tokens `first` to `last` of `qa`'s piece stand for; "" for the first token."""
    ids, offsets = encode_context(example["context"], encode)
    before = 2 + len(encode(example["question"]))
    if first < before or last < first or last - before >= len(ids):
        return ""
    return example["context"][offsets[first - before, 0] : offsets[last - before, 1]].strip()


def seq2seq(example, encode, vocab, labels) -> dict:
    return two_sided(encode(example["source"]), encode(example["target"]), vocab)


def chat(messages, encode, vocab) -> tuple[np.ndarray, np.ndarray]:
    """(ids, which of them are learned): begin, then for each message its role, its text and `end`.

    Learned is what the assistant says, but for messages of weight 0.
    """
    ids = [np.array([vocab.begin])]
    written = [np.zeros(1, bool)]
    for message in messages:
        if not (isinstance(message, dict) and {"role", "content"} <= set(message)):
            raise ValueError(
                f'a message is {{"role": ..., "content": ...}}, not {str(message)[:60]}'
            )
        role = message["role"]
        content = message["content"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"the role {role!r} is not system, user or assistant")
        if not isinstance(content, str):
            raise ValueError(f"the content of a message is text, not {str(content)[:60]}")
        weight = message.get("weight")
        weight = 1 if weight is None else weight  # a table has None where there is none
        if weight not in (0, 1):
            raise ValueError(
                f"the weight of a message is 0 (not learned) or 1, not {repr(weight)[:60]}"
            )
        text = join(encode(content), vocab.end)
        ids += [np.array([getattr(vocab, role)]), text]
        written += [np.zeros(1, bool), np.full(len(text), role == "assistant" and weight == 1)]
    return join(*ids), np.concatenate(written)


def from_json(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"messages is a list of messages, or that in JSON, not {text[:60]!r}: {error}"
        ) from None


def messages_of(example) -> list[dict]:
    if "messages" in example:
        given = example["messages"]
        given = from_json(given) if isinstance(given, str) else given
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"messages is a list of messages, not {str(given)[:60]}")
        return list(given)
    messages = []
    for name, role in (("prompt", "user"), ("response", "assistant")):
        said = example.get(name)
        if isinstance(said, (list, tuple)):  # what came before, of several turns
            messages += said
        elif name in example:
            messages.append({"role": role, "content": said})
    return messages


def sft(example, encode, vocab, labels) -> dict:
    """Only what the assistant says is learned."""
    ids, written = chat(messages_of(example), encode, vocab)
    if not {"messages", "response"} & set(example):
        raise ValueError(
            f"it has no messages, and its response is missing or empty; it has {', '.join(example)}"
        )
    if not written.any():
        silent = "all that the assistant says in it has weight 0"
        if not any(message["role"] == "assistant" for message in messages_of(example)):
            silent = "the assistant says nothing in it"
        raise ValueError(f"{silent}, so that there is nothing to learn")
    return shifted(ids) | {"weights": written[1:].astype(np.float32)}


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

    def pad(x):
        return np.pad(x, (0, length - len(x)))

    return {key: np.stack([pad(side[key]) for side in both]) for key in both[0]} | {"label": 0}


EXAMPLES: dict[str, Callable] = {
    f.__name__: f for f in (classify, multilabel, regress, tag, qa, seq2seq, sft, dpo)
}
