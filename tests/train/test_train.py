"""Runs of the real program: resumed = uninterrupted, one row a step, clean stops, clear errors and exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from unittest.mock import Mock

import pytest
from conftest import FLAGS, ROOT, program, refused

from jaxlm.config.keys import base
from jaxlm.data.prepare import prepare
from jaxlm.run.workdir import Hold
from jaxlm.train.best import Best
from jaxlm.train.loop import Run

SETTINGS = {
    "model.num_layers": 2,
    "model.embed_dim": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.scan": False,
    "model.mlp": "relu2",
    "model.dropout": 0.1,
    "data.seq_len": 32,
    "train.batch_size": 8,
    "optim.name": "adamw",
    "optim.learning_rate": 3e-3,
    "optim.warmup_steps": 10,
    "log.every": 1,
    "eval.every": 0,
    "checkpoint.every": 1000,
    "data.isolate": True,
    "log.tensorboard": False,
}


def command(workdir, data, **overrides):
    """The words of jaxlm.train for a tiny run; keys with __ for the dot."""
    settings = SETTINGS | {"data.path": data}
    for key, value in overrides.items():
        settings[key.replace("__", ".")] = value
    words = ["jaxlm.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    return words + [f"--config.{key}={value}" for key, value in settings.items()]


def train(workdir, data, devices=1, check=True, flags=(), env=None, **overrides):
    words = command(workdir, data, **overrides)
    return program(*words, *flags, devices=devices, check=check, env=env)


def refuse(workdir, data, **overrides):
    """What comes of a run that is to end before its first step."""
    return refused(*command(workdir, data, **overrides))


def rows(workdir, key="loss"):
    lines = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        lines.append(json.loads(line))
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        pytest.param(1, {}, id="1", marks=pytest.mark.slow),
        pytest.param(8, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, id="8"),
    ],
)
def test_resumed_is_uninterrupted_to_the_last_digit(tmp_path, text_dir, devices, mesh):
    """Dropout and shuffling on; the losses in metrics.jsonl are the same text; each step appears once."""
    own = partial(
        train,
        data=text_dir,
        devices=devices,
        env={"JAX_COMPILATION_CACHE_DIR": ""},
        train__steps=40,
        **mesh,
    )
    own(tmp_path / "whole")
    own(tmp_path / "parts", train__stop_at=20)
    assert list(rows(tmp_path / "parts")) == list(range(1, 21))
    own(tmp_path / "parts")
    whole = rows(tmp_path / "whole")
    parts = rows(tmp_path / "parts")
    assert list(whole) == list(range(1, 41))
    assert whole == parts
    assert whole[40] < whole[1] - 0.5
    assert (tmp_path / "parts/compiled").exists() == (
        devices == 1
    )  # the second half came from there


def test_a_run_that_dies_goes_on_from_its_last_checkpoint_and_repeats_no_row(tmp_path, text_dir):
    settings = {"train__steps": 30, "checkpoint__every": 10, "log__every": 1}
    train(tmp_path / "whole", text_dir, **settings)
    assert list(rows(tmp_path / "whole", "save_seconds")) == [11, 21]
    _, *flags = command(tmp_path / "killed", text_dir, **settings)
    env = os.environ | {"XLA_FLAGS": FLAGS}
    words = [sys.executable, "-c", KILLED, *flags]
    run = subprocess.run(words, cwd=ROOT, env=env, capture_output=True)
    assert run.returncode == -signal.SIGKILL
    assert max(rows(tmp_path / "killed")) > 20
    train(tmp_path / "killed", text_dir, **settings)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


KILLED = """
import os, signal, sys
from jaxlm.run import monitor
from jaxlm.train import __main__ as train
step = monitor.Monitor.step
def die_at_25(self, number, metrics, finished):
    step(self, number, metrics, finished)
    if number == 25:
        os.kill(os.getpid(), signal.SIGKILL)
