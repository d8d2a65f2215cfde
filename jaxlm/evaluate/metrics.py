"""Figures of merit: arrays and lists in, plain floats, lists and dicts out.

What compares texts (translation, rouge, question_answering) counts to 100, as its papers do; all else is a fraction. A
figure that is not defined, as the AUC where one class alone occurs, is left out. DataError is raised where there are no
examples, lengths differ or numbers are not finite; ConfigError where a library of jaxlm[eval] is missing.
"""

import importlib
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest

import numpy as np

from jaxlm.errors import ConfigError, DataError

BIO = re.compile(r"O|[BIES](-.*)?", re.DOTALL)  # and BIOES, whose E and S end an entity too
ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
KNOWN_TO_ROUGE = re.compile("[a-zA-Z0-9]")
ROUGE = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def library(name: str):
    """An optional module, imported on use."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{error.name} is not installed; type: pip install -e ".[eval]"'
        ) from None


def count(**columns: Sequence) -> int:
    """The number of examples, the same in each column and at least one."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        given = ", ".join(f"{n} {name}" for name, n in lengths.items())
        raise DataError(f"needed are examples, and as many items of each column; given are {given}")
    return next(iter(lengths.values()))


def require(good: np.ndarray, name: str, values: np.ndarray, fault: str) -> None:
    bad = np.argwhere(~good)
    if len(bad):
        place = ", ".join(map(str, bad[0]))
        value = np.array2string(values[tuple(bad[0])], threshold=8)
        raise DataError(
            f"{len(bad)} of {good.size} {name} {fault}; the first is {name}[{place}] = {value}"
        )


def numbers(name: str, values, ndim: int) -> np.ndarray:
    """As float64, of `ndim` dimensions and all finite."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be numbers: {error}") from None
    if array.ndim != ndim or not array.size:
        raise DataError(
            f"{name} has the shape {array.shape}; needed are {ndim} dimensions, none of them empty"
        )
    require(np.isfinite(array), name, array, "are NaN or infinite")
    return array


def probabilities(scores_NC) -> np.ndarray:
    """Unchanged, which keeps ties; rows may add up to 1 but for what bfloat16 rounds."""
    scores = numbers("scores", scores_NC, 2)
    good = (scores >= 0).all(1) & (abs(scores.sum(1) - 1) < 0.02)
    require(
        good,
        "scores",
        scores,
        "are not probabilities, such as softmax(logits), 0 or more with the sum 1",
    )
    return scores


def rates(right: int, found: int, true: int) -> dict:
    f1 = 2 * right / max(found + true, 1)
    return {
        "precision": right / max(found, 1),
        "recall": right / max(true, 1),
        "f1": f1,
        "count": true,
    }


def mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under ROC, by the sum of ranks (Mann and Whitney): the same as scikit-learn's, ten times as fast."""
    ranks = library("scipy.stats").rankdata(scores)[labels == 1]
    ones = np.sum(labels == 1)
    return float((ranks.sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones)))


def classification(scores_NC, labels_N, names: Sequence[str] | None = None) -> dict:
    """Of the class with the highest probability: accuracy, precision, recall, f1 (macro: the mean over the classes that
    occur in labels or predictions, as scikit-learn's), f1_micro, and of two classes f1_positive, class 1's. Of the
    probabilities: auc (area under ROC; of several classes the mean of each against the rest), log_loss (nats).
    classes: a row for each, with its count in labels; confusion[i][j]: examples of class i that were taken for class j.
    """
    scores = probabilities(scores_NC)
    labels = numbers("labels", labels_N, 1)
    total = count(scores=scores, labels=labels)
    every = range(scores.shape[1])
    require(
        np.isin(labels, every),
        "labels",
        labels,
        f"are not a class, a whole number from 0 to {len(every) - 1}",
    )
    names = [str(name) for name in (every if names is None else names)]
    count(names=names, classes=every)
    labels = labels.astype(int)
    predicted = scores.argmax(1)
    confusion = np.bincount(labels * len(every) + predicted, minlength=len(every) ** 2).reshape(
        len(every), -1
    )
    sums = zip(confusion.diagonal().tolist(), confusion.sum(0).tolist(), confusion.sum(1).tolist())
    table = [{"name": name, **rates(*row)} for name, row in zip(names, sums)]
    for k, row in enumerate(table):
        if 0 < row["count"] < total:
            row["auc"] = auc(labels == k, scores[:, k])
    result = {"accuracy": mean(predicted == labels)}
    occur = np.union1d(labels, predicted)
    areas = [row["auc"] for row in table if "auc" in row]
    result |= {key: mean(table[k][key] for k in occur) for key in ("precision", "recall", "f1")}
    result["f1_micro"] = result[
        "accuracy"
    ]  # as all micro averages, with one label for each example
    if len(every) == 2:
        areas = areas[1:]
    if len(every) == 2 and 1 in occur:
        result["f1_positive"] = table[1]["f1"]
    if areas:
        result["auc"] = mean(areas)
    chosen = scores[range(total), labels] / scores.sum(1)
    result["log_loss"] = abs(
        mean(np.log(np.maximum(chosen, np.finfo(float).eps)))
    )  # scikit-learn's bound
    return result | {"classes": table, "confusion": confusion.tolist()}


