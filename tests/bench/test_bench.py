"""What bench tells adds up, with a run's own data and with random tokens; the loop waits for nothing that is there."""

import json
import time
from itertools import pairwise

import jax
import numpy as np
import pytest
from conftest import small_config

from jaxlm.bench import __main__ as bench
from jaxlm.bench import parts, sweep
from jaxlm.config.recipe import flatten
from jaxlm.config.tasks import TASKS
from jaxlm.data.batches import Prefetch, batch_shapes, train_batches
from jaxlm.data.store import Store
from jaxlm.data.synthetic import random_tokens
from jaxlm.errors import ConfigError, DataError
from jaxlm.parallel.mesh import make_mesh
from jaxlm.plan.measure import random_batch, time_steps

KEYS = "step_ms tokens_per_second mfu data_wait_ms host_ms compile_s peak_bytes".split()


@pytest.fixture(autouse=True)
def _memory_as_it_was(monkeypatch):
    """The other tests of this process give freed memory back."""
    monkeypatch.setattr(bench, "manage_memory", lambda: None)


@pytest.fixture
def recipe(tmp_path):
    """A file that gives the small config, and its flag."""
    flat = {}
    for key, value in flatten(small_config()).items():
        if value not in ((), ""):
            flat[key] = value
    path = tmp_path / "recipe.py"
    path.write_text(
        "from jaxlm.config import base\nfrom jaxlm.config.recipe import set_key\n\n\n"
        "def get_config():\n    c = base()\n"
        f"    for key, value in {flat!r}.items():\n        set_key(c, key, value)\n    return c\n"
    )
    return f"--config={path}"


def run(recipe, tmp_path, *words):
    file = tmp_path / "figures.json"
    assert bench.main([recipe, "--steps=3", f"--json={file}", "--config.mesh.data=8", *words]) == 0
    return json.loads(file.read_text())


def test_random_tokens_where_there_is_no_data(recipe, tmp_path, capsys):
    told = run(recipe, tmp_path)
    assert told.keys() >= set(KEYS)
    assert "random tokens of 64 kinds" in told["data"]
    assert told["tokens_per_second"] == pytest.approx(16 * 32 / (told["step_ms"] / 1000))
    assert told["step_ms_spread"]["min"] <= told["step_ms"] <= told["step_ms_spread"]["max"]
    assert told["data_wait_ms"] + told["host_ms"] <= told["step_ms_spread"]["max"]
    assert np.isfinite(told["loss"])
    assert told["mfu"] is None
    assert told["peak_bytes"] > 0
    assert "random tokens" in capsys.readouterr().out


@pytest.mark.parametrize("task", TASKS)
def test_a_random_batch_is_one_of_its_task(task):
    if TASKS[task].has_label_names:
        labels = {"data__labels": ("a", "b", "c")}
    else:
        labels = {}
    c = small_config(task__name=task, **labels)
    batch = random_batch(c, make_mesh(c, jax.devices()[:1]))
    shapes = batch_shapes(c)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == shapes
    assert np.all(batch["segments"] == 1)
    assert np.all(np.diff(batch["positions"]) == 1)
    assert np.max(batch["tokens"]) < 64
    assert np.max(batch.get("labels", 0)) < 3


def test_a_run_of_its_own_data(recipe, tmp_path, text_dir):
    told = run(recipe, tmp_path, f"--config.data.path={text_dir}", "--config.model.vocab_size=264")
    assert told["data"] == str(text_dir)


@pytest.mark.slow
def test_a_sweep_has_a_picture_for_each_size_that_varies(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "FACTORS", (1, 2))
    told = run(recipe, tmp_path, f"--sweep={tmp_path / 'pictures'}")
    assert sorted(file.stem for file in (tmp_path / "pictures").iterdir()) == sorted(sweep.SIZES)
    assert [row["size"] for row in told["sweep"]["depth"]] == [2, 4]
    for rows in told["sweep"].values():
        assert all(later["flops"] > row["flops"] for row, later in pairwise(rows))


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["--steps=0"], ConfigError, "at least 1"),
        (["--json=nowhere/x.json"], ConfigError, "no directory nowhere"),
        (["--config.data.mixture=a=1,b=1"], DataError, "not prepared data"),
        (
            ["--config.task.name=classify", "--config.model.name=encoder"],
            DataError,
            "data.train is empty",
        ),
        (["--config.optim.nmae=adam"], ConfigError, "optim.name"),
    ],
)
def test_what_cannot_be_measured_is_said(recipe, words, error, text):
    with pytest.raises(error, match=text):
        bench.main([recipe, *words])


def test_parts_of_a_step_and_of_a_run(tmp_path):
    config = small_config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    random_tokens(tmp_path / "tokens", 64, 10_000, 0)
    with config.unlocked():
        config.data.path = str(tmp_path / "tokens")
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        step = parts.step_parts(config, mesh)
        loader = parts.loader(config, mesh)
        saving = parts.checkpoint(config, mesh)
    assert step.keys() == {"attention", "MLP", "loss", "optimizer"}
    assert min(step.values()) > 0
    assert loader["tokens_per_second"] > 0
    assert 0 < saving["blocked_ms"] <= saving["written_ms"]


def test_parts_of_a_step_on_examples(tmp_path):
    (tmp_path / "a.tsv").write_text("a fine film\tgood\na dull one\tbad\n" * 20)
    task = {
        "task__name": "classify",
        "data__train": str(tmp_path / "a.tsv"),
        "data__tokenizer": "bytes",
    }
    config = small_config(
        model__name="encoder",
        model__num_labels=2,
        model__vocab_size=264,
        data__labels=("bad", "good"),
        **task,
    )
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        assert parts.step_parts(config, mesh).keys() == {"attention", "MLP", "optimizer"}


def test_a_counted_model_has_no_step(recipe):
    with pytest.raises(ConfigError, match="no step to time"):
        bench.main([recipe, "--config.model.name=ngram"])


def test_only_a_batch_that_is_not_there_yet_is_waited_for():
    def late(k):
        return time.sleep(0.2 if k == 3 else 0) or k

    def step(state, batch):
        return (state + batch, {"loss": batch})

    times, state, losses = time_steps(
        step, 0, Prefetch(range(8), 0, 8, 1, late), steps=5, warm_up=2
    )
    assert (state, losses) == (28, [2, 3, 4, 5, 6])
    assert times.data.argmax() == 0
    assert times.data[0] > 0.1 > times.data[1:].max()


def test_random_tokens_are_a_store_like_any_other(tmp_path):
    random_tokens(tmp_path / "a", 300, 20_000, 0)
    random_tokens(tmp_path / "b", 300, 20_000, 0)
    one = Store(tmp_path / "a", "train")
    two = Store(tmp_path / "b", "train")
    one.verify()
    assert one.fingerprint == two.fingerprint
    assert one.num_documents == 40
    assert one.read(0, one.num_tokens).max() < 300
    config = small_config(model__vocab_size=300)
    with config.unlocked():
        config.data.path = str(tmp_path / "a")
    assert train_batches(config)[0]["segments"].max() > 0
