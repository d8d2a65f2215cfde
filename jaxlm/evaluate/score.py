"""The figures of a task from a model's answers to its examples; jaxlm/evaluate/metrics.py has the arithmetic."""

import logging
from collections.abc import Callable
from functools import cache

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.data.examples import label_names
from jaxlm.errors import CheckpointError, DataError, NumericsError, UserError
from jaxlm.evaluate import absent, metrics
from jaxlm.generate.answer import span_said, write

SAMPLES = 8  # texts of an evaluation that a run's writers get
SCORED = ("classify", "multilabel", "regress", "tag", "qa")  # whose examples have scores
# Faults that no evaluation may hide: no memory, a device or another host that is lost, a run that diverged.
FAULTS = (
    MemoryError,
    jax.errors.JaxRuntimeError,
    FloatingPointError,
    CheckpointError,
    NumericsError,
)


def attempt(what: str, figures: Callable[[], dict], passes: tuple = ()) -> dict:
    """figures(); where they can't be made none, and one line that says why. what: in words, is left out then.

    passes: kinds of exceptions that are raised all the same, as FAULTS are.
    """
    try:
        return figures()
    except (*FAULTS, *passes):
        raise
    except Exception as error:  # sacrebleu, scipy and odd texts have many kinds
        warn_once(f"{what}: {in_a_line(error)}")
        return {}


def in_a_line(error: Exception) -> str:
    if isinstance(error, UserError):
        kind = ""
    else:
        kind = f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def score(
    config: ConfigDict, source, scores: dict[int, np.ndarray] | None, pairs: list | None = None
) -> dict:
    """Metrics of the examples {number: scores} of a source, or of pairs (number, scores), in which one may repeat."""
    numbers, values = zip(*(pairs or scores.items()))
    return MEASURES[config.task.name](config, source, list(numbers), list(values))


def left_out(config: ConfigDict, source, scores: dict[int, np.ndarray], figures: dict) -> list[str]:
    """A line for each figure of the task that `figures`, of these scores, don't have because it has no meaning."""
    task = config.task.name
    if task == "classify":
        return absent.of_classes(figures)
    if task == "multilabel":
        return absent.of_sets(figures)
    if task == "regress":
        labels = [source.pieces[i]["label"] for i in scores]
        predictions = [values[0] for values in scores.values()]
        return absent.of_numbers(figures, predictions, labels)
    if task == "tag":
        return absent.of_tags(figures, label_names(config))
    return []


def of_classes(config, source, numbers, scores) -> dict:
    labels = np.array([source.pieces[i]["label"] for i in numbers])
    return metrics.classification(np.stack(scores), labels, list(label_names(config)))


def of_sets(config, source, numbers, scores) -> dict:
    return metrics.multilabel(
        np.stack(scores), np.stack([source.pieces[i]["label"] for i in numbers])
    )


def of_numbers(config, source, numbers, scores) -> dict:
    return metrics.regression(
        np.array(scores)[:, 0], np.array([source.pieces[i]["label"] for i in numbers])
    )


def refuse_nan(scores: list[np.ndarray]) -> None:
    """Raises DataError: the largest of NaN would be the first tag, or the first word."""
    bad = [place for place, each in enumerate(scores) if np.isnan(each).any()]
    if bad:
        raise DataError(
            f"the scores of {len(bad):,} of {len(scores):,} examples are NaN; the first is {bad[0] + 1:,}"
        )


def of_tags(config, source, numbers, scores) -> dict:
    refuse_nan(scores)
    names = label_names(config)
    predicted = []
    gold = []
    for i, score in zip(numbers, scores):
        piece = source.pieces[i]
        counts = piece["weights"][: len(score)] > 0
        predicted.append([names[c] for c in score.argmax(axis=-1)[counts]])
        gold.append([names[c] for c in piece["targets"][: len(score)][counts]])
    return metrics.tagging(predicted, gold)


