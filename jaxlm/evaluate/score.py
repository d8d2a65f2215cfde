"""The figures of a task from a model's answers to its examples; jaxlm/evaluate/metrics.py has the arithmetic."""

import logging
from collections.abc import Callable
from functools import cache

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.config.tasks import task_of
from jaxlm.data.labels import label_names
from jaxlm.errors import CheckpointError, DataError, NumericsError, UserError
from jaxlm.evaluate import absent, metrics
from jaxlm.generate.answer import span_text, write

SAMPLES = 8  # texts of an evaluation that a run's writers get
# Never hidden by an evaluation: no memory, a lost device or host, a run that diverged.
FAULTS = (
    MemoryError,
    jax.errors.JaxRuntimeError,
    FloatingPointError,
    CheckpointError,
    NumericsError,
)


def attempt(what: str, figures: Callable[[], dict], passes: tuple = ()) -> dict:
    """figures(), or {} and a logged line where they can't be computed. what: begins that line.

    Raises FAULTS, and the kinds of exceptions that `passes` names.
    """
    try:
        return figures()
    except (*FAULTS, *passes):
        raise
    except Exception as error:  # sacrebleu, scipy and odd texts have many kinds
        warn_once(f"{what}: {in_a_line(error)}")
        return {}


def in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}"


def score(
    config: ConfigDict, source, scores: dict[int, np.ndarray] | None, pairs: list | None = None
) -> dict:
    """Metrics of the examples {number: scores} of a source, or of pairs (number, scores), in which one may repeat.

    Scores: float, probabilities [C] of classes or labels, a number [1], log-probabilities [T, C] of tags and [T, 2] of
    the ends of an answer. Raises DataError where they are NaN.
    """
    numbers, values = zip(*(pairs or scores.items()))
    return MEASURES[task_of(config).answer](config, source, list(numbers), list(values))


def left_out(config: ConfigDict, source, scores: dict[int, np.ndarray], figures: dict) -> list[str]:
    """A line for each figure of the task that has no meaning for these scores, so that `figures` lacks it."""
    answer = task_of(config).answer
    if answer == "class":
        return absent.of_classes(figures)
    if answer == "labels":
        return absent.of_sets(figures)
    if answer == "number":
        labels = labels_of(source, scores)
        predictions = np.array(list(scores.values()))[:, 0]
        return absent.of_numbers(figures, predictions, labels)
    if answer == "tags":
        return absent.of_tags(figures, label_names(config))
    return []


def labels_of(source, numbers) -> np.ndarray:
    """The right labels of these examples: [N], or [N, C] of multilabel."""
    return np.stack([source.pieces[i]["label"] for i in numbers])


def of_classes(config, source, numbers, scores) -> dict:
    labels = labels_of(source, numbers)
    return metrics.classification(np.stack(scores), labels, list(label_names(config)))


def of_sets(config, source, numbers, scores) -> dict:
    return metrics.multilabel(np.stack(scores), labels_of(source, numbers))


def of_numbers(config, source, numbers, scores) -> dict:
    return metrics.regression(np.array(scores)[:, 0], labels_of(source, numbers))


def refuse_nan(scores: list[np.ndarray]) -> None:
    """Raises DataError of NaN, whose argmax would be the first tag, or the first word."""
    bad = [place for place, each in enumerate(scores) if np.isnan(each).any()]
    if bad:
        raise DataError(
            f"the scores of {len(bad):,} of {len(scores):,} examples are NaN; the first is {bad[0] + 1:,}"
        )


def of_tags(config, source, numbers, scores) -> dict:
    refuse_nan(scores)
    names = np.array(label_names(config))
    predicted = []
    gold = []
    for i, score in zip(numbers, scores):
        piece = source.pieces[i]
        counted = piece["weights"][: len(score)] > 0
        predicted.append(names[score.argmax(axis=-1)[counted]].tolist())
        gold.append(names[piece["targets"][: len(score)][counted]].tolist())
    return metrics.tagging(predicted, gold)


def of_spans(config, source, numbers, scores) -> dict:
    refuse_nan(scores)
    predicted = []
    answers = []
    for i, score in zip(numbers, scores):
        predicted.append(span_text(source, i, score))
        given = source.examples[i]["answer"]
        answers.append(list(given) if isinstance(given, (list, tuple)) else [given])
    return metrics.question_answering(predicted, answers)


