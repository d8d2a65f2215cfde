"""Trackers: after a kill and a resume each row of metrics.jsonl is there once; one that fails stops no training."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
from conftest import FLAGS, ROOT, small_config

from jaxlm.config.recipe import flatten
from jaxlm.run import trackers
from jaxlm.run.monitor import Monitor
from jaxlm.run.trackers import Tracker, read_memory, tracker_problems
from jaxlm.run.writers import read_rows

METRICS = {"loss": 1.5, "grad_norm": 1.0, "learning_rate": 0.1, "skipped": 0}


class Fake(Tracker):
    """Keeps its runs in a class attribute, as a server would."""

    name = "json"  # a library that is always there
    server: ClassVar = {}
    fails_at = None

    def connect(self, config, workdir):
        run_id = self.recall().get("id") or f"run-{len(self.server)}"
        self.remember(id=run_id)
        self.run = self.server.setdefault(run_id, SimpleNamespace(rows=[], samples=[], open=False))
        self.run.config = flatten(config)
        self.run.open = True
        for step, numbers in self.run.rows:
            self.sent["eval/loss" if "eval/loss" in numbers else "loss"] = step
        return f"fake: {run_id}"

    def log(self, step, numbers):
        if step == self.fails_at:
            raise ConnectionError("no\nserver")
        self.run.rows.append((step, numbers))

    def log_samples(self, step, samples):
        self.run.samples.append((step, samples))

    def close(self):
        self.run.open = False


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Fake, "server", {})
    for table in (trackers.WRITERS, trackers.TRACKERS):
        monkeypatch.setitem(table, "fake", Fake)
    return Fake.server


def config_of(every=5):
    return small_config(log__trackers="fake", log__every=every, log__tensorboard=False)


def train(workdir, config, start, stop):
    """The rows of a run without a model, evaluated every 10 steps; it is not closed, as after a kill."""
    monitor = Monitor(workdir, config, start, 1, None)
    for step in range(start + 1, stop + 1):
        monitor.step(step, METRICS | {"loss": float(step)}, step + 1e9)
        if step % 10 == 0:
            samples = [{"source": "a", "target": "b", "answer": f"c{step}"}]
            monitor.evaluation(step, {"loss": float(step), "bleu": 2.0}, samples)
    return monitor


def sent(run):
    return [{"step": step, **numbers} for step, numbers in run.rows]


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_rows_are_there_once_after_a_kill_and_a_resume(tmp_path, server, lost):
    """Killed at step 28 with a checkpoint of step 20; `lost`: rows that had not reached the server."""
    train(tmp_path, config_of(), 0, 28)
    run = server["run-0"]
    del run.rows[len(run.rows) - lost :]
    monitor = train(tmp_path, config_of(), 20, 60)
    monitor.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert list(server) == ["run-0"]
    keys = []
    for row in rows:
        keys.append((row["step"], "eval/loss" in row))
    assert len(set(keys)) == len(keys)
    assert [(row["step"], "eval/loss" in row) for row in sent(run)] == keys
    assert [row.get("loss") for row in sent(run)] == [row.get("loss") for row in rows]
    assert [row.get("eval/bleu") for row in sent(run)] == [row.get("eval/bleu") for row in rows]
    assert [samples[0]["answer"] for _, samples in run.samples] == [
        f"c{step}" for step in (10, 20, 30, 40, 50, 60)
    ]
    assert run.config["train.batch_size"] == 16
    assert not run.open


def test_an_evaluation_that_was_cut_off_is_sent_when_it_is_done_again(tmp_path, server):
    """Killed between the row of step 20 and its evaluation."""
    config = config_of()
    monitor = train(tmp_path, config, 0, 19)
    monitor.step(20, METRICS, 1e9 + 20)
    train(tmp_path, config, 10, 20)
    kinds = []
    for step, numbers in server["run-0"].rows:
        kinds.append((step, "eval/loss" in numbers))
    assert kinds.count((20, False)) == 1
    assert kinds.count((20, True)) == 1


def test_a_tracker_that_is_new_to_a_run_gets_all_of_its_rows(tmp_path, server):
    train(tmp_path, small_config(log__every=5, log__tensorboard=False), 0, 20)
    assert not server
    train(tmp_path, config_of(), 20, 30)
    assert sorted({step for step, _ in server["run-0"].rows}) == [1, 5, 10, 15, 20, 25, 30]


def test_what_is_not_finite_is_sent_as_a_number(tmp_path, server):
    config = config_of(every=1)
    monitor = Monitor(tmp_path, config, 0, 1, None)
    monitor.step(1, METRICS | {"loss": float("inf")}, 1e9)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == "inf"
    server.clear()
    Monitor(tmp_path, config, 1, 1, None)
    assert sent(server["run-0"])[0]["loss"] == float("inf")


def test_a_tracker_that_raises_is_reported_once_and_training_goes_on(
    tmp_path, server, capsys, monkeypatch
):
    monkeypatch.setattr(Fake, "fails_at", 15)
    train(tmp_path, config_of(), 0, 40).close()
    printed = capsys.readouterr().out
    assert printed.count("failed and gets no more rows") == 1
    assert "ConnectionError: no server" in printed
    assert max(row["step"] for row in read_rows(tmp_path / "metrics.jsonl")) == 40
    assert max(step for step, _ in server["run-0"].rows) == 10
    monkeypatch.setattr(Fake, "fails_at", None)
    train(tmp_path, config_of(), 40, 40)
    assert max(step for step, _ in server["run-0"].rows) == 40


def test_only_the_first_process_writes(tmp_path, server, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    train(tmp_path, config_of(), 0, 20).close()
    assert not server
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_that_starts_over_gets_a_new_run_in_its_tracker(tmp_path, server):
    train(tmp_path, config_of(), 0, 20)
    trackers.forget(tmp_path)
    train(tmp_path, config_of(), 0, 10)
    assert list(server) == ["run-0", "run-1"]
    assert max(step for step, _ in server["run-1"].rows) == 10


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    config = small_config(log__trackers="wandv, mlflow")
    monkeypatch.setattr(trackers, "installed", lambda package: False)
    unknown, missing = tracker_problems(config)
    assert "no tracker wandv" in unknown
    assert "did you mean wandb?" in unknown
    assert 'pip install -e ".[mlflow]"' in missing
    assert tracker_problems(small_config()) == []


# ---------------------------------------------------------------- the libraries themselves, offline

REAL = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests/run")
sys.path.insert(0, "tests")
from conftest import small_config
from test_trackers import train
name, folder, start, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
config = small_config(log__trackers=name, log__every=5, log__tensorboard=False)
monitor = train(folder, config, start, stop)
if start == 0:
    os.kill(os.getpid(), signal.SIGKILL)
monitor.close()
"""