def of_spans(config, source, numbers, scores) -> dict:
    refuse_nan(scores)
    predicted = []
    answers = []
    for i, score in zip(numbers, scores):
        predicted.append(span_said(source, i, score))
        given = source.examples[i]["answer"]
        answers.append(list(given) if isinstance(given, (list, tuple)) else [given])
    return metrics.question_answering(predicted, answers)


MEASURES = {
    "classify": of_classes,
    "multilabel": of_sets,
    "regress": of_numbers,
    "tag": of_tags,
    "qa": of_spans,
}


def answers_of(config: ConfigDict, source, scores: dict | None, written=None) -> list[dict]:
    """Each example with what the model says to it."""
    if written is not None:
        return [{**example, "answer": text} for example, text in zip(source.examples, written()[0])]
    names = label_names(config)
    say = {
        "classify": lambda i, x: {
            "answer": names[int(x.argmax())],
            "scores": [float(f"{p:.12g}") for p in x],
        },
        "multilabel": lambda i, x: {"answer": [n for n, p in zip(names, x) if p >= 0.5]},
        "regress": lambda i, x: {"answer": float(x[0])},
        "qa": lambda i, x: {"answer": span_said(source, i, x)},
    }
    speak = say.get(config.task.name, lambda i, x: {})
    return [{**source.examples[i], **speak(i, x)} for i, x in (scores or {}).items()]


def write_answers(
    config: ConfigDict, source, params, count: int = 0, **more
) -> tuple[list[str], list[str]]:
    """(what the model writes to the first `count` examples, or all; what they say). more: of respond.write."""
    examples = source.examples[: count or None]
    e = config.eval
    options = {"beams": e.beams, "max_tokens": e.max_tokens, "length_penalty": e.length_penalty}
    said = write(config, params, source.vocab, source.encode, examples, **options, **more)
    return said, [reference_of(example, config) for example in examples]


def reference_of(example: dict, config: ConfigDict) -> str:
    if "messages" in example:
        text = example["messages"][-1]["content"]
    else:
        text = example[next(role for role in ("target", "response", "chosen") if role in example)]
    if config.data.lowercase:
        return text.lower()
    return text


def score_texts(
    config: ConfigDict, source, params, count: int = 0, show=lambda samples: None
) -> dict:
    """BLEU, chrF and ROUGE of what the model writes to the examples.

    show: gets the first SAMPLES examples, each with its `answer`.
    """
    said, references = write_answers(config, source, params, count)
    shown = zip(source.examples[:SAMPLES], said)
    show([{**example, "answer": text} for example, text in shown])
    return of_texts(config, said, references)


def of_texts(config: ConfigDict, said: list[str], references: list[str]) -> dict:
    """BLEU, chrF and ROUGE of texts. Those without meaning are left out, and that is told."""
    total = metrics.count(hypotheses=said, references=references)
    if not any(text.strip() for text in references):
        warn_once("BLEU, chrF and ROUGE are left out: every reference is empty")
        return {}
    if not any(text.strip() for text in said):
        warn_once(
            f"the model wrote nothing for any of {total:,} examples: BLEU, chrF and ROUGE are of empty texts"
        )
    options = bleu_options(config)
    result = attempt(
        "BLEU and chrF are left out", lambda: metrics.translation(said, references, **options)
    )
    if result and "bleu" not in result:
        warn_once(
            f"BLEU is left out: no reference has the four words that it counts runs of (tokenizer {options['tokenize']}"
            "; for text without spaces choose bleu_tokenize=char or zh)"
        )
    return result | attempt("ROUGE is left out", lambda: metrics.rouge(said, references))


def bleu_options(config: ConfigDict) -> dict:
    return {"lowercase": config.data.lowercase, "tokenize": config.eval.bleu_tokenize}


@cache
def warn_once(text: str) -> None:
    """Each evaluation of a run would say the same."""
    logging.getLogger("jaxlm").warning(text)
