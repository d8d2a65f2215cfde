"""Pictures are whole, whatever the names, the number of classes and the length of a run."""

import json

import numpy as np
import pytest

from jaxlm import metrics, pictures
from jaxlm.errors import DataError

image = pytest.importorskip("matplotlib.image")
pytest.importorskip("sklearn")
NAMES = ["_under", "$a$ and $", "", "two\nlines", "x" * 300, *(f"class {i} of a hundred" for i in range(95))]


def size(path):
    """Of a PNG with ink, but none at its edges, where it would be cut off."""
    ink = image.imread(path)[..., :3].mean(-1) < 0.5
    assert ink.any() and not ink[0].any() and not ink[-1].any() and not ink[:, 0].any() and not ink[:, -1].any()
    return ink.shape


@pytest.mark.parametrize("classes", [1, 2, 5, 100])
def test_pictures_of_classes(tmp_path, classes):
    rng = np.random.default_rng(9)
    labels = rng.integers(0, classes, 500)
    scores = 0.7 * rng.dirichlet(np.ones(classes), 500) + 0.3 * np.eye(classes)[labels]
    labels[labels == 3] = 0  # does not occur
    pictures.roc(tmp_path / "a" / "roc.png", scores, labels, NAMES[:classes])
    pictures.confusion(tmp_path / "matrix.png", metrics.classification(scores, labels)["confusion"], NAMES[:classes])
    pictures.calibration(tmp_path / "sure.png", metrics.calibration(scores, scores.argmax(1) == labels))
    assert size(tmp_path / "a" / "roc.png") == (885, 840) and size(tmp_path / "sure.png") == (990, 840)
    assert all(500 < side < 3000 for side in size(tmp_path / "matrix.png"))


@pytest.mark.parametrize("rows", [1, 2000])
def test_pictures_of_runs(tmp_path, rows):
    log, out = tmp_path / "metrics.jsonl", tmp_path / "out.png"
    lines = [{"step": i + 1, "loss": 3 + 7 / (i + 1)} for i in range(rows)]
    lines += [{"step": rows, "eval/loss": 3.5}, {"step": rows, "loss": "nan"}]
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 2001, "lo')
    for runs in (log, [(f"run {i}", str(log)) for i in range(9)]):
        pictures.losses(out, runs)
        assert size(out) == (750, 1200)
    pictures.bars(out, dict(zip(NAMES, range(-1, min(rows, 90)))), "accuracy ($)")
    assert 200 < size(out)[0] < 4000
    log.write_text('{"step": 1, "loss": "inf"}\n{"st')
    for missing, said in {log: "no row has a finite loss", tmp_path / "none": "No such file"}.items():
        with pytest.raises(DataError, match=said):
            pictures.losses(tmp_path / "never.png", missing)
    assert not (tmp_path / "never.png").exists()
