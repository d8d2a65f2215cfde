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
from functools import partial
from itertools import chain, zip_longest

import numpy as np

from jaxlm.errors import ConfigError, DataError
from jaxlm.evaluate.entities import BIO, entity_rates

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
KNOWN_TO_ROUGE = re.compile("[a-zA-Z0-9]")
ROUGE = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def library(name: str):
    """An optional module, imported on use. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{error.name} is not installed; type: pip install -e ".[eval]"'
        ) from None


def count(**columns: Sequence) -> int:
    """The number of examples. Raises DataError where columns differ in length, or have none."""
    lengths = list(map(len, columns.values()))
    if len(set(lengths)) != 1 or 0 in lengths:
        given = ", ".join(f"{n} {name}" for n, name in zip(lengths, columns))
        raise DataError(f"needed are examples, and as many items of each column; given are {given}")
    return lengths[0]


def require(good: np.ndarray, name: str, values: np.ndarray, fault: str) -> None:
    """Raises DataError that counts the values that are not good, and shows the first."""
    bad = np.argwhere(~good)
    if len(bad):
        place = ", ".join(map(str, bad[0]))
        value = np.array2string(values[tuple(bad[0])], threshold=8)
        raise DataError(
            f"{len(bad)} of {good.size} {name} {fault}; the first is {name}[{place}] = {value}"
        )


def numbers(name: str, values, ndim: int) -> np.ndarray:
    """The values as float64. Raises DataError unless they have `ndim` dimensions and are all finite."""
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
    """The scores as float64 [N, C]. Raises DataError where a row is not a distribution, to the rounding of bfloat16."""
    scores = numbers("scores", scores_NC, 2)
    good = (scores >= 0).all(1) & (abs(scores.sum(1) - 1) < 0.02)
    fault = "are not probabilities, such as softmax(logits), 0 or more with the sum 1"
    require(good, "scores", scores, fault)
    return scores


def mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve. labels: bool or 0 and 1 [N], both of which occur; scores: [N].

    By the sum of ranks (Mann and Whitney 1947): scikit-learn's value. 1,000 resamplings of a thousand examples take
    0.3 s, with scikit-learn 4 s.
    """
    ranks = library("scipy.stats").rankdata(scores)[labels == 1]
    ones = len(ranks)
    zeros = len(labels) - ones
    above = ranks.sum() - ones * (ones + 1) / 2  # pairs of a one and a zero in the right order
    return float(above / (ones * zeros))


def rates_by_class(true_N, predicted_N, classes: Sequence, names: Sequence) -> list[dict]:
    """A row for each class: its name, precision, recall, f1, and its count among the true ones. 0 / 0 is 0."""
    measure = library("sklearn.metrics").precision_recall_fscore_support
    rates = measure(true_N, predicted_N, labels=classes, zero_division=0)
    rows = []
    for name, precision, recall, f1, support in zip(names, *rates):
        row = {"name": name, "precision": float(precision), "recall": float(recall)}
        rows.append(row | {"f1": float(f1), "count": int(support)})
    return rows