def multilabel(scores_NC, labels_NC, threshold: float = 0.5) -> dict:
    """Any number of C labels may be true of an example: f1_micro, f1 (macro over all C, 0 for what neither occurs nor
    is predicted, as scikit-learn's; neither F1 where nothing does), exact_match (all C right), auc (macro, over the
    labels that have both values).
    """
    scores = numbers("scores", scores_NC, 2)
    labels = numbers("labels", labels_NC, 2)
    require(np.isin(labels, (0, 1)), "labels", labels, "are neither 0 nor 1")
    if scores.shape != labels.shape:
        raise DataError(
            f"scores and labels must have one shape; theirs are {scores.shape} and {labels.shape}"
        )
    predicted = scores >= threshold
    right = (predicted * labels).sum(0)
    sums = predicted.sum(0) + labels.sum(0)
    result = {}
    if sums.any():
        result["f1_micro"] = float(2 * right.sum() / sums.sum())
        result["f1"] = mean(2 * right / np.maximum(sums, 1))
    areas = [auc(y, s) for y, s in zip(labels.T, scores.T) if y.min() < y.max()]
    return (
        result
        | {"exact_match": mean((predicted == labels).all(1))}
        | ({"auc": mean(areas)} if areas else {})
    )


def regression(predictions_N, targets_N) -> dict:
    """mse, mae, and the correlations pearson and spearman. Columns that are constant, or nearly, have no correlation;
    what a float64 can't hold is left out."""
    x = numbers("predictions", predictions_N, 1)
    y = numbers("targets", targets_N, 1)
    count(predictions=x, targets=y)
    with np.errstate(over="ignore"):
        result = {"mse": mean((x - y) ** 2), "mae": mean(abs(x - y))}
        if x.min() < x.max() and y.min() < y.max():
            result |= correlations(x, y)
    return {key: value for key, value in result.items() if np.isfinite(value)}


def correlations(x_N: np.ndarray, y_N: np.ndarray) -> dict:
    """pearson and spearman of values that are not all the same; no pearson where they differ by rounding alone."""
    stats = library("scipy.stats")
    result = {"spearman": float(stats.spearmanr(x_N, y_N)[0])}
    with warnings.catch_warnings():
        warnings.simplefilter("error", stats.NearConstantInputWarning)
        with suppress(stats.NearConstantInputWarning):
            result = {"pearson": float(stats.pearsonr(x_N, y_N)[0])} | result
    return result


