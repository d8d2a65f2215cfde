"""Which of several runs underfits and which overfits, by what they have written; and the script that trains three."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import FLAGS, ROOT, small_config

from jaxlm.config.recipe import flatten
from jaxlm.errors import CheckpointError, ConfigError, DataError
from jaxlm.evaluate import pictures
from jaxlm.fitting.__main__ import OVER, UNDER, main, mean_since

UNDERFIT = ([3.0, 2.5, 2.4, 2.4], [3.1, 2.6, 2.5, 2.5])  # training, validation
FITTING = ([2.8, 2.0, 1.8, 1.7], [2.9, 2.2, 2.0, 2.1])
OVERFIT = ([2.5, 1.0, 0.4, 0.1], [2.6, 2.3, 2.9, 3.5])


def write_run(folder, losses, **settings):
    """A run with an evaluation every 10 steps, of which the training loss is a row at 5 and one at 10."""
    folder.mkdir()
    settings = {"train__steps": 10 * len(losses[1]), "data__path": "text", **settings}
    (folder / "config.json").write_text(json.dumps(flatten(small_config(**settings))))
    rows = []
    for i, (training, validation) in enumerate(zip(*losses)):
        rows += [
            {"step": 10 * i + 5, "loss": training + 0.1},
            {"step": 10 * i + 10, "loss": training - 0.1},
        ]
        rows.append({"step": 10 * i + 10, "eval/loss": validation})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--workdir={folder}"


def table_of(path, flags):
    main([*flags, f"--json={path / 'table.json'}"])
    return json.loads((path / "table.json").read_text())


def test_the_figures_say_what_fits_whatever_the_names(tmp_path, capsys):
    flags = [
        write_run(tmp_path / "large", UNDERFIT, model__num_layers=1),
        write_run(tmp_path / "small", OVERFIT, model__num_layers=3),
        write_run(tmp_path / "x", FITTING),
    ]
    rows = table_of(tmp_path, flags)
    assert [row["shows"] for row in rows] == [UNDER, OVER, "fits best"]
    assert [row["at step"] for row in rows] == [30, 20, 30]
    assert [row["best validation loss"] for row in rows] == [2.5, 2.3, 2.0]
    np.testing.assert_allclose([row["training loss"] for row in rows], [2.4, 0.1, 1.7])
    assert rows[0]["parameters"] < rows[2]["parameters"] < rows[1]["parameters"]
    said = capsys.readouterr().out
    assert "underfits" in said
    assert "nan" not in said


def test_what_both_know_by_heart_is_no_underfitting(tmp_path):
    """Training losses that differ by chance alone do not decide."""
    best = write_run(tmp_path / "a", ([0.0, 0.0], [4.3, 5.0]))
    worse = write_run(tmp_path / "b", ([0.0, 0.005], [9.0, 12.0]))
    assert [row["shows"] for row in table_of(tmp_path, [best, worse])] == ["fits best", "overfits"]


def test_a_run_that_is_not_done_is_not_judged(tmp_path):
    fits = write_run(tmp_path / "a", FITTING)
    early = write_run(tmp_path / "b", OVERFIT, train__steps=100, eval__patience=2)
    waits = write_run(tmp_path / "c", OVERFIT, train__steps=100, eval__patience=3)
    near = write_run(tmp_path / "d", ([1.0], [2.005]))
    rows = table_of(tmp_path, [fits, early, waits, near])
    assert [row["shows"] for row in rows] == ["fits best", "overfits", "not done", "fits as well"]
    assert [row["ended"] for row in rows[:3]] == [
        "at its last step, 40",
        "early, at step 40",
        "not yet: step 40 of 100",
    ]


def test_training_loss_is_the_mean_since_the_evaluation_before():
    means = mean_since([10, 20, 30], np.array([1, 10, 11, 40]), np.array([1.0, 3, 5, 7]))
    np.testing.assert_array_equal(means, [2, 5, np.nan])


def test_what_cannot_be_compared_is_refused(tmp_path):
    run = write_run(tmp_path / "a", FITTING)
    with pytest.raises(ConfigError, match="nothing to be compared with"):
        main([run, run])
    other = write_run(tmp_path / "b", FITTING, data__path="other")
    with pytest.raises(ConfigError, match=r"data\.path: 'text' in .*a, 'other' in .*b"):
        main([run, other])
    empty = write_run(tmp_path / "c", ([], []), train__steps=10)
    with pytest.raises(
        DataError, match=r"c/metrics.jsonl: no row has a finite eval/loss; set eval.every"
    ):
        main([run, empty])
    with pytest.raises(CheckpointError, match=r"give the --workdir of a jaxlm\.train run"):
        main([run, f"--workdir={tmp_path}/none"])
    with pytest.raises(ConfigError, match="is a directory; give a file in it"):
        main([run, write_run(tmp_path / "d", FITTING), f"--picture={tmp_path}"])


@pytest.mark.parametrize("runs", [2, 3, 9])
def test_the_picture_is_whole(tmp_path, runs):
    image = pytest.importorskip("matplotlib.image")
    curves = []
    for i in range(runs):
        steps = 10.0 * np.arange(1, 5 * i + 2)  # the first has one point
        training = np.where(steps == 30, np.nan, 4 / steps)
        label = f"{pictures.short('$a_run ' + 'x' * 9 * i)}: underfits\n{10**i:,} parameters"
        curves.append(pictures.Curves(label, steps, training, 3 + 1 / steps, i % 2 == 1))
    pictures.fitting(tmp_path / "fitting.png", curves, "x fits best\n" + "a overfits, " * runs)
    ink = image.imread(tmp_path / "fitting.png")[..., :3].mean(-1) < 0.5
    assert ink.shape == (750, 1350)
    assert ink.any()
    assert not ink[0].any()
    assert not ink[-1].any()
    assert not ink[:, 0].any()
    assert not ink[:, -1].any()


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (None, 3, "no such file"),
        (b"", 3, "0 characters"),
        (b"short\xe9", 3, "6 characters; give a text of 10,000 or more"),
    ],
)
def test_the_script_says_what_text_it_needs(tmp_path, content, code, said):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    command = ["bash", str(ROOT / "launch/fitting.sh"), str(text), str(tmp_path / "runs")]
    run = subprocess.run(
        command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert run.returncode == code and run.stderr.count("\n") == 1 and said in run.stderr, run.stderr


@pytest.mark.slow
def test_the_script_trains_three_sizes_and_compares_them(tmp_path):
    pytest.importorskip("matplotlib")
    words = "thou art a king of no small fame and I am but thy fool".split()
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text(
        " ".join(rng.choices(words, k=12_000))
    )  # more than the script takes
    command = [
        "bash",
        str(ROOT / "launch/fitting.sh"),
        str(tmp_path / "text.txt"),
        str(tmp_path / "runs"),
    ]
    command += ["--config.train.steps=20", "--config.eval.every=10", "--config.data.seq_len=16"]
    env = os.environ | {"PYTHON": sys.executable, "XLA_FLAGS": FLAGS}  # one device
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "runs/table.json").read_text())
    assert [row["run"] for row in rows] == ["small", "medium", "large"]
    assert rows[0]["parameters"] < rows[1]["parameters"] / 10 < rows[2]["parameters"] / 100
    assert [row["ended"] for row in rows] == ["at its last step, 20"] * 3
    assert (tmp_path / "runs/fitting.png").is_file()
    assert (tmp_path / "runs/part.txt").stat().st_size == 40_000