monitor.Monitor.step = die_at_25
train.main(sys.argv[1:])
"""


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, text_dir):
    words = [sys.executable, "-m", *command(tmp_path, text_dir, train__steps=100_000)]
    env = os.environ | {"XLA_FLAGS": FLAGS}
    run = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "metrics.jsonl").exists() or len(rows(tmp_path)) < 5:
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    last = max(rows(tmp_path))
    assert run.returncode == 75
    assert f"SIGTERM at step {last}, saved" in out
    assert (tmp_path / "checkpoints" / str(last)).is_dir()


def test_evaluation_keeps_the_best_and_the_newest_and_stops_early(tmp_path, text_dir):
    """A learning rate far too high makes the validation loss rise after a while."""
    run = train(
        tmp_path,
        text_dir,
        train__steps=400,
        eval__every=5,
        eval__patience=3,
        checkpoint__keep=1,
        optim__learning_rate=0.3,
        optim__schedule="linear",
        optim__warmup_steps=100,
        optim__clip=0,
        model__dropout=0,
    )
    losses = rows(tmp_path, "eval/loss")
    assert "in 3 evaluations: stopping" in run.stdout
    assert max(losses) < 400
    best = min(losses, key=losses.get)
    assert list(losses)[-4] == best
    assert {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()} == {
        str(best),
        str(max(losses)),
    }
    assert set(rows(tmp_path, "eval/bits_per_byte")) == set(losses)


@pytest.fixture(scope="module")
def begun(tmp_path_factory, text_dir):
    """A run that was stopped at step 3 of 20."""
    workdir = tmp_path_factory.mktemp("begun") / "run"
    train(workdir, text_dir, train__steps=20, train__stop_at=3)
    return workdir


def test_changed_data_or_model_is_refused_with_the_difference(tmp_path, text_dir, begun):
    workdir = shutil.copytree(begun, tmp_path / "run")
    run = refuse(workdir, text_dir, train__steps=20, seed=1, data__shuffle=False)
    assert run.returncode == 4
    assert "seed: 0 -> 1" in run.stderr
    assert "shuffle: True -> False" in run.stderr
    changed = {"train__steps": 20, "train__stop_at": 4, "seed": 1}
    train(workdir, text_dir, flags=["--allow_data_change"], **changed)
    run = refuse(workdir, text_dir, train__steps=20, seed=1, model__embed_dim=64)
    assert run.returncode == 4
    assert "embed/tokens: saved" in run.stderr
    assert "Traceback" not in run.stderr


def test_missing_data_is_exit_3_before_anything_is_made(tmp_path):
    run = refuse(tmp_path / "run", tmp_path / "nothing")
    assert run.returncode == 3
    assert "jaxlm.data.prepare" in run.stderr
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_made_is_exit_2(tmp_path, text_dir):
    (tmp_path / "file").write_text("")
    run = refuse(tmp_path / "file" / "run", text_dir)
    assert run.returncode == 2
    assert "--workdir=" in run.stderr
    assert "Traceback" not in run.stderr


def test_losses_that_stay_nan_end_the_run_with_exit_5(tmp_path, text_dir):
    overrides = {
        "optim__learning_rate": 1e30,
        "optim__warmup_steps": 0,
        "optim__clip": 0,
        "train__max_skipped": 3,
    }
    run = train(tmp_path, text_dir, check=False, train__steps=50, **overrides)
    assert run.returncode == 5
    assert "3 steps in a row" in run.stderr


def test_data_can_be_a_mixture(tmp_path, text_dir):
    train(
        tmp_path,
        "",
        train__steps=20,
        train__stop_at=2,
        data__mixture=f"{text_dir}=0.5,{text_dir}=0.5",
    )
    assert list(rows(tmp_path)) == [1, 2]


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path, text_dir):
    hold = Hold(tmp_path)
    run = refuse(tmp_path, text_dir, train__steps=20)
    assert run.returncode == 2
    assert "another run is using it" in run.stderr
    hold.close()
    Hold(tmp_path).close()


def test_a_refused_resume_leaves_config_json_as_it_was(text_dir, begun):
    before = (begun / "config.json").read_text()
    run = refuse(begun, text_dir, train__steps=20, model__embed_dim=64)
    assert run.returncode == 4
    assert (begun / "config.json").read_text() == before


def test_an_empty_validation_split_is_told_before_the_run(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 100)
    prepare(
        [str(tmp_path / "a.txt")], tmp_path / "data", tokenizer="bytes", val_fraction=0.0, workers=1
    )
    run = refuse(tmp_path / "run", tmp_path / "data", train__steps=20, eval__every=5)
    assert run.returncode == 3
    assert "--val_fraction" in run.stderr
    assert not (tmp_path / "run").exists()


def test_the_best_is_not_spoiled_by_nan_and_knows_which_way_is_better():
    best = Best("loss")
    nan = float("nan")
    assert [best.update({"loss": loss}) for loss in (nan, 2.0, nan, 1.0)] == [
        False,
        True,
        False,
        True,
    ]
    high = Best("accuracy")
    assert [high.update({"accuracy": x}) for x in (0.5, nan, 0.4, 0.6)] == [
        True,
        False,
        False,
        True,
    ]
    assert best.since == 0
    assert Best("bleu").badness({"bleu": 2.0}) == -2.0


@pytest.mark.parametrize(
    ("metric", "result", "why"),
    [
        ("auc", {"loss": 0.7, "accuracy": 1.0}, "has no such figure"),  # one class alone
        ("pearson", {"loss": 0.0, "mse": 0.0}, "has no such figure"),  # constants
        ("bleu", {"loss": 1.0, "chrf": 3.0}, "has no such figure"),  # targets of one word
        ("loss", {"loss": float("nan"), "tokens": 3}, "gave nan"),
        ("mse", {"loss": 1.0, "mse": float("inf")}, "gave inf"),
    ],
)
def test_a_metric_that_an_evaluation_does_not_give_saves_and_waits(metric, result, why):
    config = base()
    config.eval.metric = metric
    config.eval.patience = 1
    config.checkpoint.every = 5
    run = object.__new__(Run)  # without a model
    run.config = config
    run.meta = {}
    run.best = Best(metric)
    run.hold = Mock()
    run.monitor = Mock()
    run.checkpoints = Mock()
    run.evaluate = Mock(return_value=result)
    state = Mock(ema=None)
    assert [run.evaluate_and_save(state, step, False, True) for step in (250, 500, 750)] == [
        False
    ] * 3
    saves = run.checkpoints.save.call_args_list
    assert [save.args for save in saves] == [(state, {"best": [None, 0]}, None)] * 3
    said = []
    for call in run.monitor.say.call_args_list:
        said.append(call.args[0])
    assert len(said) == 3
    assert "\n" not in said[0]
    assert f"eval.metric={metric}: this evaluation {why}" in said[0]
    assert "wait" in said[0]


def test_patience_that_was_spent_without_a_value_is_told():
    """As checkpoints of older versions may have it."""
    run = object.__new__(Run)
    config = base()
    config.eval.patience = 2
    run.config = config
    run.monitor = Mock()
    run.best = Best("auc", None, 2)
    assert run.exhausted()
    run.monitor.say.assert_called_once_with("no better auc in 2 evaluations: stopping")