def tagging(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> dict:
    """Over tokens: accuracy, f1 (macro over the tags that occur), f1_micro, and `tags`, a row for each. If gold is in
    BIO or BIOES, over entities, right where both ends and the type are, as in CoNLL-2000's conlleval: entity_precision,
    entity_recall, entity_f1, and `entities`, a row for each type.
    """
    for i in range(count(predicted=predicted, gold=gold)):
        if isinstance(gold[i], str) or len(predicted[i]) != len(gold[i]):
            raise DataError(
                f"sentence {i} must be a list of tags, predicted as many: {predicted[i]} for {gold[i]}"
            )

    def items(side, split):
        return {(i, *item) for i, tags in enumerate(side) for item in split(tags)}

    overall, rows = compare(items(predicted, enumerate), items(gold, enumerate))
    count(tokens=rows)
    result = {
        "accuracy": overall["f1"],
        "f1": mean(row["f1"] for row in rows),
        "f1_micro": overall["f1"],
        "tags": rows,
    }
    if all(BIO.fullmatch(row["name"]) for row in rows if row["count"]) and any(
        row["name"] != "O" for row in rows
    ):
        overall, rows = compare(items(predicted, entities), items(gold, entities))
        result |= {f"entity_{key}": overall[key] for key in ("precision", "recall", "f1")} | {
            "entities": rows
        }
    return result


def compare(found: set[tuple], true: set[tuple]) -> tuple[dict, list[dict]]:
    """Rates of all items, and a row for each kind, which is their last entry."""
    groups = []
    for items in (found & true, found, true):
        groups.append(Counter(item[-1] for item in items))
    rows = []
    for kind in sorted({*groups[1], *groups[2]}):
        rows.append({"name": kind, **rates(*(group[kind] for group in groups))})
    return rates(*(group.total() for group in groups)), rows


def entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first token, token after the last, type). As conlleval has it, an I- that follows O or another type begins an
    entity as B- does, and whatever begins one ends the one before. A tag that is none of BIOES is O."""
    found = []
    begin = None
    last = "O"
    kind = ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, new = (tag if BIO.fullmatch(tag) else "O").partition("-")
        begins = mark != "O" and (mark in "BS" or last in "OES" or new != kind)
        if begin is not None and (begins or mark == "O"):
            found.append((begin, i, kind))
        if begins:
            begin = i
        else:
            begin = None if mark == "O" else begin
        last = mark
        kind = new
    return found


def texts(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """The references of each hypothesis, as lists."""
    count(hypotheses=hypotheses, references=references)
    lists = [[one] if isinstance(one, str) else list(one) for one in references]
    for i, (text, each) in enumerate(zip(hypotheses, lists)):
        if not each or not all(isinstance(t, str) for t in (text, *each)):
            raise DataError(
                f"example {i}: needed are a text and one reference or more; given {text!r} and {each!r}"
            )
    return lists


def bleu_scorer(lowercase: bool = False, tokenize: str = "13a", **options):
    """sacrebleu's BLEU. Raises ConfigError where it has no such tokenizer, or where what that needs is not here."""
    lib = library("sacrebleu")
    if tokenize not in lib.BLEU.TOKENIZERS:
        raise ConfigError(
            f"sacrebleu has no tokenizer {tokenize!r}; it has {', '.join(lib.BLEU.TOKENIZERS)}"
        )
    try:
        return lib.BLEU(lowercase=lowercase, tokenize=tokenize, **options)
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # its message names the package, or the file it looks for
        need = " ".join(str(error).split())
        raise ConfigError(
            f"config.eval.bleu_tokenize={tokenize}: {need} Or choose char or zh."
        ) from None


def translation(hypotheses, references, lowercase: bool = False, tokenize: str = "13a") -> dict:
    """bleu and chrf of the corpus, to 100, and sacrebleu's signature and chrf_signature, which make them comparable.

    `references` has a text for each hypothesis, or a list of one or more. `tokenize` is one of sacrebleu's. BLEU counts
    runs of four tokens: where no reference has one it is left out, being 0 even for the references themselves.
    """
    lists = texts(hypotheses, references)
    bleu = bleu_scorer(lowercase, tokenize)
    chrf = library("sacrebleu").CHRF(lowercase=lowercase)

    def scored(metric):
        return metric.corpus_score([*hypotheses], [*zip_longest(*lists)]).score

    result = {"chrf": scored(chrf), "chrf_signature": str(chrf.get_signature())}
    if any(bleu.corpus_score([text], [[text]]).totals[3] for each in lists for text in each):
        result = {"bleu": scored(bleu), "signature": str(bleu.get_signature())} | result
    return result


def bleu_counts(
    hypotheses, references, lowercase: bool = False, tokenize: str = "13a"
) -> np.ndarray:
    """[N, 10]: what BLEU counts in each sentence. bootstrap(bleu_of, bleu_counts(...)) resamples the sentences."""
    bleu = bleu_scorer(lowercase, tokenize, effective_order=True)  # only stops a warning
    scores = map(bleu.sentence_score, hypotheses, texts(hypotheses, references))
    return np.array(
        [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]
    )


def bleu_of(counts: np.ndarray) -> float:
    """BLEU of the corpus that has these bleu_counts."""
    sums = counts.sum(0).tolist()
    return (
        library("sacrebleu")
        .BLEU.compute_bleu(sums[:4], sums[4:8], *sums[8:], smooth_method="exp")
        .score
    )


def rouge(hypotheses, references) -> dict:
    """F-measures to 100, without stemming, the mean over examples of that of the best reference: rouge1, rouge2, rougeL
    and rougeLsum, which reads each line as a sentence. rouge_score reads the letters a to z and digits only: DataError
    where most of the references' letters are others, also where each reference has some, such as the digits of a year.
    """
    lists = texts(hypotheses, references)
    scorer = library("rouge_score.rouge_scorer").RougeScorer(ROUGE)
    everything = "".join(text for each in lists for text in each)
    letters = sum(map(str.isalnum, everything))
    known = len(KNOWN_TO_ROUGE.findall(everything))
    if 2 * known < letters:
        raise DataError(
            f"rouge_score reads a to z and digits only, {known / letters:.0%} of the references' letters; "
            "chrf reads all"
        )
    scores = [scorer.score_multi(each, text) for text, each in zip(hypotheses, lists)]
    return {key: 100 * mean(score[key].fmeasure for score in scores) for key in ROUGE}


