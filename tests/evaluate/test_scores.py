"""A figure without meaning is left out with a line that says why, the rest is given; no evaluation ends a run."""

import json
import logging
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from conftest import program

from jaxlm.config.keys import base
from jaxlm.data.examples import Examples
from jaxlm.data.tokenization.tokenizer import Bytes
from jaxlm.errors import ConfigError, DataError, NumericsError
from jaxlm.evaluate import metrics, report
from jaxlm.evaluate.__main__ import finite
from jaxlm.evaluate.evaluator import Evaluator
from jaxlm.evaluate.score import attempt, of_texts, warn_once
from jaxlm.train.best import Best
from jaxlm.train.loop import Run

pytest.importorskip("scipy")
pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")
NAN = float("nan")
NAMES = {
    "classify": ("no", "yes"),
    "multilabel": ("a", "b"),
    "tag": ("O", "B-PER", "B-LOC"),
    "regress": (),
    "qa": (),
}


@pytest.fixture(autouse=True)
def tell_again():
    warn_once.cache_clear()


def config_of(task, names=None):
    config = base()
    config.task.name = task
    if names is None:
        config.data.labels = NAMES.get(task, ())
    else:
        config.data.labels = names
    return config


def pieces_of(task, golds):
    if task == "tag":
        return [{"targets": np.array(gold), "weights": np.ones(len(gold))} for gold in golds]
    if task == "multilabel":
        return [{"label": np.array(gold)} for gold in golds]
    return [{"label": gold} for gold in golds]


def evaluated(monkeypatch, task, golds, scores, groups=(), names=None, asked=None):
    """The figures of jaxlm.evaluate for these scores, without a model."""
    examples = [{"group": group} for group in groups] or [{}] * len(golds)
    source = SimpleNamespace(pieces=pieces_of(task, golds), examples=examples)

    def fill(self, lm, config, args):
        self.config = config
        self.args = args
        self.source = source
        self.files = []
        self.evaluator = SimpleNamespace(figures=lambda sums, complete: {"loss": 0.5})

    def run(self):
        self.sums = {}
        self.complete = True
        self.scores = {i: np.array(each, float) for i, each in enumerate(scores)}

    monkeypatch.setattr(report.Reporter, "__init__", fill)
    monkeypatch.setattr(report.Reporter, "run", run)
    args = SimpleNamespace(bootstrap=20, pictures=None, answers=None)
    return report.report(None, config_of(task, names), asked, "", args)


