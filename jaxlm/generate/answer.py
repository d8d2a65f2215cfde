"""The answers of a model to examples: the scores of their labels, or the texts that it writes."""

import math
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.config.tasks import TASKS, task_of
from jaxlm.data.answers import ALLOWED, answer_text
from jaxlm.data.examples import Examples
from jaxlm.data.files.dialogues import messages_of
from jaxlm.data.labels import label_names
from jaxlm.data.row_layout import piece_lengths
from jaxlm.data.transforms import Vocabulary, chat, words_of
from jaxlm.generate.decode import beam_search, before_end, generate_tokens, pad_prompts, size_for
from jaxlm.models import build
from jaxlm.parallel.hosts import fetch
from jaxlm.step.state import eval_step

BATCH = 64  # texts that are written at one time


def of_examples(source, rows: list[np.ndarray]) -> dict[int, np.ndarray]:
    """{number of the example: its scores}, of the scores of rows: one array a label, or one entry a token."""
    found = {}
    for row, scores in zip(source.rows, rows):
        at = 0
        for place, number in enumerate(row):
            length = min(piece_lengths(source.pieces[number])[0], source.config.data.seq_len - at)
            labelled = "label" in source.pieces[number]
            found[number] = scores[place] if labelled else scores[at : at + length]
            at += length
    if task_of(source.config).answer == "class":
        found = {number: one_less_others(scores) for number, scores in found.items()}
    return dict(sorted(found.items()))


def one_less_others(chances: np.ndarray) -> np.ndarray:
    """float64. In float32 a probability near 1 has lost digits that the others, near 0, still have."""
    top = chances.argmax()
    chances = chances.astype(np.float64)
    chances[top] = 1 - (chances.sum() - chances[top])
    return chances


@partial(jax.jit, static_argnames="config")
def scores_of(params, batch, config: FrozenConfigDict):
    """The scores of a batch: see eval_step. Compiled once for a config, not once a call."""
    return eval_step(params, batch, config=config)[1]


def read_scores(config: ConfigDict, params, source) -> dict[int, np.ndarray]:
    """The scores of all examples of a source, by number."""
    B = min(BATCH, size_for(source.num_rows, 1))
    config = FrozenConfigDict(config)
    rows = []
    for start in range(0, source.num_rows, B):
        numbers = np.arange(start, start + B)
        batch = source.read(numbers, [(0, int(i)) for i in numbers])
        rows += list(fetch(scores_of(params, batch, config)))
    return of_examples(source, rows)


def label(config: ConfigDict, params, tokenizer, examples: list[dict]) -> list:
    """See jaxlm.generate.lm.LM.answer. Examples need no labels."""
    names = label_names(config)
    kind = task_of(config).answer
    dummy = {
        "class": lambda e: {"label": names[0]},
        "labels": lambda e: {"label": ""},
        "number": lambda e: {"label": 0},
        "tags": lambda e: {"tags": [names[0]] * len(words_of(e["words"]))},
        "span": lambda e: {"answer": ""},
    }
    source = Examples(
        config, "val", tokenizer, [{**example, **dummy[kind](example)} for example in examples]
    )
    scores = read_scores(config, params, source)
    said = []
    for number, score in scores.items():
        piece = source.pieces[number]
        if kind == "number":
            said.append(float(score[0]))
        elif kind == "span":
            said.append(span_text(source, number, score))
        elif kind == "tags":
            said.append(
                [names[c] for c in score.argmax(axis=-1)[piece["weights"][: len(score)] > 0]]
            )
        else:
            said.append({name: round(float(p), 6) for name, p in zip(names, score)})
    return said


def prompt_of(example: dict, encode, vocab: Vocabulary) -> tuple[np.ndarray, np.ndarray | None]:
    """(what the model goes on from, the source that it reads or None)."""
    if TASKS[vocab.task].reads_source:
        return np.array([vocab.begin]), np.append(encode(example["source"]), vocab.end)
    messages = messages_of({key: value for key, value in example.items() if key != "response"})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return np.append(chat(messages, encode, vocab)[0], vocab.assistant), None


def longest_prompt(config: ConfigDict, vocab: Vocabulary, encode, examples: list[dict]) -> int:
    """Tokens that the longest of the examples puts before the answer, cut as `write` does; 0 without examples."""
    longest = 0
    for example in examples:
        prompt, _ = prompt_of(example, encode, vocab)
        longest = max(longest, len(prompt))
    return min(longest, config.data.seq_len)


