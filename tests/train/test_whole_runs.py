"""Twelve configs as whole runs: trained, saved, resumed to the bit, evaluated, and generated from."""

import functools
import json
import math
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import mesh_of, small_config
from ml_collections import FrozenConfigDict

import jaxlm.generate.lm
import jaxlm.train.loop as trainer
from jaxlm.data.batches import describe
from jaxlm.evaluate.evaluator import Evaluator
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.step.state import abstract_state, state_shardings

pytestmark = pytest.mark.slow
ACCUMULATION = {"train__grad_accumulation": 2}
AVERAGE = {"train__ema": 0.99}
EXPERTS = {"model__num_experts": 4, "model__router": "sigmoid", "model__balance_rate": 1e-3}
LORA = {"model__lora_rank": 2}
FROZEN = {"optim__rates": ((r"embed", 0.0), (r".*", 1.0))}
SCANNED = {"model__scan": True, "model__num_layers": 2}
STOCHASTIC = {"optim__rounding": "stochastic"}
RUNS = {  # optimizer, dtype of the parameters, the rest
    "adamw, accumulation": ("adamw", "float32", ACCUMULATION),
    "adamw, bfloat16, stochastic": ("adamw", "bfloat16", ACCUMULATION | STOCHASTIC | SCANNED),
    "adamw, bfloat16, lora": ("adamw", "bfloat16", LORA | AVERAGE),
    "adam, bfloat16, average": ("adam", "bfloat16", AVERAGE),
    "sgd, average, accumulation": ("sgd", "float32", AVERAGE | ACCUMULATION | SCANNED),
    "sgd, bfloat16, frozen": ("sgd", "bfloat16", FROZEN | AVERAGE | STOCHASTIC),
    "lion, frozen": ("lion", "float32", FROZEN),
    "lion, bfloat16, experts": ("lion", "bfloat16", EXPERTS | SCANNED),
    "muon, experts": ("muon", "float32", EXPERTS | AVERAGE),
    "muon, bfloat16": ("muon", "bfloat16", ACCUMULATION | AVERAGE | STOCHASTIC),
    "adafactor, lora": ("adafactor", "float32", LORA | SCANNED),
    "adafactor, bfloat16": (
        "adafactor",
        "bfloat16",
        ACCUMULATION | AVERAGE | {"train__accumulation_dtype": "bfloat16"},
    ),
}
TINY = {
    "model__num_layers": 1,
    "model__scan": False,
    "model__embed_dim": 16,
    "model__num_heads": 2,
    "model__mlp_dim": 32,
    "data__seq_len": 16,
    "train__steps": 4,
    "optim__warmup_steps": 1,
    "checkpoint__every": 2,
    "checkpoint__keep": 4,
    "eval__every": 0,
    "eval__batches": 1,
    "log__every": 1,
    "log__tensorboard": False,
}


@pytest.fixture(autouse=True)
def one_compilation(monkeypatch):
    """One device, on which runs of the same config share a compiled step; signals go where they went before."""
    for module in (trainer, jaxlm.generate.lm):
        monkeypatch.setattr(module, "make_mesh", lambda config: mesh_of(1))
    make = trainer.jit_train_step
    shared = functools.cache(make)
    monkeypatch.setattr(
        trainer, "jit_train_step", lambda config, mesh: shared(FrozenConfigDict(config), mesh)
    )
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def saved_state(config, workdir, step):
    checkpoints = Checkpoints(workdir, config)
    try:
        return checkpoints.restore(
            step, abstract_state(config)[0], state_shardings(config, mesh_of(1))
        )
    finally:
        checkpoints.close()


def rows(workdir):
    lines = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        lines.append(json.loads(line))
    timed = ("tokens_per_second", "seconds")
    return [{key: x for key, x in line.items() if not key.endswith(timed)} for line in lines]


@pytest.mark.parametrize("run", RUNS)
def test_a_whole_run_is_saved_resumed_to_the_bit_evaluated_and_generated_from(
    tmp_path, text_dir, run
):
    optimizer, dtype, more = RUNS[run]
    settings = (
        TINY
        | more
        | {"optim__name": optimizer, "model__param_dtype": dtype, "data__path": str(text_dir)}
    )
    vocab_size, _, _ = describe(small_config(**settings))
    config = small_config(**settings, model__vocab_size=vocab_size)
    whole = tmp_path / "whole"
    resumed = tmp_path / "resumed"
    whole.mkdir()
    assert trainer.train(config, whole) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints/4")
    assert trainer.train(config, resumed) == 0

    ends = []
    for workdir in (whole, resumed):
        ends.append(saved_state(config, workdir, 4))
    assert dtype in {
        str(x.dtype) for x in jax.tree.leaves(ends[0].params)
    }  # routers are float32 in any case
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert rows(whole) == rows(resumed)
    assert all(math.isfinite(row["loss"]) for row in rows(whole))

    lm = jaxlm.load(whole)
    assert math.isfinite(Evaluator(lm.config, lm.mesh)(lm.params)["loss"])
    assert len(lm.generate("the cat", max_tokens=3)) == 1
