"""Low-rank adapters: few parameters, nothing at the start, and after merging the same model without them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh_state, program, refused, small_config

import jaxlm
from jaxlm.data.batches import fingerprint
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.models import build, build_section
from jaxlm.models.transformer import unembedding
from jaxlm.run.adapters import fold_adapters
from jaxlm.run.checkpoint import name_of

ALL = "query|key|value|out|up|gate|down"


def with_noise(params):
    """The same with adapters that do something: at the start the second matrix of each is zero."""
    rng = np.random.default_rng(1)

    def noise(path, x):
        if path[-1].key == "lora_b":
            return np.float32(0.1 * rng.normal(size=x.shape))
        return x

    return jax.tree_util.tree_map_with_path(noise, params)


def logits(model, params, name):
    tokens = np.random.default_rng(0).integers(0, 64, (2, 16))
    if name == "encoder_decoder":
        source = {"enc_tokens": jnp.asarray(tokens[:, ::-1])}
    else:
        source = {}
    x_BTD, _ = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens), **source)
    return np.asarray(x_BTD @ unembedding(params).T)


def config_of(name, **settings):
    task = {"encoder_decoder": "seq2seq", "encoder": "mlm"}.get(name, "lm")
    return small_config(model__name=name, task__name=task, model__lora_rank=4, **settings)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", ["decoder", "encoder", "encoder_decoder"])
def test_the_merged_model_computes_the_same(name, scan):
    c = config_of(name, model__scan=scan, model__bias=scan, model__lora_targets=ALL)
    params = with_noise(fresh_state(c).params)
    merged, section = fold_adapters(params, c.model)
    assert section.lora_rank == 0
    assert c.model.lora_rank == 4
    plain = jax.eval_shape(
        build_section(section).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]

    def shapes(tree):
        return {name_of(path): x.shape for path, x in jax.tree.leaves_with_path(tree)}

    assert shapes(merged) == shapes(
        jax.tree.map(lambda box: box.unbox(), plain, is_leaf=lambda x: hasattr(x, "unbox"))
    )
    before = logits(build(c), params, name)
    after = logits(build_section(section), merged, name)
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert np.abs(before - logits(build(c), fresh_state(c).params, name)).max() > 1e-2


def test_adapters_begin_as_nothing():
    c = config_of("decoder")
    plain = small_config()
    params = fresh_state(c).params
    kept, section = fold_adapters(params, c.model)
    np.testing.assert_array_equal(
        logits(build(c), params, "decoder"), logits(build_section(section), kept, "decoder")
    )
    assert section == plain.model


@pytest.mark.parametrize("name", ["decoder", "encoder_decoder"])
def test_adapters_are_few(name):
    """Rank 4 beside the queries and values of a model of 256 x 4: less than 5% of the parameters."""
    c = config_of(name, model__embed_dim=256, model__num_layers=4, model__vocab_size=1000)
    shapes = jax.eval_shape(build(c).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))[
        "params"
    ]
    sizes = {}
    for path, x in jax.tree.leaves_with_path(shapes):
        sizes[jax.tree_util.keystr(path)] = x.size
    adapters = sum(size for path, size in sizes.items() if "lora_" in path)
    assert 0 < adapters < 0.05 * sum(sizes.values())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_dir):
    """(a run with adapters, the same merged)."""
    path = tmp_path_factory.mktemp("lora")
    settings = {
        "data.path": text_dir,
        "data.seq_len": 32,
        "train.batch_size": 8,
        "train.steps": 20,
        "model.num_layers": 2,
        "model.embed_dim": 32,
        "model.num_heads": 4,
        "model.lora_rank": 2,
        "train.ema": 0.5,
        "eval.every": 0,
        "log.tensorboard": False,
    }
    flags = []
    for key, value in settings.items():
        flags.append(f"--config.{key}={value}")
    program("jaxlm.train", "--config=configs/quickstart.py", f"--workdir={path / 'run'}", *flags)
    program("jaxlm.lora", f"--workdir={path / 'run'}", f"--output={path / 'merged'}")
    return path / "run", path / "merged"


def test_a_merged_run_is_a_run(runs, tmp_path):
    run, merged = map(jaxlm.load, runs)
    assert merged.step == 20
    assert not any("lora" in name_of(path) for path, _ in jax.tree.leaves_with_path(merged.params))
    tokens = np.arange(64).reshape(2, 32)
    np.testing.assert_allclose(merged.logits(tokens), run.logits(tokens), atol=1e-5)
    assert tokenizers.load(runs[1]).fingerprint == run.tokenizer.fingerprint
    assert json.loads((runs[1] / "config.json").read_text())["model.lora_rank"] == 0
    assert fingerprint(merged.config) == fingerprint(run.config)
    program(
        "jaxlm.evaluate",
        *(f"--workdir={path}" for path in runs),
        f"--json={tmp_path / 'both.json'}",
    )
    one, other = json.loads((tmp_path / "both.json").read_text()).values()
    assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert other["parameters"] < one["parameters"]


def test_a_merged_run_can_be_begun_from_but_not_gone_on_with(runs, tmp_path, text_dir):
    settings = []
    for key in (f"data.path={text_dir}", "data.seq_len=32", "eval.every=0"):
        settings.append(f"--config.{key}")
    settings += [
        "--config.train.steps=22",
        "--config.train.batch_size=8",
        f"--config.train.init_from={runs[1]}",
    ]
    args = ("jaxlm.train", "--config=configs/quickstart.py", *settings)
    out = program(*args, f"--workdir={tmp_path / 'more'}").stdout
    assert f"starts from {runs[1]}\n" in out
    run = refused(*args, f"--workdir={runs[1]}")
    assert run.returncode == 4
    assert "a model alone" in run.stderr
    assert "Traceback" not in run.stderr


def test_what_cannot_be_merged_is_told(runs, tmp_path):
    for workdir, output, told in ((runs[1], tmp_path, "no adapters"), (*runs, "a run already")):
        run = refused("jaxlm.lora", f"--workdir={workdir}", f"--output={output}")
        assert run.returncode == 2
        assert told in run.stderr