def write(
    config: ConfigDict, params, vocab: Vocabulary, encode, examples: list[dict], *, beams=1, max_tokens=0,
    length_penalty=0.6, temperature=0.0, top_k=0, top_p=0.0, seed=0, progress=lambda done, total: None,
) -> list[str]:  # fmt: skip
    """The text for each example, by beam search, or sampled where beams = 1 (temperature 0: greedy).

    Sources and prompts are cut at config.data.enc_len and seq_len, as in training; long ones are written first.
    progress: called with how many are written, of how many.
    """
    model = build(config)
    fixed = {"max_tokens": max_tokens or config.eval.max_tokens}
    fixed |= {"eos_id": vocab.end_id, "vocab_size": vocab.size}
    sampling = {"temperature": float(temperature), "top_k": top_k, "top_p": float(top_p)}
    asked = [prompt_of(example, encode, vocab) for example in examples]
    order = sorted(range(len(asked)), key=lambda i: num_tokens(asked[i]), reverse=True)
    texts = [""] * len(examples)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        B = BATCH if len(order) > BATCH else len(order)
        filled = chosen + [chosen[0]] * (B - len(chosen))
        rows = arrays_of(config, [asked[i] for i in filled])
        if beams > 1:
            found, _ = beam_search(
                model, params, *rows, beams=beams, length_penalty=length_penalty, **fixed
            )
            out = found[:, 0]
        else:
            prompts, lengths, source = rows
            seeds = np.array([(seed + i) % 2**32 for i in filled], np.uint32)
            out = generate_tokens(
                model, params, prompts, lengths, seeds, source, **sampling, **fixed
            )
        for i, ids in zip(chosen, out):
            texts[i] = vocab.tokenizer.decode(before_end(ids, vocab.end_id))
        progress(start + len(chosen), len(order))
    return texts


def num_tokens(asked: tuple[np.ndarray, np.ndarray | None]) -> int:
    """Of a prompt and its source, see `prompt_of`."""
    prompt, source = asked
    if source is None:
        return len(prompt)
    return len(prompt) + len(source)


def arrays_of(config: ConfigDict, asked: list[tuple]) -> tuple[np.ndarray, np.ndarray, dict | None]:
    """(prompts [B, P], their lengths [B], the source or None) of what `prompt_of` gives, cut as in training."""
    prompts = [prompt[-config.data.seq_len :] for prompt, _ in asked]
    if asked[0][1] is None:
        return *pad_prompts(prompts), None
    # What is written after a source begins with one token.
    return *pad_prompts(prompts, least=1), sources([ids for _, ids in asked], config.data.enc_len)


def sources(ids: list[np.ndarray], limit: int) -> dict[str, np.ndarray]:
    """enc_tokens and enc_segments [B, S], S a size that the longest has room in, at most the limit."""
    longest = max(map(len, ids))
    S = min(size_for(longest, 16), max(limit, 1))
    tokens = np.zeros((len(ids), S), np.int32)
    segments = np.zeros((len(ids), S), np.int32)
    for row, source in enumerate(ids):
        source = source[:S]
        tokens[row, : len(source)] = source
        segments[row, : len(source)] = 1
    return {"enc_tokens": tokens, "enc_segments": segments}


def span_text(source, number: int, scores_T2: np.ndarray) -> str:
    """The part of a context that is the likeliest answer to an example of `source`, from log-probabilities [T, 2]."""
    example = source.examples[number]
    allowed = source.pieces[number]["targets"] & ALLOWED != 0
    longest = longest_answer(int(allowed.sum()), len(example["context"]))
    span = best_span(scores_T2, allowed[: len(scores_T2)], longest)
    return answer_text(example, source.encode, *span)


def longest_answer(tokens: int, characters: int) -> int:
    """Tokens that an answer may have in a context of so many: 30 words of six characters, and 30 tokens at least.

    Bytes and characters are many to a word, above all where text has no spaces.
    """
    return max(30, math.ceil(30 * 6 * tokens / max(characters, 1)))


def best_span(scores_T2: np.ndarray, allowed: np.ndarray, longest: int = 30) -> tuple[int, int]:
    """(first, last) token of the likeliest answer of at most `longest` tokens, from log-probabilities [T, 2]."""
    first_T, last_T = np.where(allowed, scores_T2.T, -np.inf)
    total_TT = first_T[:, None] + last_T[None]
    place_T = np.arange(len(first_T))
    length_TT = place_T[None] - place_T[:, None]
    is_span = (length_TT >= 0) & (length_TT < longest) & (place_T[:, None] > 0)
    is_span[0, 0] = True  # no answer
    likeliest = np.argmax(np.where(is_span, total_TT, -np.inf))
    first, last = np.unravel_index(likeliest, total_TT.shape)
    return int(first), int(last)
