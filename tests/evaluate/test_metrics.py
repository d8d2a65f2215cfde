"""Laws of the figures of merit: they are those of scikit-learn, sacrebleu and the definitions; none is silent."""

import json
import math
import string
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.config.check import check
from jaxlm.config.keys import BLEU_TOKENIZERS, base
from jaxlm.errors import ConfigError, DataError
from jaxlm.evaluate import metrics, pictures
from jaxlm.evaluate.entities import entities
from jaxlm.evaluate.evaluator import Evaluator
from jaxlm.evaluate.score import bleu_options, of_texts, warn_once

sk = pytest.importorskip("sklearn.metrics")
sacrebleu = pytest.importorskip("sacrebleu")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
WORDS = "the a cat Sat, on mats. na\u00efve 42 \u2013 red".split()


def scores_of(rng, n, classes, skill=1.0):
    labels = rng.integers(0, classes, n)
    e = np.exp(rng.normal(size=(n, classes)) + skill * np.eye(classes)[labels])
    return e / e.sum(1, keepdims=True), labels


def sentences(rng, n, most=9):
    return [" ".join(rng.choice(WORDS, rng.integers(0, most))) for _ in range(n)]


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("ties", [False, True])
def test_classification_is_scikit_learns(classes, ties):
    scores, labels = scores_of(np.random.default_rng(classes), 300, classes)
    if ties:  # few values, many of them equal
        scores = (np.round(4 * scores) + 1) / (np.round(4 * scores) + 1).sum(1, keepdims=True)
    got = metrics.classification(scores, labels)
    predicted = scores.argmax(1)
    assert got["accuracy"] == got["f1_micro"] == sk.accuracy_score(labels, predicted)
    for key, score in {
        "precision": sk.precision_score,
        "recall": sk.recall_score,
        "f1": sk.f1_score,
    }.items():
        assert got[key] == pytest.approx(score(labels, predicted, average="macro"))
        assert [row[key] for row in got["classes"]] == pytest.approx(
            score(labels, predicted, average=None)
        )
    expected = sk.roc_auc_score(labels, scores[:, 1] if classes == 2 else scores, multi_class="ovr")
    assert got["auc"] == pytest.approx(expected)
    assert got["log_loss"] == pytest.approx(sk.log_loss(labels, scores))
    assert got["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
    assert got.get("f1_positive") == (
        pytest.approx(sk.f1_score(labels, predicted)) if classes == 2 else None
    )
    json.dumps(got, allow_nan=False)  # plain Python throughout


def test_classes_that_do_not_occur_are_left_out():
    scores, labels = scores_of(np.random.default_rng(0), 200, 4, skill=9)
    labels[labels == 2] = 1
    scores[:, 2] = 0
    got = metrics.classification(scores / scores.sum(1, keepdims=True), labels, names="abcd")
    assert got["f1"] == pytest.approx(sk.f1_score(labels, scores.argmax(1), average="macro"))
    assert "auc" not in got["classes"][2]
    assert got["classes"][2]["count"] == 0
    assert got["auc"] == pytest.approx(
        np.mean([row["auc"] for row in got["classes"] if row["name"] != "c"])
    )
    alone = metrics.classification([[0.2, 0.8], [0.7, 0.3]], [1, 1])
    assert "auc" not in alone
    assert alone["accuracy"] == 0.5
    equal = metrics.classification(np.full((6, 2), 0.5), [0, 1] * 3)
    assert equal["auc"] == 0.5
    assert equal["log_loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("classes", [1, 5])
def test_multilabel_is_scikit_learns(classes):
    rng = np.random.default_rng(1)
    labels = (rng.random((200, classes)) < 0.3).astype(int)
    labels[:, -1] *= classes == 1  # the last of five never occurs
    scores = 0.4 * labels + 0.6 * rng.random((200, classes))
    got = metrics.multilabel(scores, labels, threshold=0.55)
    predicted = scores >= 0.55
    each = []
    for y, p in zip(labels.T, predicted.T):
        each.append(sk.f1_score(y, p, zero_division=0))
    assert got["f1"] == pytest.approx(np.mean(each))
    assert got["f1_micro"] == pytest.approx(sk.f1_score(labels.ravel(), predicted.ravel()))
    assert got["exact_match"] == pytest.approx(sk.accuracy_score(labels, predicted))
    areas = []
    for y, s in zip(labels.T, scores.T):
        if y.any():
            areas.append(sk.roc_auc_score(y, s))
    assert got["auc"] == pytest.approx(np.mean(areas))
    assert len(areas) == max(classes - 1, 1)


def test_regression():
    x = np.array([1.0, 2, 3, 5])
    y = np.array([2.0, 1, 4, 50])
    got = metrics.regression(x, y)
    assert got["mse"] == pytest.approx(sk.mean_squared_error(y, x))
    assert got["mae"] == 12
    assert got["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert got["spearman"] == pytest.approx(0.8)
    assert (
        set(metrics.regression([1, 1, 1], [1, 2, 3]))
        == set(metrics.regression([1], [2]))
        == {"mse", "mae"}
    )


ENTITIES = {  # tags: first token, token after the last, type
    "O O": [],
    "B-X I-X O B-X": [(0, 2, "X"), (3, 4, "X")],
    "B-X B-X": [(0, 1, "X"), (1, 2, "X")],
    "O I-X I-X": [(1, 3, "X")],  # conlleval forgives a missing B-
    "B-X I-Y I-Y": [(0, 1, "X"), (1, 3, "Y")],  # another type begins another entity
    "I-X B-X I-X O I-Y": [(0, 1, "X"), (1, 3, "X"), (4, 5, "Y")],
    "B I O": [(0, 2, "")],
    "B-a-b I-a-b": [(0, 2, "a-b")],
    "B-X E-X S-X I-X": [(0, 2, "X"), (2, 3, "X"), (3, 4, "X")],
    "B-X <pad> I-X": [(0, 1, "X"), (2, 3, "X")],
}


def test_tagging():
    assert {tags: entities(tags.split()) for tags in ENTITIES} == ENTITIES
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "I-LOC"]]
    ours = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "I-LOC", "I-LOC"]]
    got = metrics.tagging(ours, gold)
    assert got["accuracy"] == got["f1_micro"] == pytest.approx(4 / 7)
    assert got["f1"] == pytest.approx(
        sk.f1_score([*gold[0], *gold[1]], [*ours[0], *ours[1]], average="macro")
    )
    # of 3 found and 3 true, 1 is right: both of its ends and the type
    assert [got[f"entity_{key}"] for key in ("precision", "recall", "f1")] == pytest.approx(
        [1 / 3] * 3
    )
    assert {row["name"]: row["f1"] for row in got["entities"]} == {
        "LOC": 0,
        "PER": pytest.approx(2 / 3),
    }
    speech = metrics.tagging([["NOUN", "VERB"], []], [["NOUN", "NOUN"], []])
    assert speech["accuracy"] == 0.5
    assert "entity_f1" not in speech
    for bad in ([["O"], []], [["O"], "O"]):
        with pytest.raises(DataError, match="sentence 1 must be a list of tags, predicted as many"):
            metrics.tagging([["O"], ["O"]], bad)