def question_answering(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict:
    """SQuAD's exact_match and f1 over tokens, to 100, by the answer that suits best. Where `answers` has none, an empty
    prediction is right and no other, as in the script of v2.0.
    """

    def tokens(text):
        return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()

    def overlap(a, b):
        if a or b:
            return 2 * (Counter(a) & Counter(b)).total() / len(a + b)
        return 1.0

    exact = []
    f1 = []
    for i in range(count(predictions=predictions, answers=answers)):
        if isinstance(answers[i], str):
            raise DataError(
                f"answers[{i}] is a text; it must be a list of all that are right: {[answers[i]]}"
            )
        given = tokens(predictions[i])
        golds = [gold for gold in map(tokens, answers[i]) if gold] or [[]]
        exact.append(given in golds)
        f1.append(max(overlap(given, gold) for gold in golds))
    return {"exact_match": 100 * mean(exact), "f1": 100 * mean(f1)}


def calibration(scores, correct, bins: int = 15) -> dict:
    """ece and mce, expected and maximum calibration error (Guo et al. 2017): mean and largest gap between confidence
    and accuracy over bins of equal width; brier: the mean of (confidence - correct)^2. `scores` are the confidences [N]
    or probabilities [N, C], whose largest they are; `correct` [N] is True or False, as of predictions == labels.
    bins: low (exclusive), high, confidence, accuracy and count of those that are not empty.
    """
    if np.ndim(scores) == 2:
        confidence = probabilities(scores).max(1)
    else:
        confidence = numbers("scores", scores, 1)
    require(
        (confidence >= 0) & (confidence < 1.02), "scores", confidence, "are not of 0 to 1"
    )  # bfloat16 rounds
    confidence = np.minimum(confidence, 1)
    total = count(scores=confidence, correct=correct)
    correct = np.asarray(correct)
    if correct.dtype != bool:  # labels, by mistake
        raise DataError(
            f"correct must be True or False, as of predictions == labels; it begins with {correct[:5]}"
        )
    edges = np.linspace(0, 1, bins + 1).tolist()
    rows = []
    places = np.searchsorted(edges[1:-1], confidence)
    for k in np.unique(places):
        row = {"low": edges[k], "high": edges[k + 1], "confidence": mean(confidence[places == k])}
        rows.append(
            row | {"accuracy": mean(correct[places == k]), "count": int((places == k).sum())}
        )
    gaps = [abs(row["confidence"] - row["accuracy"]) for row in rows]
    ece = sum(gap * row["count"] / total for gap, row in zip(gaps, rows))
    return {"ece": ece, "mce": max(gaps), "brier": mean((confidence - correct) ** 2), "bins": rows}


def pick(arrays: Sequence[Sequence], index: Sequence[int]) -> list[Sequence]:
    return [
        array[index] if isinstance(array, np.ndarray) else [array[i] for i in index]
        for array in arrays
    ]


def bootstrap(
    metric: Callable, *arrays: Sequence, samples=1000, seed=0, level=0.95
) -> tuple[float, float]:
    """The percentile interval of the float metric(*arrays), over `samples` draws of all examples with replacement.

    A draw that has no figure (nan), such as the AUC where it holds one class alone, does not count.
    """
    total = count(**{f"array_{i}": array for i, array in enumerate(arrays)})
    rng = np.random.default_rng(seed)
    values = [metric(*pick(arrays, rng.integers(0, total, total))) for _ in range(samples)]
    values = [value for value in values if not np.isnan(value)] or values
    low, high = np.quantile(
        numbers("resampled figures", values, 1), [(1 - level) / 2, (1 + level) / 2]
    )
    return float(low), float(high)


def by_group(metric: Callable[..., dict], groups: Sequence, *arrays: Sequence) -> dict:
    """{group: {"count": n, **metric(*arrays)}} of the examples of each group, the largest group first."""
    count(groups=groups, **{f"array_{i}": array for i, array in enumerate(arrays)})
    places = {}
    for i, group in enumerate(groups.tolist() if isinstance(groups, np.ndarray) else groups):
        places.setdefault(group, []).append(i)
    ordered = sorted(places.items(), key=lambda item: (-len(item[1]), str(item[0])))
    return {
        group: {"count": len(index), **metric(*pick(arrays, index))} for group, index in ordered
    }
