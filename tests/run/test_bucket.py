"""A run directory in a bucket is as one on a disk: the same losses, resumed there and read from there; its errors."""

import sys
from threading import Thread

import jax
import numpy as np
import pytest
from conftest import program
from fake_gcs import FakeGCS, Server
from test_hosts import MESH, close, finish, started, words_of
from test_hosts import train as train_on_hosts
from test_train import refuse, rows, train

import jaxlm
from jaxlm.errors import CheckpointError, ConfigError
from jaxlm.run.workdir import Hold, run_directory

pytest.importorskip("gcsfs")
EIGHT_STEPS = {
    "train__steps": 8,
    "eval__every": 4,
    "checkpoint__every": 4,
    "optim__warmup_steps": 0,
    "model__num_layers": 1,
    "checkpoint__keep": 1,
    "checkpoint__keep_best": False,
}


@pytest.fixture(scope="module", autouse=True)
def bucket():
    """gs://mine of a server in this process, for the programs that are started, too."""
    server = Server(("127.0.0.1", 0), FakeGCS)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)  # gcsfs and google-cloud-storage
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv(
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
        )  # would ask Google of what kind the bucket is
        yield
    server.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory, text_dir):
    """A run of 8 steps on the disk."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    train(workdir, text_dir, **EIGHT_STEPS)
    return workdir


def test_a_run_in_a_bucket_is_the_one_on_the_disk(text_dir, local):
    """Stopped after 4 steps and resumed, then evaluated, loaded and generated from."""
    run = train(
        "gs://mine/runs/a", text_dir, **EIGHT_STEPS, train__stop_at=4, log__tensorboard=True
    )
    assert "no TensorBoard files in a bucket" in run.stdout
    remote = run_directory("gs://mine/runs/a")
    assert list(rows(remote)) == [1, 2, 3, 4]
    train("gs://mine/runs/a", text_dir, **EIGHT_STEPS)
    for key in ("loss", "grad_norm", "eval/loss"):
        assert rows(remote, key) == rows(local, key)
        assert max(rows(remote, key)) == 8
    assert (remote / "config.json").read_text() == (local / "config.json").read_text()

    assert [path.name for path in (remote / "checkpoints").iterdir()] == [
        "8"
    ]  # the one before is deleted
    out = program("jaxlm.evaluate", "--workdir=gs://mine/runs/a").stdout
    assert f"{rows(local, 'eval/loss')[8]:.4f}" in out
    here = jaxlm.load(local)
    there = jaxlm.load("gs://mine/runs/a", mesh={"fsdp": 4, "tensor": 2})
    jax.tree.map(np.testing.assert_array_equal, here.params, there.params)
    assert there.generate("the cat", max_tokens=5)[0]


def test_a_later_run_takes_the_directory_from_an_earlier_one():
    earlier = Hold(run_directory("gs://mine/runs/b"))
    earlier.check()
    later = Hold(run_directory("gs://mine/runs/b"))
    with pytest.raises(
        ConfigError, match=r"another run, started later on .*; this one ends without saving"
    ):
        earlier.check()
    later.check()


def test_what_others_write_is_seen_at_once():
    """gcsfs keeps what it has listed, for ever, where it is not told otherwise."""
    folder = run_directory("gs://mine/runs/c")
    (folder / "1").write_text("")
    assert [path.name for path in folder.iterdir()] == ["1"]
    FakeGCS.objects["runs/c/2"] = (next(FakeGCS.generations), b"")
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_errors_name_what_is_missing(monkeypatch, text_dir):
    with pytest.raises(CheckpointError, match="gs://mine/none is not a directory"):
        jaxlm.load("gs://mine/none")
    with pytest.raises(ConfigError, match="the bucket 'other' cannot be used"):
        run_directory("gs://other/run")
    run = refuse("hdfs://mine/run", text_dir, **EIGHT_STEPS)
    assert run.returncode == 2
    assert "hdfs://mine/run: of all stores" in run.stderr
    assert "Traceback" not in run.stderr
    for path in ("s3://mine/run", "gs://", "gs:///run"):
        with pytest.raises(
            ConfigError, match="can only be in gs://BUCKET/PATH; give that or a directory"
        ):
            run_directory(path)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/none.json")
    with pytest.raises(ConfigError, match=r"none.json was not found.*gcloud auth"):
        run_directory("gs://mine/run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        ConfigError, match=r"gcsfs is not installed; type: pip install -e \"\.\[gcs\]\""
    ):
        run_directory("gs://mine/run")


@pytest.mark.slow
def test_two_hosts_write_one_checkpoint_and_one_goes_on_from_it(tmp_path, text_dir):
    train_on_hosts(tmp_path / "disk", text_dir, 1, **MESH)
    for count, stop in ((2, 10), (1, 20)):
        words = words_of("gs://mine/runs/hosts", text_dir, **MESH, train__stop_at=stop)
        with started(tmp_path / str(count), *words, count=count, devices=8 // count) as runs:
            codes, outputs = finish(runs, tmp_path / str(count))
        assert codes == [0] * count, "\n".join(outputs)
    assert close(rows(run_directory("gs://mine/runs/hosts")), rows(tmp_path / "disk"))


TAKEN = """
import sys
from jaxlm import cli
from jaxlm.run import monitor, workdir
from jaxlm.train import __main__ as train
step = monitor.Monitor.step
def taken_at_3(self, number, metrics, finished):
    step(self, number, metrics, finished)
    if number == 3:
        workdir.Hold(workdir.run_directory("gs://mine/runs/taken"))
monitor.Monitor.step = taken_at_3
cli.run(train.main)
"""


@pytest.mark.slow
def test_a_run_whose_directory_was_taken_writes_nothing_more(tmp_path, text_dir):
    words = words_of("gs://mine/runs/taken", text_dir, checkpoint__every=2)
    with started(tmp_path, "-c", TAKEN, *words[2:], count=1) as runs:
        codes, outputs = finish(runs, tmp_path)
    assert codes == [2]
    assert "has taken it" in outputs[0]
    assert "Traceback" not in outputs[0]
    folder = run_directory("gs://mine/runs/taken")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
    assert list(rows(folder)) == [1, 2]