def test_translation_is_sacrebleus():
    rng = np.random.default_rng(2)
    ours, first, second = (sentences(rng, 60) for _ in range(3))
    one = metrics.translation(ours, first)
    assert one["bleu"] == sacrebleu.corpus_bleu(ours, [first]).score > 0
    assert one["chrf"] == sacrebleu.corpus_chrf(ours, [first]).score
    assert one["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    two = metrics.translation(
        ours, [list(pair) for pair in zip(first, second)], lowercase=True, tokenize="char"
    )
    assert (
        two["bleu"]
        == sacrebleu.corpus_bleu(ours, [first, second], lowercase=True, tokenize="char").score
    )
    assert "nrefs:2|case:lc" in two["signature"]
    assert "case:lc" in two["chrf_signature"]
    ragged = []
    for i, (a, b) in enumerate(zip(first, second)):
        ragged.append([a, b] if i % 2 else a)
    got = metrics.translation(ours, ragged)
    assert (
        got["bleu"]
        == sacrebleu.corpus_bleu(
            ours, [first, [b if i % 2 else None for i, b in enumerate(second)]]
        ).score
    )
    assert "nrefs:var" in got["signature"]
    assert "nrefs:var" in got["chrf_signature"]
    assert metrics.bleu_of(metrics.bleu_counts(ours, ragged)) == pytest.approx(got["bleu"])
    assert metrics.translation(["", "x"], ["", "four of these words"])["bleu"] == 0
    assert metrics.translation(["x"], ["three of these"]).keys() == {"chrf", "chrf_signature"}
    with pytest.raises(ConfigError, match="no tokenizer 'klingon'"):
        metrics.translation(ours, first, tokenize="klingon")


