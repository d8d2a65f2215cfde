"""8 fake CPU devices, set before jax starts, and the small data and models that tests share."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the time, and the tests' arrays are tiny: no optimization, which halves it,
# and the old emitters of loops, which halve the rest.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count=8"

import contextlib
import functools
import gc
import importlib
import io
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from jaxlm import cli
from jaxlm.config import recipe as configs
from jaxlm.config.keys import MESH_AXES
from jaxlm.data.prepare import prepare
from jaxlm.generate.lm import forward_logits
from jaxlm.parallel.mesh import make_mesh
from jaxlm.step.state import create_state, state_shardings, train_step

cli.spare_threads()
jax.devices()
os.environ.pop("PJRT_NPROC")  # a program that a test starts has as many devices as the test says
ROOT = Path(__file__).parent.parent
sys.path += [
    str(folder) for folder in ROOT.glob("tests/**/") if folder != ROOT / "tests"
]  # tests share helpers
OF_2017 = {  # the layers of Vaswani et al. 2017
    "model__norm_place": "post",
    "model__norm": "layer",
    "model__bias": True,
    "model__positions": "sinusoidal",
    "model__mlp": "relu",
    "model__scale_embeddings": True,
}
WORDS = (
    "the cat sat on a mat and saw two dogs run by sea under old red moon while rain fell".split()
)


def small_config(**overrides):
    """A resolved config of a decoder of two layers, in float32; keys with __ for the dot."""
    c = configs.base()
    settings = {
        "model__num_layers": 2,
        "model__embed_dim": 32,
        "model__num_heads": 4,
        "model__num_kv_heads": 2,
        "model__vocab_size": 64,
        "model__dtype": "float32",
        "data__seq_len": 32,
        "train__batch_size": 16,
        "train__steps": 20,
        "optim__learning_rate": 1e-2,
        "optim__warmup_steps": 5,
    } | overrides
    for key, value in settings.items():
        configs.set_key(c, key.replace("__", "."), value)
    return configs.resolve(c)


def body_logits(lm, tokens):
    """float32 [B, T, V]: scores of tokens by the body of a loaded model of any task, whatever its head is."""
    with jax.set_mesh(lm.mesh):
        return np.asarray(forward_logits(lm.model, lm.params, tokens, None, None))


def mesh_of(devices=8, **sizes):
    """A mesh of these sizes over the first `devices` fake devices."""
    c = configs.base()
    c.mesh.update(dict.fromkeys(MESH_AXES, 1) | sizes)
    return make_mesh(c, jax.devices()[:devices])


create = jax.jit(create_state, static_argnums=0)
step = jax.jit(train_step, static_argnames="config")


def fresh_state(config):
    return create(FrozenConfigDict(config))


def one_step(config, state, batch):
    return step(state, batch, config=FrozenConfigDict(config))


class StateMaker:
    """Stands in for init_state where only meshes differ: a state is made once, and put on each of them.

    That every mesh makes the same state is a law of its own, in step/test_state.py.
    """

    def __init__(self):
        self.made = None

    def __call__(self, config, mesh):
        if self.made is None:
            self.made = jax.device_get(fresh_state(config))
        put = functools.partial(
            jax.device_put, may_alias=False
        )  # a step overwrites what it is given
        return jax.tree.map(put, self.made, state_shardings(config, mesh))


def random_batch(rng, rows=16, length=32, vocab=64, documents=3):
    """A batch of packed documents with uneven weights."""
    window = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    first = np.zeros((rows, length), bool)
    for row in first:
        row[rng.choice(np.arange(1, length), documents - 1, replace=False)] = True
    place = np.arange(length)
    positions = place - np.maximum.accumulate(np.where(first, place, 0), axis=1)
    return {
        "tokens": window[:, :-1],
        "targets": window[:, 1:],
        "weights": (rng.random((rows, length)) < np.linspace(0.2, 1, rows)[:, None]).astype(
            np.float32
        ),
        "positions": positions.astype(np.int32),
        "segments": np.cumsum(first, axis=1, dtype=np.int32) + 1,
    }


def program(*args, devices=1, check=True, env=None):
    """Runs `python -m jaxlm.ARGS` as a person would."""
    flags = {"XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}"}
    if devices == 1:  # what another test of this session has compiled
        flags["JAX_COMPILATION_CACHE_DIR"] = str(program.compiled)
    command = [sys.executable, "-m", *map(str, args)]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | flags | (env or {}), capture_output=True, text=True
    )
    assert not check or run.returncode == 0, run.stdout + run.stderr
    return run


def refused(name, *args):
    """What came of `python -m NAME ARGS` that is expected to refuse, run in this process, which has 8 devices."""
    module = importlib.import_module(f"{name}.__main__")
    out = io.StringIO()
    err = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [name, *map(str, args)])
        patch.setattr(cli, "warn_plainly", lambda: None)
        for what in ("manage_memory", "keep_compiled"):  # which would last for all tests
            patch.setattr(module, what, lambda *args: None, raising=False)
        cli.run(module.main)
    return subprocess.CompletedProcess(
        [name, *args], end.value.code, out.getvalue(), err.getvalue()
    )


def session_folder(tmp_path_factory):
    """A folder that all workers of this test session share, and no other session."""
    own = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        return own.parent
    return own


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Where programs on one device keep what they compile. On several it must not be kept: see run/process.py."""
    program.compiled = session_folder(tmp_path_factory) / "compiled"


@pytest.fixture(autouse=True)
def few_programs():
    """Linux allows a process 65,530 maps; each compiled program takes several, and at the limit XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory):
    """200 prepared documents of made sentences, in bytes."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text")
    for i in range(200):
        sentences = []
        for _ in range(rng.integers(1, 9)):
            sentences.append(" ".join(rng.choice(WORDS, rng.integers(3, 12))) + ".\n")
        (path / f"{i:03}.txt").write_text("".join(sentences))
    prepare([str(path)], path / "tokens", tokenizer="bytes", workers=1)
    return path / "tokens"