MEASURES = {  # Task.answer -> the figures of its scores
    "class": of_classes,
    "labels": of_sets,
    "number": of_numbers,
    "tags": of_tags,
    "span": of_spans,
}


def answers_of(config: ConfigDict, source, scores: dict | None, written=None) -> list[dict]:
    """Each example with the model's answer. written: a function that gives the texts of a model that writes."""
    if written is not None:
        texts, _ = written()
        return [{**example, "answer": text} for example, text in zip(source.examples, texts)]
    answer = ANSWERS.get(task_of(config).answer, answer_of_none)
    names = label_names(config)
    rows = []
    for i, score in (scores or {}).items():
        rows.append(source.examples[i] | answer(names, source, i, score))
    return rows


def answer_of_class(names, source, number, score) -> dict:
    digits = [float(f"{chance:.12g}") for chance in score]
    return {"answer": names[int(score.argmax())], "scores": digits}


def answer_of_labels(names, source, number, score) -> dict:
    likely = np.flatnonzero(score >= 0.5)
    return {"answer": [names[i] for i in likely]}


def answer_of_number(names, source, number, score) -> dict:
    return {"answer": float(score[0])}


def answer_of_span(names, source, number, score) -> dict:
    return {"answer": span_text(source, number, score)}


def answer_of_none(names, source, number, score) -> dict:
    return {}


ANSWERS = {  # Task.answer -> what is written of an example
    "class": answer_of_class,
    "labels": answer_of_labels,
    "number": answer_of_number,
    "span": answer_of_span,
}


def write_answers(
    config: ConfigDict, source, params, count: int = 0, **more
) -> tuple[list[str], list[str]]:
    """(texts of the model, references) of the first `count` examples, 0: of all. more: options of answer.write."""
    examples = source.examples[: count or None]
    e = config.eval
    options = {"beams": e.beams, "max_tokens": e.max_tokens, "length_penalty": e.length_penalty}
    texts = write(config, params, source.vocab, source.encode, examples, **options, **more)
    return texts, [reference_of(example, config) for example in examples]


def reference_of(example: dict, config: ConfigDict) -> str:
    """The text that a model should write to an example."""
    if "messages" in example:
        text = example["messages"][-1]["content"]
    else:
        role = next(role for role in ("target", "response", "chosen") if role in example)
        text = example[role]
    if config.data.lowercase:
        return text.lower()
    return text


def score_texts(config: ConfigDict, source, params, count: int = 0, show=None) -> dict:
    """BLEU, chrF and ROUGE of what the model writes to the first `count` examples, 0: to all.

    show: gets the first SAMPLES examples, each with its `answer`.
    """
    texts, references = write_answers(config, source, params, count)
    if show:
        shown = zip(source.examples[:SAMPLES], texts)
        show([{**example, "answer": text} for example, text in shown])
    return of_texts(config, texts, references)


def of_texts(config: ConfigDict, texts: list[str], references: list[str]) -> dict:
    """BLEU, chrF and ROUGE of texts; a warning for each that has no meaning and is left out.

    Raises DataError where there are no texts, or not as many references.
    """
    total = metrics.count(hypotheses=texts, references=references)
    if not any(map(str.strip, references)):
        warn_once("BLEU, chrF and ROUGE are left out: every reference is empty")
        return {}
    if not any(map(str.strip, texts)):
        warn_once(
            f"the model wrote nothing for any of {total:,} examples: BLEU, chrF and ROUGE are of empty texts"
        )
    options = bleu_options(config)
    result = attempt(
        "BLEU and chrF are left out", lambda: metrics.translation(texts, references, **options)
    )
    if result and "bleu" not in result:
        warn_once(
            f"BLEU is left out: no reference has the four words that it counts runs of (tokenizer {options['tokenize']}"
            "; for text without spaces choose bleu_tokenize=char or zh)"
        )
    return result | attempt("ROUGE is left out", lambda: metrics.rouge(texts, references))


def bleu_options(config: ConfigDict) -> dict:
    return {"lowercase": config.data.lowercase, "tokenize": config.eval.bleu_tokenize}


@cache
def warn_once(text: str) -> None:
    """Logs a warning, the first time only: each evaluation of a run would repeat it."""
    logging.getLogger("jaxlm").warning(text)