def read_wandb(folder):
    run_id = read_memory(folder / "trackers.json")["wandb"]["id"]
    rows = trackers.read_wandb(str(folder), run_id)
    assert [row["_step"] for row in rows] == list(range(len(rows))), (
        "the order of a run that goes on"
    )
    assert sum("samples" in row for row in rows) >= 4, "those before the kill may be lost"
    return [row for row in rows if "loss" in row or "eval/loss" in row]


def read_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run_id = read_memory(folder / "trackers.json")["mlflow"]["id"]
    rows = []
    for key in ("loss", "eval/loss"):
        for metric in client.get_metric_history(run_id, key):
            rows.append({"step": metric.step, key: metric.value})
    return rows


def read_trackio(folder):
    script = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage\n"
        "print(json.dumps(SQLiteStorage.get_logs('jaxlm', sys.argv[1]), default=str))"
    )
    run = read_memory(folder / "trackers.json")["trackio"]["id"]
    env = {"TRACKIO_DIR": str(folder / "trackio")}
    out = start([sys.executable, "-c", script, run], env).stdout
    rows = json.loads(out.splitlines()[-1])
    return [row for row in rows if "loss" in row or "eval/loss" in row]


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


def start(command, more=()):
    env = os.environ | {"XLA_FLAGS": FLAGS, "WANDB_MODE": "offline"} | dict(more)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_its_own_library_reads_every_row_once_after_a_kill(tmp_path, name):
    pytest.importorskip(name)
    for first, last in ((0, 28), (20, 60)):
        command = [sys.executable, "-c", REAL, name, str(tmp_path), str(first), str(last)]
        run = start(command)
        assert "failed" not in run.stdout, run.stdout
    assert run.returncode == 0, run.stderr
    assert shown(READERS[name](tmp_path)) == shown(read_rows(tmp_path / "metrics.jsonl"))


def shown(rows):
    return sorted(f"{row['step']} {row.get('loss')} {row.get('eval/loss')}" for row in rows)