SURE = [[0.1, 0.9], [0.8, 0.2]]  # probabilities of two classes
CASES = {
    "one class": (
        "classify",
        [1, 1],
        SURE,
        "auc",
        {"accuracy", "f1"},
        "every example is of the class yes",
    ),
    "no positives": (
        "classify",
        [0, 0],
        [SURE[1]] * 2,
        "f1_positive",
        {"accuracy"},
        "none is taken for it",
    ),
    "one example": (
        "classify",
        [1],
        SURE[:1],
        "auc",
        {"accuracy"},
        "every example is of the class yes",
    ),
    "NaN": (
        "classify",
        [1, 0],
        [[NAN, NAN], SURE[1]],
        "accuracy",
        set(),
        "labels is left out: 2 of 4 scores are NaN",
    ),
    "infinite": (
        "regress",
        [1.0, 2.0],
        [[np.inf], [1.0]],
        "mse",
        set(),
        "labels is left out: 1 of 2 predictions are NaN",
    ),
    "constant labels": (
        "regress",
        [3.0, 3.0],
        [[1.0], [2.0]],
        "pearson",
        {"mse", "mae"},
        "every label is 3",
    ),
    "constant answers": (
        "regress",
        [1.0, 2.0],
        [[4.0], [4.0]],
        "spearman",
        {"mse"},
        "every prediction is the same",
    ),
    "one number": (
        "regress",
        [1.0],
        [[2.0]],
        "pearson",
        {"mse", "mae"},
        "spearman are left out: there is one example",
    ),
    "very large": (
        "regress",
        [1e200, -1e200],
        [[1e200], [3e200]],
        "mse",
        {"mae"},
        "too large for a float64",
    ),
    "by rounding": (
        "regress",
        [1.0, 2.0, 3.0],
        [[1.0], [1.0], [1 + 1e-15]],
        "pearson",
        {"mse"},
        "too near",
    ),
    "no labels": (
        "multilabel",
        [[0, 0]] * 2,
        [[0.1, 0.2]] * 2,
        "f1",
        {"exact_match"},
        "no example has a label",
    ),
    "same labels": (
        "multilabel",
        [[1, 0]] * 2,
        [[0.9, 0.2]] * 2,
        "auc",
        {"f1"},
        "true of every example or of none",
    ),
    "NaN of sets": (
        "multilabel",
        [[1, 0]] * 2,
        [[NAN, 0.2]] * 2,
        "f1",
        set(),
        "2 of 4 scores are NaN",
    ),
    "no entity": (
        "tag",
        [[0, 0]],
        [[[1, 0, 0]] * 2],
        "entity_f1",
        {"accuracy", "f1"},
        "there is no entity",
    ),
    "NaN of tags": (
        "tag",
        [[0]],
        [[[NAN, 0, 0]]],
        "accuracy",
        set(),
        "the scores of 1 of 1 examples are NaN",
    ),
    "NaN of spans": (
        "qa",
        [0],
        [[[NAN, 0]]],
        "exact_match",
        set(),
        "the scores of 1 of 1 examples are NaN",
    ),
    "no tokens": ("tag", [[]], [np.zeros((0, 3))], "accuracy", set(), "labels is left out"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES)
def test_evaluate_leaves_out_what_has_no_meaning(case, monkeypatch, caplog):
    task, golds, scores, without, given, why = CASES[case]
    result = evaluated(monkeypatch, task, golds, scores)
    assert result["loss"] == 0.5
    assert without not in result
    assert given <= set(result)
    lines = []
    for line in caplog.messages:
        if why in line:
            lines.append(line)
    assert len(lines) == 1
    assert all("\n" not in line for line in caplog.messages)
    assert report.table({"model": "encoder"} | result)
    json.dumps(finite(result), allow_nan=False, default=float)


@pytest.mark.parametrize("case", ["NaN", "infinite", "no tokens"])
def test_where_nothing_has_meaning_the_loss_remains(case, monkeypatch):
    task, golds, scores, *_ = CASES[case]
    assert evaluated(monkeypatch, task, golds, scores, asked=["labels"]) == {"loss": 0.5}


def test_all_figures_that_have_meaning_need_no_line(monkeypatch, caplog):
    result = evaluated(monkeypatch, "classify", [1, 0, 1, 0], SURE * 2)
    assert {"auc", "f1_positive", "accuracy_interval", "calibration_ece"} <= set(result)
    assert not caplog.messages
    result = evaluated(monkeypatch, "regress", [1.0, 2.0, 4.0], [[1.0], [3.0], [2.0]])
    assert {"pearson", "spearman", "mse_interval"} <= set(result)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("golds", "low", "high"), [([1, 0] * 25, 0.928, 1.0), ([0, 1] * 25, 0.0, 0.072)]
)
def test_a_score_without_a_mistake_has_an_interval_of_some_width(golds, low, high, monkeypatch):
    result = evaluated(monkeypatch, "classify", golds, SURE * 25)
    for name in ("accuracy", "f1", "auc"):
        assert result[f"{name}_interval"] == pytest.approx([low, high], abs=1e-3)
    line = next(line for line in report.table(result) if line.startswith("accuracy"))
    assert f"({low:.3f}" in line


def test_classes_that_are_in_no_mean_are_named(monkeypatch, caplog):
    scores = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]
    result = evaluated(monkeypatch, "classify", [0, 1], scores, names=("x", "y", "z"))
    assert result["f1"] == 1
    assert caplog.messages == [
        "precision, recall and f1 are means without what neither occurs nor is said: z"
    ]
    assert result["classes"][2] == {"name": "z", "count": 0}  # its rates are 0 / 0
    assert report.table({"model": "encoder"} | result)
    assert report.f1_of("z", result) == ""
    assert any(
        line.startswith("f1 of z")
        for line in report.comparison({"runs/a": result, "runs/b": result})
    )