def classification(scores_NC, labels_N, names: Sequence[str] | None = None) -> dict:
    """Figures of N examples in C classes, by scikit-learn. scores_NC: probabilities; labels_N: numbers of classes.

    Of the class with the highest probability: accuracy, precision, recall, f1 (macro: the mean over the classes that
    occur in labels or predictions), f1_micro, and of two classes f1_positive, class 1's. Of the probabilities: auc
    (area under ROC; of several classes the mean of each against the rest) and, of two classes or more, log_loss (nats).
    classes: a row for each, with its count in labels; confusion[i][j]: examples of class i that were taken for class j.
    Raises DataError where scores are not probabilities, or labels are not 0 to C - 1.
    """
    scores_NC = probabilities(scores_NC)
    labels_N = numbers("labels", labels_N, 1)
    total = count(scores=scores_NC, labels=labels_N)
    classes = np.arange(scores_NC.shape[1])
    fault = f"are not a class, a whole number from 0 to {len(classes) - 1}"
    require(np.isin(labels_N, classes), "labels", labels_N, fault)
    if names is None:
        names = classes
    names = list(map(str, names))
    count(names=names, classes=classes)
    labels_N = labels_N.astype(int)
    predicted_N = scores_NC.argmax(1)
    rows = rates_by_class(labels_N, predicted_N, classes, names)
    for k, row in enumerate(rows):
        if 0 < row["count"] < total:
            row["auc"] = auc(labels_N == k, scores_NC[:, k])

    result = {"accuracy": mean(predicted_N == labels_N)}
    occur = np.union1d(labels_N, predicted_N)
    for key in ("precision", "recall", "f1"):
        result[key] = mean(rows[k][key] for k in occur)
    result["f1_micro"] = result["accuracy"]  # as all micro averages: an example has one label
    areas = [row["auc"] for row in rows if "auc" in row]
    if len(classes) == 2:
        areas = areas[1:]
        if 1 in occur:
            result["f1_positive"] = rows[1]["f1"]
    if areas:
        result["auc"] = mean(areas)
    sk = library("sklearn.metrics")
    if len(classes) > 1:
        chances_NC = scores_NC / scores_NC.sum(1, keepdims=True)
        result["log_loss"] = float(sk.log_loss(labels_N, chances_NC, labels=classes))
    confusion_CC = sk.confusion_matrix(labels_N, predicted_N, labels=classes)
    return result | {"classes": rows, "confusion": confusion_CC.tolist()}


def multilabel(scores_NC, labels_NC, threshold: float = 0.5) -> dict:
    """Figures of N examples, of which any number of C labels may be true, by scikit-learn. labels_NC: 0 and 1.

    f1_micro, f1 (macro over all C, 0 for what neither occurs nor is predicted; neither F1 where nothing does),
    exact_match (all C right), auc (macro, over the labels that have both values). Raises DataError of other shapes.
    """
    scores_NC = numbers("scores", scores_NC, 2)
    labels_NC = numbers("labels", labels_NC, 2)
    require(np.isin(labels_NC, (0, 1)), "labels", labels_NC, "are neither 0 nor 1")
    if scores_NC.shape != labels_NC.shape:
        raise DataError(
            f"scores and labels must have one shape; theirs are {scores_NC.shape} and {labels_NC.shape}"
        )
    sk = library("sklearn.metrics")
    true_NC = labels_NC.astype(int)
    predicted_NC = (scores_NC >= threshold).astype(int)
    result = {}
    if true_NC.any() or predicted_NC.any():
        counted = None
        if true_NC.shape[1] == 1:
            counted = [1]  # scikit-learn reads one column as the classes 0 and 1
        for key, average in (("f1_micro", "micro"), ("f1", "macro")):
            result[key] = float(
                sk.f1_score(true_NC, predicted_NC, labels=counted, average=average, zero_division=0)
            )
    result["exact_match"] = float(sk.accuracy_score(true_NC, predicted_NC))
    areas = []
    for true_N, scores_N in zip(true_NC.T, scores_NC.T):
        if true_N.min() < true_N.max():
            areas.append(auc(true_N, scores_N))
    if areas:
        result["auc"] = mean(areas)
    return result


def regression(predictions_N, targets_N) -> dict:
    """mse, mae, and the correlations pearson and spearman, of numbers.

    Columns that are constant, or nearly, have no correlation; what a float64 can't hold is left out.
    """
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
    result = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", stats.NearConstantInputWarning)
        with suppress(stats.NearConstantInputWarning):
            result["pearson"] = float(stats.pearsonr(x_N, y_N)[0])
    result["spearman"] = float(stats.spearmanr(x_N, y_N)[0])
    return result