def test_rouge_is_rouge_scores():
    rng = np.random.default_rng(3)
    ours, golds = (
        [f"{a}\n{b}" for a, b in zip(sentences(rng, 30), sentences(rng, 30))] for _ in range(2)
    )
    got = metrics.rouge(ours, golds)
    scorer = rouge_scorer.RougeScorer(metrics.ROUGE)
    each = []
    for a, b in zip(ours, golds):
        each.append([score.fmeasure for score in scorer.score(b, a).values()])
    assert list(got.values()) == pytest.approx(100 * np.mean(each, axis=0))
    assert metrics.rouge(["The cats!"], [["dogs", "the cats"]])["rouge2"] == 100
    with pytest.raises(DataError, match="a to z"):
        metrics.rouge(["\u732b"], ["\u732b"])


@pytest.mark.parametrize(
    "text",
    [
        "\u732b\u304c\u597d\u304d",
        "\u043a\u043e\u0442 \u0438 \u043f\u0435\u0441 \u0441\u043f\u044f\u0442",
        "\u03b7 \u03b3\u03ac\u03c4\u03b1",
    ],
)
def test_texts_that_rouge_cannot_read_keep_bleu_and_chrf(text, caplog):
    config = base()
    warn_once.cache_clear()
    got = of_texts(config, [text, text], [text, text])
    of_texts(config, [text, text], [text, text])
    assert got["chrf"] == 100
    assert got == metrics.translation([text, text], [text, text])
    *others, line = caplog.messages
    assert line.startswith("ROUGE is left out: rouge_score reads a to z")
    assert "\n" not in line
    assert [other[:30] for other in others] == ["BLEU is left out: no reference"] * (
        "bleu" not in got
    )


def test_texts_in_a_to_z_have_rouge_too(caplog):
    texts = ["the cat is red", "so is the mat"]
    got = of_texts(base(), texts, texts)
    assert got["bleu"] == pytest.approx(100)
    assert got["rougeL"] == 100
    assert not caplog.messages
    with pytest.raises(DataError, match="needed are"):
        of_texts(base(), texts, texts[:1])


def test_the_tokenizer_of_bleu_can_be_chosen():
    config = base()
    texts = ["\u732b\u304c\u597d\u304d", "\u72ac\u304c\u597d\u304d"]
    assert "bleu" not in of_texts(config, texts, texts)  # a word each, to 13a
    for name in ("char", "zh"):
        config.eval.bleu_tokenize = name
        got = of_texts(config, texts, texts)
        assert got["bleu"] == pytest.approx(100)
        assert f"tok:{name}" in got["signature"]
        counts = metrics.bleu_counts(texts, texts, **bleu_options(config))
        assert metrics.bleu_of(counts) == pytest.approx(100)


def test_a_tokenizer_that_sacrebleu_has_not_is_refused_before_a_run():
    config = base()
    assert set(BLEU_TOKENIZERS) == set(sacrebleu.BLEU.TOKENIZERS)
    config.task.name = "seq2seq"
    config.eval.bleu_tokenize = "chars"
    (problem,) = [each for each in check(config) if "bleu" in each]
    assert "config.eval.bleu_tokenize=chars: must be one of 13a" in problem
    assert "did you mean char" in problem
    config.task.name = "classify"
    config.eval.bleu_tokenize = "char"
    (problem,) = [each for each in check(config) if "bleu" in each]
    assert "task classify does not follow it" in problem


@pytest.mark.parametrize("error", [RuntimeError, ImportError, OSError])
@pytest.mark.parametrize("task", ["seq2seq", "sft"])
def test_what_a_tokenizer_of_bleu_needs_is_told_before_a_run(task, error, monkeypatch):
    def missing(**options):
        raise error("\nneeds more.\n\n    pip install more\n")

    missing.TOKENIZERS = sacrebleu.BLEU.TOKENIZERS
    monkeypatch.setattr(sacrebleu, "BLEU", missing)
    config = base()
    config.task.name = task
    config.eval.generate = 5
    config.eval.bleu_tokenize = "ja-mecab"
    with pytest.raises(
        ConfigError, match=r"bleu_tokenize=ja-mecab: needs more\. pip install more Or choose char"
    ):
        Evaluator(config, mesh=None)


