"""Pictures are whole, whatever the names, the number of classes and the length of a run."""

import json

import numpy as np
import pytest

from jaxlm.errors import DataError
from jaxlm.evaluate import metrics, pictures

image = pytest.importorskip("matplotlib.image")
pytest.importorskip("sklearn")
NAMES = [
    "_under",
    "$a$ and $",
    "",
    "two\nlines",
    "x" * 300,
    *(f"class {i} of a hundred" for i in range(95)),
]


def size(path):
    """Of a PNG with ink, but none at its edges, where it would be cut off."""
    ink = image.imread(path)[..., :3].mean(-1) < 0.5
    assert ink.any()
    assert not ink[0].any()
    assert not ink[-1].any()
    assert not ink[:, 0].any()
    assert not ink[:, -1].any()
    return ink.shape


@pytest.mark.parametrize("classes", [1, 2, 5, 100])
def test_pictures_of_classes(tmp_path, classes):
    rng = np.random.default_rng(9)
    labels = rng.integers(0, classes, 500)
    scores = 0.7 * rng.dirichlet(np.ones(classes), 500) + 0.3 * np.eye(classes)[labels]
    labels[labels == 3] = 0  # does not occur
    pictures.roc(tmp_path / "a" / "roc.png", scores, labels, NAMES[:classes])
    pictures.confusion(
        tmp_path / "matrix.png",
        metrics.classification(scores, labels)["confusion"],
        NAMES[:classes],
    )
    pictures.calibration(
        tmp_path / "sure.png", metrics.calibration(scores, scores.argmax(1) == labels)
    )
    assert size(tmp_path / "a" / "roc.png") == (885, 840)
    assert size(tmp_path / "sure.png") == (
        990,
        840,
    )
    assert all(500 < side < 3000 for side in size(tmp_path / "matrix.png"))


@pytest.mark.parametrize(
    ("names", "degrees"), [("ab", 0), (["negative", "a rather positive film"], 45)]
)
def test_names_of_classes_can_be_read(tmp_path, monkeypatch, names, degrees):
    figures = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: figures.append(self))
    pictures.confusion(tmp_path / "matrix.png", [[3, 1], [0, 2]], names)
    labels = figures[0].axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == list(names)
    assert {label.get_rotation() for label in labels} == {degrees}


@pytest.mark.parametrize("rows", [1, 2000])
def test_pictures_of_runs(tmp_path, rows):
    log = tmp_path / "metrics.jsonl"
    out = tmp_path / "out.png"
    lines = []
    for i in range(rows):
        lines.append({"step": i + 1, "loss": 3 + 7 / (i + 1)})
    lines += [{"step": rows, "eval/loss": 3.5}, {"step": rows, "loss": "nan"}]
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 2001, "lo')
    for runs in (log, [(f"run {i}", str(log)) for i in range(9)]):
        pictures.losses(out, runs)
        assert size(out) == (750, 1200)
    pictures.bars(out, dict(zip(NAMES, range(-1, min(rows, 90)))), "accuracy ($)")
    assert 200 < size(out)[0] < 4000
    log.write_text('{"step": 1, "loss": "inf"}\n{"st')
    for missing, said in {
        log: "no row has a finite loss",
        tmp_path / "none": "No such file",
    }.items():
        with pytest.raises(DataError, match=said):
            pictures.losses(tmp_path / "never.png", missing)
    assert not (tmp_path / "never.png").exists()


def log_of(folder, metric, curves):
    """metrics.jsonl of a run that was led by this metric; curves: {key: {step: value}}."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for key, values in curves.items():
        for step, value in values.items():
            rows.append({"step": step, key: value})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"eval.metric": metric}))
    return folder / "metrics.jsonl"


LOSS = {100: 3.0, 200: 2.0, 300: 2.5, 400: 2.8}


@pytest.mark.parametrize(
    ("metric", "values", "step", "text"),
    [
        (
            "accuracy",
            {100: 0.5, 200: 0.7, 300: 0.7, 400: 0.81},
            400,
            "best accuracy 0.81 at step 400",
        ),
        ("bleu", {100: 9.0, 200: 12.345, 400: 12.3}, 200, "best bleu 12.35 at step 200"),
        ("mse", {100: 0.5, 300: 0.25, 400: "nan"}, 300, "best mse 0.25 at step 300"),
        ("loss", {}, 200, "lowest validation loss: 2.0000, at step 200"),
        (
            "auc",
            {},
            200,
            "lowest validation loss: 2.0000, at step 200\nno evaluation gave eval.metric=auc",
        ),
    ],
)
def test_the_step_that_led_the_run_is_circled(tmp_path, metric, values, step, text):
    log = log_of(tmp_path, metric, {f"eval/{metric}": values, "loss": LOSS, "eval/loss": LOSS})
    runs = [("", log)]
    mark, notes = pictures.mark_of(runs, pictures.curves_of(runs))
    assert (mark.step, mark.height) == (step, LOSS[step])
    assert "\n".join([mark.text, *notes]) == text
    pictures.losses(tmp_path / "out.png", log)
    assert size(tmp_path / "out.png") == (750, 1200)


def test_of_several_runs_the_best_by_their_metric_is_circled(tmp_path):
    accuracies = {"a": {100: 0.5, 200: 0.6}, "b": {100: 0.7, 200: 0.4}}
    runs = []
    for name, values in accuracies.items():
        runs.append(
            (
                name,
                log_of(tmp_path / name, "accuracy", {"eval/loss": LOSS, "eval/accuracy": values}),
            )
        )
    mark, _ = pictures.mark_of(runs, pictures.curves_of(runs))
    assert mark.text == "best accuracy 0.7 at step 100 of b"
    log_of(
        tmp_path / "b", "bleu", {"eval/loss": LOSS, "eval/bleu": {100: 5}}
    )  # nothing to compare them by
    assert pictures.mark_of(runs, pictures.curves_of(runs))[0].label == "lowest"


@pytest.mark.parametrize(
    ("spikes", "note"),
    [
        ({}, []),
        ({1: 9.0}, ["off the picture: 1 value above 2.1, up to 9 at step 1"]),
        (
            {1: 5.0, 2: 1e6, 700: 50.0},
            ["off the picture: 3 values above 2.1, up to 1e+06 at step 2"],
        ),
    ],
)
def test_values_that_are_off_the_picture_are_counted(tmp_path, spikes, note):
    log = log_of(tmp_path, "loss", {"loss": dict.fromkeys(range(1, 1001), 2.0) | spikes})
    runs = [("", log)]
    curves = pictures.curves_of(runs)
    curves = [
        curve._replace(values=np.full(1000, 2.0)) for curve in curves
    ]  # without what the mean spreads
    mark, _ = pictures.mark_of(runs, curves)
    low, high = pictures.limits(curves, mark)
    assert pictures.beyond(curves, high) == [line.replace("2.1", f"{high:.4g}") for line in note]
    assert 1.9 < low < 2 < high < 2.2
    pictures.losses(tmp_path / "out.png", log)
    assert size(tmp_path / "out.png") == (750, 1200)