def tagging(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> dict:
    """Over tokens: accuracy, f1 (macro over the tags that occur), f1_micro, and `tags`, a row for each.

    If gold is in BIO or BIOES, also over entities: entity_precision, entity_recall, entity_f1, and `entities`, a row
    for each type. An entity is right where both ends and the type are, as in conlleval (Tjong Kim Sang and Buchholz
    2000). Raises DataError where a sentence has other numbers of tags, or there are no tokens.
    """
    for i in range(count(predicted=predicted, gold=gold)):
        if isinstance(gold[i], str) or len(predicted[i]) != len(gold[i]):
            raise DataError(
                f"sentence {i} must be a list of tags, predicted as many: {predicted[i]} for {gold[i]}"
            )
    predicted_tokens = list(chain.from_iterable(predicted))
    gold_tokens = list(chain.from_iterable(gold))
    total = count(tokens=gold_tokens)
    names = sorted({*predicted_tokens, *gold_tokens})
    rows = rates_by_class(gold_tokens, predicted_tokens, names, names)
    accuracy = sum(map(str.__eq__, predicted_tokens, gold_tokens)) / total
    f1 = mean(row["f1"] for row in rows)
    result = {"accuracy": accuracy, "f1": f1, "f1_micro": accuracy, "tags": rows}
    if names != ["O"] and all(map(BIO.fullmatch, gold_tokens)):
        result |= entity_rates(predicted, gold)
    return result


def texts(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """The references of each hypothesis, as lists. Raises DataError where one has none, or is no text."""
    count(hypotheses=hypotheses, references=references)
    lists = []
    for i, (text, given) in enumerate(zip(hypotheses, references)):
        each = [given] if isinstance(given, str) else list(given)
        if not each or not all(isinstance(one, str) for one in (text, *each)):
            raise DataError(
                f"example {i}: needed are a text and one reference or more; given {text!r} and {each!r}"
            )
        lists.append(each)
    return lists


def bleu_scorer(lowercase: bool = False, tokenize: str = "13a", **options):
    """sacrebleu's BLEU. Raises ConfigError where it has no such tokenizer, or lacks what that needs."""
    lib = library("sacrebleu")
    if tokenize not in lib.BLEU.TOKENIZERS:
        raise ConfigError(
            f"sacrebleu has no tokenizer {tokenize!r}; it has {', '.join(lib.BLEU.TOKENIZERS)}"
        )
    try:
        return lib.BLEU(lowercase=lowercase, tokenize=tokenize, **options)
    # The message names the package, or the file that it looks for.
    except (ImportError, OSError, RuntimeError) as error:
        need = " ".join(str(error).split())
        raise ConfigError(
            f"config.eval.bleu_tokenize={tokenize}: {need} Or choose char or zh."
        ) from None


def translation(hypotheses, references, lowercase: bool = False, tokenize: str = "13a") -> dict:
    """bleu and chrf of the corpus, from 0 to 100, and sacrebleu's signatures, which make them comparable (Post 2018).

    references: a text for each hypothesis, or a list of one or more. tokenize: one of sacrebleu's. BLEU counts runs of
    four tokens: where no reference has one it is left out, as it would be 0 even for the references themselves.
    Raises what `texts` and `bleu_scorer` raise.
    """
    lists = texts(hypotheses, references)
    bleu = bleu_scorer(lowercase, tokenize)
    chrf = library("sacrebleu").CHRF(lowercase=lowercase)
    by_place = list(zip_longest(*lists))  # the first references of all, the second, ...

    result = {}
    if any(map(partial(has_four_tokens, bleu), chain.from_iterable(lists))):
        result["bleu"] = bleu.corpus_score([*hypotheses], by_place).score
        result["signature"] = str(bleu.get_signature())
    result["chrf"] = chrf.corpus_score([*hypotheses], by_place).score
    result["chrf_signature"] = str(chrf.get_signature())
    return result


def has_four_tokens(bleu, text: str) -> bool:
    return bleu.corpus_score([text], [[text]]).totals[3] > 0


def bleu_counts(
    hypotheses, references, lowercase: bool = False, tokenize: str = "13a"
) -> np.ndarray:
    """[N, 10]: what BLEU counts in each sentence. bootstrap(bleu_of, bleu_counts(...)) resamples the sentences."""
    bleu = bleu_scorer(lowercase, tokenize, effective_order=True)  # only stops a warning
    rows = []
    for text, each in zip(hypotheses, texts(hypotheses, references)):
        score = bleu.sentence_score(text, each)
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows)


def bleu_of(counts: np.ndarray) -> float:
    """BLEU of the corpus, from 0 to 100, that has these bleu_counts [N, 10]."""
    sums = counts.sum(0).tolist()
    compute = library("sacrebleu").BLEU.compute_bleu
    return compute(sums[:4], sums[4:8], *sums[8:], smooth_method="exp").score


def rouge(hypotheses, references) -> dict:
    """ROUGE (Lin 2004): F-measures to 100, without stemming, the mean over examples of that of the best reference.

    rouge1, rouge2, rougeL, and rougeLsum, which reads each line as a sentence. rouge_score reads the letters a to z and
    digits only: raises DataError where most of the references' letters are others, also where each reference has some,
    such as the digits of a year.
    """
    lists = texts(hypotheses, references)
    scorer = library("rouge_score.rouge_scorer").RougeScorer(ROUGE)
    everything = "".join(chain.from_iterable(lists))
    letters = sum(map(str.isalnum, everything))
    known = len(KNOWN_TO_ROUGE.findall(everything))
    if 2 * known < letters:
        raise DataError(
            f"rouge_score reads a to z and digits only, {known / letters:.0%} of the references' letters; "
            "chrf reads all"
        )
    scores = list(map(scorer.score_multi, lists, hypotheses))
    result = {}
    for key in ROUGE:
        result[key] = 100 * mean(score[key].fmeasure for score in scores)
    return result


def question_answering(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict:
    """SQuAD's exact_match and f1 over tokens, to 100, by the best of the right answers (Rajpurkar et al. 2018).

    Where `answers` has none, an empty prediction is right and no other, as in the script of v2.0. Raises DataError
    where the answers to a question are no list.
    """
    exact = []
    f1 = []
    for i in range(count(predictions=predictions, answers=answers)):
        if isinstance(answers[i], str):
            raise DataError(
                f"answers[{i}] is a text; it must be a list of all that are right: {[answers[i]]}"
            )
        given = answer_tokens(predictions[i])
        golds = list(filter(None, map(answer_tokens, answers[i]))) or [[]]
        exact.append(given in golds)
        f1.append(max(map(partial(token_f1, given), golds)))
    return {"exact_match": 100 * mean(exact), "f1": 100 * mean(f1)}


def answer_tokens(text: str) -> list[str]:
    """SQuAD's words of an answer: lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def token_f1(given: list[str], gold: list[str]) -> float:
    if given or gold:
        return 2 * (Counter(given) & Counter(gold)).total() / len(given + gold)
    return 1.0


def calibration(scores, correct, bins: int = 15) -> dict:
    """ece and mce, expected and maximum calibration error (Guo et al. 2017), and brier, over `bins` of equal width.

    Of the gaps between confidence and accuracy in each bin these are the mean, weighted by examples, and the largest;
    brier is the mean of (confidence - correct)^2. scores: confidences [N], or probabilities [N, C], whose largest they
    are; correct: bool [N], as of predictions == labels. Result's bins: low (exclusive), high, confidence, accuracy and
    count of those that are not empty. Raises DataError of scores that are not of 0 to 1, and of labels as `correct`.
    """
    if np.ndim(scores) == 2:
        confidence = probabilities(scores).max(1)
    else:
        confidence = numbers("scores", scores, 1)
    good = (confidence >= 0) & (confidence < 1.02)  # bfloat16 rounds
    require(good, "scores", confidence, "are not of 0 to 1")
    confidence = np.minimum(confidence, 1)
    total = count(scores=confidence, correct=correct)
    correct = np.asarray(correct)
    if correct.dtype != bool:  # labels, by mistake
        raise DataError(
            f"correct must be True or False, as of predictions == labels; it begins with {correct[:5]}"
        )
    edges = np.linspace(0, 1, bins + 1).tolist()
    places = np.searchsorted(edges[1:-1], confidence)
    rows = []
    gaps = []
    ece = 0.0
    for k in np.unique(places):
        here = places == k
        row = {"low": edges[k], "high": edges[k + 1]}
        row |= {"confidence": mean(confidence[here]), "accuracy": mean(correct[here])}
        row["count"] = int(here.sum())
        rows.append(row)
        gaps.append(abs(row["confidence"] - row["accuracy"]))
        ece += gaps[-1] * row["count"] / total
    return {"ece": ece, "mce": max(gaps), "brier": mean((confidence - correct) ** 2), "bins": rows}


def choose(arrays: Sequence[Sequence], index: Sequence[int]) -> list[Sequence]:
    """The entries of each array, or list, at these places."""
    chosen = []
    for array in arrays:
        if isinstance(array, np.ndarray):
            chosen.append(array[index])
        else:
            chosen.append([array[i] for i in index])
    return chosen


def resample(metric: Callable, *arrays: Sequence, samples: int = 1000, seed: int = 0) -> list:
    """metric(*arrays) of `samples` draws of all examples with replacement (Efron 1979)."""
    total = count(**{f"array_{i}": array for i, array in enumerate(arrays)})
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(samples):
        index = rng.integers(0, total, total)
        values.append(metric(*choose(arrays, index)))
    return values


def percentile_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """(low, high) around the middle `level` of resampled figures. Raises DataError where all are NaN.

    A draw that has no figure (NaN), such as the AUC where it holds one class alone, does not count.
    """
    known = np.asarray(values, float)
    if not np.isnan(known).all():
        known = known[~np.isnan(known)]
    outside = (1 - level) / 2
    low, high = np.quantile(numbers("resampled figures", known, 1), [outside, 1 - outside])
    return float(low), float(high)


def bootstrap(
    metric: Callable[..., float], *arrays: Sequence, samples=1000, seed=0, level=0.95
) -> tuple[float, float]:
    """The percentile interval of metric(*arrays), over `samples` draws of all examples with replacement."""
    return percentile_interval(resample(metric, *arrays, samples=samples, seed=seed), level)


def wilson_interval(share: float, total: int, level: float = 0.95) -> tuple[float, float]:
    """Of a share, from 0 to 1, of `total` examples (Wilson 1927): wider than 0 at 1.0 too."""
    z = library("scipy.stats").norm.ppf((1 + level) / 2)
    scale = 1 + z**2 / total
    centre = (share + z**2 / (2 * total)) / scale
    variance = share * (1 - share) / total
    half = z * np.sqrt(variance + (z / (2 * total)) ** 2) / scale
    low = max(centre - half, 0)
    high = min(centre + half, 1)
    return float(low), float(high)


def by_group(metric: Callable[..., dict], groups: Sequence, *arrays: Sequence) -> dict:
    """{group: {"count": n, **metric(*arrays)}} of the examples of each group, the largest group first."""
    count(groups=groups, **{f"array_{i}": array for i, array in enumerate(arrays)})
    if isinstance(groups, np.ndarray):
        groups = groups.tolist()
    places = {}
    for i, group in enumerate(groups):
        places.setdefault(group, []).append(i)
    result = {}
    for group in sorted(places, key=lambda group: (-len(places[group]), str(group))):
        index = places[group]
        figures = metric(*choose(arrays, index))
        result[group] = {"count": len(index), **figures}
    return result