@pytest.mark.parametrize(
    ("task", "bad"), [("regress", [np.nan]), ("regress", [np.inf]), ("classify", [np.nan, np.nan])]
)
def test_scores_that_are_nan_leave_an_evaluation_its_loss(task, bad, caplog):
    evaluator = object.__new__(Evaluator)  # without a model
    evaluator.config = base()
    evaluator.config.task.name = task
    evaluator.config.data.labels = ("no", "yes")
    evaluator.sources = [SimpleNamespace(pieces=[{"label": 1}, {"label": 0}])]
    warn_once.cache_clear()
    assert evaluator.scored({0: np.array(bad), 1: np.array(bad)}) == {}
    (line,) = caplog.messages
    assert line.startswith("this evaluation gives only the loss: ")
    assert "NaN" in line


def squad_by_definition(prediction, answers):
    """Of one question, another way: articles are dropped from among the words, which are then counted one by one."""

    def words(text):
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    exact = f1 = 0.0
    for gold in [words(a) for a in answers if words(a)] or [[]]:
        given = words(prediction)
        same = sum(min(given.count(word), gold.count(word)) for word in set(given))
        precision = same / max(len(given), 1)
        recall = same / max(len(gold), 1)
        exact = max(exact, float(given == gold))
        f1 = max(
            f1, 2 * precision * recall / (precision + recall) if same else float(given == gold)
        )
    return 100 * exact, 100 * f1


def test_question_answering():
    rng = np.random.default_rng(4)
    ours = sentences(rng, 300, most=5)
    golds = []
    for _ in range(300):
        golds.append(sentences(rng, rng.integers(0, 4), most=5))
    got = metrics.question_answering(ours, golds)
    assert [*got.values()] == pytest.approx(
        np.mean([*map(squad_by_definition, ours, golds)], axis=0)
    )
    assert 0 < got["exact_match"] < got["f1"] < 100

    def exact(prediction, *answers):
        return metrics.question_answering([prediction], [answers])["exact_match"]

    assert (
        exact("The U.S. caf\u00e9!", "us CAF\u00c9")
        == exact("", "")
        == exact("the", "")
        == exact("")
        == 100
    )
    assert exact("cat", "") == exact("cat") == exact("", "cat") == exact("theatre", "atre") == 0
    assert metrics.question_answering(["red red cat"], [["red dog"]])["f1"] == pytest.approx(40)
    with pytest.raises(DataError, match="must be a list"):
        metrics.question_answering(["a"], ["b"])


def test_calibration():
    confidence = np.array([0.55, 0.65, 0.95, 1.0, 0.6])
    correct = np.array([True, False, True, True, False])
    got = metrics.calibration(
        confidence, correct, bins=5
    )  # (0.4, 0.6]: 0.55, 0.6; (0.6, 0.8]: 0.65; (0.8, 1]
    assert got["ece"] == pytest.approx(2 / 5 * 0.075 + 1 / 5 * 0.65 + 2 / 5 * 0.025)
    assert got["mce"] == pytest.approx(0.65)
    assert [row["count"] for row in got["bins"]] == [2, 1, 2]
    assert got["brier"] == pytest.approx(np.mean((confidence - correct) ** 2))
    rng = np.random.default_rng(5)
    sure = rng.random(20000)
    assert (
        metrics.calibration(sure, rng.random(20000) < sure)["ece"] < 0.015
    )  # right as often as it says
    scores, labels = scores_of(rng, 100, 3)
    assert metrics.calibration(scores, labels > 0) == metrics.calibration(scores.max(1), labels > 0)
    with pytest.raises(DataError, match="predictions == labels"):
        metrics.calibration(scores, labels)