def test_groups_may_have_one_example_one_class_or_no_figures(monkeypatch, caplog):
    scores = [*SURE, SURE[0], [NAN, NAN]]
    caplog.set_level(logging.WARNING)
    result = evaluated(
        monkeypatch, "classify", [1, 0, 1, 0], scores, groups="aabc", asked=["loss", "groups"]
    )
    groups = result["groups"]
    assert groups["a"]["auc"] == 1
    assert groups["b"]["accuracy"] == 1
    assert "auc" not in groups["b"]
    assert groups["c"] == {"count": 1}
    assert "auc has no meaning in 2 of 3 groups, and is empty there: b, c" in caplog.messages
    assert any(
        line.startswith("the figures of group c are left out: 2 of 2 scores are NaN")
        for line in caplog.messages
    )
    columns = report.columns([{"groups": name, **figures} for name, figures in groups.items()])
    assert len(columns) == 4
    assert "auc" in columns[0]
    first_without = report.columns(
        [{"groups": "c", "count": 1}, {"groups": "a", "count": 2, "auc": 1.0}]
    )
    assert first_without[0].split() == ["groups", "count", "auc"]


CAT = "\u03b7 \u03b3\u03ac\u03c4\u03b1"
GREEK = f"{CAT} \u03b5\u03af\u03bd\u03b1\u03b9 \u03b5\u03b4\u03ce"
TEXTS = {
    "two words": (
        ["a cat"],
        ["the cat"],
        {"chrf", "rougeL"},
        {"bleu"},
        ["BLEU is left out: no reference has the four"],
    ),
    "Greek": ([GREEK], [GREEK], {"bleu", "chrf"}, {"rougeL"}, ["ROUGE is left out"]),
    "Greek with years": (
        [f"{GREEK} 2019 iOS"],
        [f"{GREEK} 2019 iOS"],
        {"bleu", "chrf"},
        {"rouge1"},
        ["ROUGE is left"],
    ),
    "Greek, two words": (
        [CAT],
        [CAT],
        {"chrf"},
        {"bleu", "rouge1"},
        ["BLEU is left", "ROUGE is left"],
    ),
    "empty references": (
        ["a", "b"],
        ["", " "],
        set(),
        {"bleu", "chrf", "rouge1"},
        ["BLEU, chrF and ROUGE are left out"],
    ),
    "empty answers": (
        ["", ""],
        ["one two three four", "a"],
        {"bleu", "chrf", "rouge1"},
        set(),
        ["the model wrote noth"],
    ),
    "odd": (
        ["\ud800 \x00", "\u2028"],
        ["a b c \ud800 d", ""],
        {"bleu", "chrf", "rouge1"},
        set(),
        [],
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_keep_the_figures_that_have_meaning(case, caplog):
    said, wanted, given, without, lines = TEXTS[case]
    result = of_texts(config_of("seq2seq"), said, wanted)
    assert given <= set(result)
    assert not without & set(result)
    assert [
        message[: len(line)] for message, line in zip(caplog.messages, lines, strict=True)
    ] == lines


@pytest.mark.parametrize(
    "error",
    [ValueError("odd\ntext"), KeyError("x"), ZeroDivisionError("zero"), RuntimeError("lost")],
)
def test_what_goes_wrong_with_a_library_leaves_out_its_figures_alone(error, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "translation", Mock(side_effect=error))
    result = of_texts(config_of("seq2seq"), ["a cat"], ["a cat"])
    assert set(result) == set(metrics.ROUGE)
    (line,) = caplog.messages
    assert line.startswith(f"BLEU and chrF are left out: {type(error).__name__}: ")
    assert "\n" not in line


def evaluator(task, run=None, **figures):
    made = object.__new__(Evaluator)  # without a model
    made.config = config_of(task)
    made.config.eval.generate = 0
    made.sources = [SimpleNamespace(pieces=pieces_of("classify", [1, 1]), examples=[{}, {}])]
    made.run = run or (
        lambda params, teacher: ({"loss": 1.0, "weight": 2.0}, {0: np.array(SURE[0])}, True)
    )
    made.num_bytes = None
    return made


@pytest.mark.parametrize(
    "error", [AttributeError("odd"), ConfigError("install it"), RecursionError("deep")]
)
def test_figures_that_fail_leave_the_loss(error, monkeypatch, caplog):
    monkeypatch.setattr("jaxlm.evaluate.evaluator.score", Mock(side_effect=error))
    assert evaluator("classify")(None) == {"loss": 0.5}
    assert caplog.messages[0].startswith("this evaluation gives only the loss: ")


def test_texts_that_fail_leave_the_loss(monkeypatch, caplog):
    monkeypatch.setattr(
        "jaxlm.evaluate.evaluator.score_texts", Mock(side_effect=ValueError("odd text"))
    )
    made = evaluator("seq2seq", lambda params, teacher: ({"loss": 1.0, "weight": 2.0}, None, True))
    made.config.eval.generate = 4
    assert made(None)["loss"] == 0.5
    assert caplog.messages == ["this evaluation gives no figures of texts: ValueError: odd text"]


FAULTS = [
    MemoryError(),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    NumericsError("20 steps in a row"),
    FloatingPointError("nan"),
    KeyboardInterrupt(),
    SystemExit(1),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_faults_of_the_machine_and_signals_pass_on(fault, monkeypatch):
    with pytest.raises(type(fault)):
        run_of(Mock(side_effect=fault)).evaluate_and_save(Mock(ema=None), 250, False, True)
    monkeypatch.setattr("jaxlm.evaluate.evaluator.score", Mock(side_effect=fault))
    with pytest.raises(type(fault)):
        evaluator("classify")(None)
    with pytest.raises(type(fault)):
        attempt("figures", Mock(side_effect=fault))


def run_of(evaluate):
    # without a model
    run = object.__new__(Run)
    config = base()
    config.eval.metric = "accuracy"
    config.eval.patience = 1
    config.checkpoint.every = 5
    run.config = config
    run.meta = {}
    run.best = Best("accuracy")
    run.hold = Mock()
    run.monitor = Mock()
    run.checkpoints = Mock()
    run.evaluate = evaluate
    return run


ERRORS = [
    DataError("nothing counts"),
    IndexError("odd\ntext"),
    OSError("gone"),
    ConfigError("scipy"),
    KeyError("x"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_run_saves_and_goes_on_where_an_evaluation_fails(error):
    run = run_of(Mock(side_effect=error))
    state = Mock(ema=None)
    assert [run.evaluate_and_save(state, step, False, True) for step in (250, 500)] == [
        False,
        False,
    ]
    assert [save.args for save in run.checkpoints.save.call_args_list] == [
        (state, {"best": [None, 0]}, None)
    ] * 2
    run.monitor.evaluation.assert_not_called()
    said = []
    for call in run.monitor.say.call_args_list:
        said.append(call.args[0])
    assert said[0].startswith("step    250  this evaluation gives no figures: ")
    assert "\n" not in said[0]
    assert said[1] == (
        "eval.metric=accuracy: this evaluation gave no figures, so the choice of the best and eval.patience wait"
    )


def test_one_of_several_processes_does_not_go_on_alone(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(OSError, match="gone"):
        run_of(Mock(side_effect=OSError("gone"))).evaluate_and_save(
            Mock(ema=None), 250, False, True
        )
    run = run_of(Mock(side_effect=DataError("nothing counts")))  # which all of them see
    assert not run.evaluate_and_save(Mock(ema=None), 250, False, True)


def examples_of(task, rows, names):
    config = config_of(task, names)
    return Examples(config, "val", Bytes(), rows, only_known_labels=True)


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("classify", [{"text": "a", "label": "no"}, {"text": "b", "label": "perhaps"}]),
        (
            "multilabel",
            [{"text": "a", "label": "no,yes"}, {"text": "b", "label": ["yes", "perhaps"]}],
        ),
        ("tag", [{"words": "a b", "tags": "no yes"}, {"words": "a b", "tags": ["perhaps", "no"]}]),
    ],
)
def test_examples_of_labels_that_training_had_not_are_left_out_and_counted(task, rows, caplog):
    assert examples_of(task, rows, ("no", "yes")).examples == rows[:1]
    (line,) = caplog.messages
    assert line.startswith("left out of all figures: 1 of 2 examples")
    assert "'perhaps' 1" in line
    with pytest.raises(DataError, match="not one of the labels"):
        examples_of(
            task, rows[1:], ("no", "yes")
        )  # none is known: the wrong column, or another task
    with pytest.raises(DataError, match="not one of the labels"):
        Examples(config_of(task, ("no", "yes")), "val", Bytes(), rows)  # of a run, before step 1


def test_a_label_that_float32_cannot_hold_is_told_as_that():
    with pytest.raises(DataError, match=r"'1e\+300' is too large: a float32 holds up to 3\.4e\+38"):
        Examples(config_of("regress"), "val", Bytes(), [{"text": "a", "label": 1e300}])


def test_numbers_that_json_has_not_are_texts():
    assert finite({"loss": NAN, "rows": [{"x": np.inf}, 1.5, "a", None]}) == {
        "loss": "nan",
        "rows": [{"x": "inf"}, 1.5, "a", None],
    }


def test_large_numbers_are_read_by_their_powers():
    assert [report.in_digits(x) for x in (0.12345, 1234567, 3e38, "x")] == [
        "0.1235",
        "1,234,567",
        "3e+38",
        "x",
    ]


# ---------------------------------------------------------------- whole runs

RUSSIAN = (
    "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u043e\u0442",
    "\u0441\u0442\u0430\u0440\u044b\u0439 \u0434\u043e\u043c",
)
LONG = f"{RUSSIAN[0]} \u0438 {RUSSIAN[1]}"
TRANSLATIONS = [("red cat", RUSSIAN[0]), ("old house", RUSSIAN[1])]
REVIEWS = [("good film", "pos"), ("bad film", "neg")]
STARS = [("good film", 3.5), ("bad film", 1)]
RUNS = {  # task, training, validation, model, eval.metric: what is left out, what is given, of the evaluation
    "bleu": (
        "seq2seq",
        TRANSLATIONS,
        TRANSLATIONS,
        "encoder_decoder",
        "bleu",
        {"rougeL", "bleu"},
        {"chrf"},
    ),
    "auc": ("classify", REVIEWS, REVIEWS[:1], "encoder", "auc", {"auc"}, {"accuracy", "f1"}),
    "pearson": (
        "regress",
        STARS,
        [("good film", 3), ("fine film", 3)],
        "encoder",
        "pearson",
        {"pearson"},
        {"mse"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_whose_figures_have_no_meaning_is_trained_saved_and_evaluated(tmp_path, name):
    task, train, val, model, metric, without, given = RUNS[name]
    for split, rows in (("train", train * 4), ("val", val * 4)):
        (tmp_path / f"{split}.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    settings = {
        "task.name": task,
        "data.path": "",
        "data.train": tmp_path / "train.tsv",
        "data.val": tmp_path / "val.tsv",
        "data.tokenizer": "words",
        "data.seq_len": 16,
        "model.name": model,
        "model.num_layers": 1,
        "train.steps": 4,
        "model.embed_dim": 16,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
        "train.batch_size": 4,
        "optim.warmup_steps": 1,
        "eval.every": 2,
        "eval.metric": metric,
        "eval.patience": 1,
        "log.tensorboard": False,
    }
    if task == "seq2seq":
        settings |= {"eval.generate": 4, "eval.max_tokens": 4}
    flags = []
    for key, value in settings.items():
        flags.append(f"--config.{key}={value}")
    run = program(
        "jaxlm.train", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", *flags
    )
    assert "done at step 4, saved in" in run.stdout
    assert "Traceback" not in run.stderr
    assert run.stdout.count(f"eval.metric={metric}: this evaluation has no such figure") == 2 * (
        metric in without
    )
    rows = []
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        rows.append(json.loads(line))
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [2, 4]
    for row in evaluations:
        assert {f"eval/{key}" for key in given} <= set(row)
        assert not {f"eval/{key}" for key in without} & set(row)
    flags = [f"--workdir={tmp_path / 'run'}", f"--json={tmp_path / 'out.json'}", "--bootstrap=9"]
    if name == "bleu":  # of longer texts the same model has it
        (tmp_path / "long.tsv").write_text(f"red cat\t{LONG}\n" * 2)
        flags.append(f"--data={tmp_path / 'long.tsv'}")
        without = {"rougeL"}
        given = {"bleu", "chrf"}
    out = program("jaxlm.evaluate", *flags)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert given | {"loss"} <= set(figures)
    assert not without & set(figures)
    assert "left out: " in run.stderr
    assert "left out: " in out.stderr