def test_bootstrap():
    rng = np.random.default_rng(6)
    inside = 0
    for seed in range(200):
        low, high = metrics.bootstrap(np.mean, rng.random(100) < 0.7, samples=200, seed=seed)
        inside += low <= 0.7 <= high
    assert 180 <= inside <= 198  # 95% of 200 is 190, with a standard deviation of 3
    ours = sentences(rng, 50)
    golds = sentences(rng, 50)

    def whole(a, b):
        return metrics.translation(a, b)["bleu"]

    fast = metrics.bootstrap(metrics.bleu_of, metrics.bleu_counts(ours, golds), samples=20)
    assert fast == pytest.approx(
        metrics.bootstrap(whole, ours, golds, samples=20)
    )  # sentences, the same ones
    assert fast != metrics.bootstrap(whole, ours, golds, samples=20, seed=1)

    def rare(x):
        return metrics.classification(np.stack([1 - x, x], 1), (x > 0.9).astype(int)).get(
            "auc", math.nan
        )

    assert metrics.bootstrap(rare, np.array([0.2, 0.4, 0.5, 0.95])) == (1.0, 1.0), (
        "of draws without 0.95 there is none"
    )
    with pytest.raises(DataError, match="20 of 20 resampled figures are NaN"):
        metrics.bootstrap(lambda x: math.nan, ours, samples=20)


@pytest.mark.parametrize(("right", "total"), [(0, 7), (3, 10), (50, 50), (2, 2)])
def test_wilsons_interval_is_scipys(right, total):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, total).proportion_ci(method="wilson")
    assert metrics.wilson_interval(right / total, total) == pytest.approx(tuple(expected))


def test_several_figures_share_their_draws():
    values = np.random.default_rng(0).random(40)
    draws = metrics.resample(lambda x: [x.mean(), x.max()], values, samples=50)
    for place, metric in enumerate((np.mean, np.max)):
        column = [draw[place] for draw in draws]
        assert metrics.percentile_interval(column) == metrics.bootstrap(metric, values, samples=50)


def test_by_group():
    scores, labels = scores_of(np.random.default_rng(7), 60, 2)
    groups = ["b"] * 15 + ["a"] * 30 + ["c"] * 15
    got = metrics.by_group(
        partial(metrics.classification, names=["no", "yes"]), groups, scores, labels
    )
    assert list(got) == ["a", "b", "c"]
    assert got["a"]["count"] == 30
    assert got["b"] == {"count": 15} | metrics.classification(
        scores[:15], labels[:15], ["no", "yes"]
    )
    assert metrics.by_group(lambda x: {"x": x}, np.array([3, 5, 5]), list("xyz"))[5] == {
        "count": 2,
        "x": ["y", "z"],
    }


def test_no_silent_number():
    scores, labels = scores_of(np.random.default_rng(8), 9, 3)
    broken = scores.copy()
    broken[4, 1] = np.nan
    broken[7] = np.inf
    for bad, said in (
        (
            (broken, labels),
            r"4 of 27 scores are NaN or infinite; the first is scores\[4, 1\] = nan",
        ),
        ((scores * 3, labels), "9 of 9 scores are not probabilities"),
        (
            (scores, [*labels[:8], -1]),
            r"1 of 9 labels are not a class.* from 0 to 2; the first is labels\[8\] = -1",
        ),
        ((scores, ["cat"] * 9), "labels must be numbers: could not convert string to float: 'cat'"),
        ((scores, labels[:8]), "9 scores, 8 labels"),
        ((scores, labels, ["a", "b"]), "2 names, 3 classes"),
    ):
        with pytest.raises(DataError, match=said):
            metrics.classification(*bad)
    for name in "classification multilabel regression tagging translation rouge question_answering calibration".split():
        with pytest.raises(DataError):
            getattr(metrics, name)([], [])


def test_needs_neither_jax_nor_the_libraries_until_used(monkeypatch):
    code = (
        "import sys, jaxlm.evaluate.pictures\n"
        "print({'jax', 'sklearn', 'sacrebleu', 'matplotlib'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "set()\n"
    )
    for module in ("sacrebleu", "sklearn.metrics", "rouge_score.rouge_scorer", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)

    def bars(a, b):
        return pictures.bars("never.png", {"a": 1.0}, "figure")

    def curve(a, b):
        return pictures.roc("never.png", [[1.0]], [0])

    for call in (metrics.translation, metrics.rouge, bars, curve):
        with pytest.raises(ConfigError, match=r'not installed; type: pip install -e ".\[eval\]"'):
            call(["a"], ["a"])
