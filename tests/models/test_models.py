"""Laws of the decoder: causality, isolation of documents, cached = uncached, scan = unrolled; the published shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OF_2017, fresh_state, random_batch, small_config

from jaxlm.config import recipe as configs
from jaxlm.kernels.cross_entropy import logits_of
from jaxlm.models import build
from jaxlm.models.transformer import unembedding
from jaxlm.step.costs import flops_per_token, num_parameters
from jaxlm.step.state import abstract_state

VARIANTS = {
    "rope": {},
    "learned": {
        "model__positions": "learned",
        "model__norm": "layer",
        "model__mlp": "gelu",
        "model__bias": True,
    },
    "sinusoidal": {"model__positions": "sinusoidal", "model__mlp": "relu2"},
    "none": {"model__positions": "none", "model__tie_embeddings": False},
    "windows": {"model__layers": "SL", "model__window": 5, "model__qk_norm": True},
    "softcaps": {
        "model__logit_softcap": 10.0,
        "model__attention_softcap": 5.0,
        "model__num_kv_heads": 1,
    },
    "unrolled": {
        "model__layers": "SSL",
        "model__window": 4,
        "model__num_layers": 4,
        "model__scan": False,
    },
    "remat": {"model__remat": "full"},
    "n-grams": {"model__embed_ngrams": 4, "model__buckets": 500},
    "2017": OF_2017,
}


@pytest.fixture(scope="module", params=VARIANTS)
def made(request):
    """(config, model, params, logits function) with parameters far from their small initial values."""
    c = small_config(**VARIANTS[request.param])
    model = build(c)
    params = fresh_state(c).params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), params)

    @jax.jit
    def logits(tokens, segments=None, positions=None):
        x, _ = model.apply({"params": params}, tokens, segments, positions)
        return logits_of(x, unembedding(params), c.model.logit_softcap)

    return c, model, params, logits


def test_a_token_does_not_see_what_follows(made):
    _, model, params, _ = made
    # every token its own row of the table
    table = jnp.array(params["embed"]["tokens"])
    tokens = jnp.arange(32)[None]

    def logit_sum_at(
        x_TD, place
    ):  # gradient of one position's output with respect to every input embedding
        p = {**params, "embed": {**params["embed"], "tokens": table.at[tokens[0]].set(x_TD)}}
        return model.apply({"params": p}, tokens)[0][0, place].sum()

    grad = jax.jit(jax.grad(logit_sum_at))(table[:32], 10)
    assert np.abs(grad[:11]).max() > 0
    assert np.all(grad[11:] == 0)


def test_packed_documents_are_as_if_alone(made):
    _, _, _, logits = made
    batch = random_batch(np.random.default_rng(1), rows=2)
    packed = logits(batch["tokens"], batch["segments"], batch["positions"])
    for row in range(2):
        for segment in np.unique(batch["segments"][row]):
            here = batch["segments"][row] == segment
            alone = logits(batch["tokens"][row : row + 1, here])
            np.testing.assert_allclose(packed[row, here], alone[0], atol=1e-5)


def test_no_gradient_flows_between_packed_documents(made):
    _, model, params, _ = made
    tokens = jnp.arange(32)[None]
    segments = jnp.repeat(jnp.arange(1, 3), 16)[None]
    positions = jnp.tile(jnp.arange(16), 2)[None]

    def second_document(table):
        p = {**params, "embed": {**params["embed"], "tokens": table}}
        return jnp.sin(model.apply({"params": p}, tokens, segments, positions)[0][0, 16:]).sum()

    grad = jax.jit(jax.grad(second_document))(params["embed"]["tokens"])
    assert np.all(grad[:16] == 0)
    assert np.all(np.abs(grad[16:32]).max(axis=1) > 0)


def test_the_cache_changes_nothing(made):
    c, model, params, logits = made
    tokens = np.random.default_rng(2).integers(0, 64, (2, 32))

    @jax.jit
    def cached(tokens):
        cache = model.init_cache(2, 40)
        parts = []
        for start, stop in ((0, 20), (20, 21), (21, 32)):
            x, cache = model.apply({"params": params}, tokens[:, start:stop], cache=cache)
            parts.append(logits_of(x, unembedding(params), c.model.logit_softcap))
        return jnp.concatenate(parts, axis=1)

    np.testing.assert_allclose(cached(tokens), logits(tokens), atol=1e-5)


def add_and_norm(x, y, p):
    """LayerNorm(x + y), as Vaswani et al. 2017 write it; p: scale and bias."""
    total = x + y
    centered = total - total.mean(axis=-1, keepdims=True)
    variance = (centered**2).mean(axis=-1, keepdims=True)
    return p["scale"] * centered / np.sqrt(variance + 1e-6) + p["bias"]


def causal_attention(x, p):
    """x [T, D]; softmax(Q K^T / sqrt(H)) V of each head, by a loop over the heads."""
    T = len(x)
    heads = []
    for n in range(p["query"]["kernel"].shape[1]):
        q, k, v = (
            x @ p[name]["kernel"][:, n] + p[name]["bias"][n] for name in ("query", "key", "value")
        )
        scores = np.where(np.tri(T, dtype=bool), q @ k.T / np.sqrt(q.shape[1]), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ v @ p["out"]["kernel"][n])
    return sum(heads) + p["out"]["bias"]


def test_post_norm_is_that_of_2017():
    """One layer against numpy in float64: scaled embeddings, sines and cosines, and LayerNorm(x + f(x)) twice."""
    c = small_config(**OF_2017, model__num_layers=1, model__num_kv_heads=4, model__scan=False)
    rng = np.random.default_rng(0)
    D = 32
    tokens = np.arange(3, 15)
    params = jax.tree.map(
        lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)), fresh_state(c).params
    )
    found, _ = jax.jit(build(c).apply)({"params": params}, tokens[None])

    assert params.keys() == {"embed", "layers"}  # no norm at the end: the layer's own is the last
    p = jax.tree.map(np.float64, params["layers"]["block_0"])
    angles = np.arange(len(tokens))[:, None] / 10_000 ** (np.arange(0, D, 2) / D)
    x = np.float64(params["embed"]["tokens"])[tokens] * np.sqrt(D)
    x += np.concatenate(
        [np.sin(angles), np.cos(angles)], axis=1
    )  # the paper alternates them: the same, reordered
    x = add_and_norm(x, causal_attention(x, p["attention"]), p["attention_norm"])
    hidden = np.maximum(x @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"], 0)
    x = add_and_norm(
        x, hidden @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"], p["mlp_norm"]
    )
    np.testing.assert_allclose(found[0], x, atol=2e-5)


def test_a_window_hides_what_lies_further_back():
    c = small_config(model__layers="S", model__window=4, model__num_layers=1)
    model = build(c)
    params = fresh_state(c).params
    tokens = np.arange(32)[None]

    def last(table):
        p = {**params, "embed": {"tokens": table}}
        return jnp.sin(model.apply({"params": p}, tokens)[0][0, 31]).sum()

    seen = np.abs(jax.jit(jax.grad(last))(params["embed"]["tokens"])).max(axis=1)[:32] > 0
    assert list(np.flatnonzero(seen)) == [28, 29, 30, 31]


def test_nothing_looks_further_back_than_the_context_length():
    """So that generating past it is the same function that was trained, at every length."""
    c = small_config(data__seq_len=8, model__num_layers=1)
    model = build(c)
    params = fresh_state(c).params
    hidden = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])
    long = np.random.default_rng(0).integers(0, 64, (1, 20))
    x = hidden(params, long)
    y = hidden(params, long[:, 12:])
    np.testing.assert_allclose(x[:, -1], y[:, -1], atol=1e-5)


def test_scan_and_unrolled_layers_are_one_model():
    scanned, plain = (
        small_config(model__layers="SL", model__window=6, model__scan=s) for s in (True, False)
    )
    params = fresh_state(scanned).params
    blocks = {}
    for i in range(2):
        blocks[f"block_{i}"] = jax.tree.map(lambda x: x[0], params["layers"][f"block_{i}"])
    tokens = np.random.default_rng(3).integers(0, 64, (2, 32))
    a, _ = jax.jit(build(scanned).apply)({"params": params}, tokens)
    b, _ = jax.jit(build(plain).apply)({"params": {**params, "layers": blocks}}, tokens)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_rounds_unrolled_in_the_scan_change_no_gradient():
    tokens = np.random.default_rng(3).integers(0, 64, (2, 32))
    grads = []
    for unroll in (1, 2):
        c = small_config(model__num_layers=3, model__scan_unroll=unroll, model__remat="full")

        def f(p, c=c):
            return jnp.sin(build(c).apply({"params": p}, tokens)[0]).sum()

        grads.append(jax.jit(jax.grad(f))(fresh_state(c).params))
    rounding = 1e-6 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads[0]))
    jax.tree.map(partial(np.testing.assert_allclose, atol=rounding), *grads)


def test_remat_changes_no_gradient():
    tokens = np.random.default_rng(3).integers(0, 64, (2, 32))
    grads = []
    for remat in ("none", "full", "dots", "attention"):
        c = small_config(model__remat=remat)

        def f(p, c=c):
            return jnp.sin(build(c).apply({"params": p}, tokens)[0]).sum()

        grads.append(jax.jit(jax.grad(f))(fresh_state(c).params))
    rounding = 1e-6 * max(
        float(jnp.abs(x).max()) for x in jax.tree.leaves(grads[0])
    )  # as much is off float64's
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=rounding), grads[0], other)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    c = small_config(model__dtype="bfloat16")
    params = fresh_state(c).params
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert (
        jax.eval_shape(build(c).apply, {"params": params}, np.zeros((1, 4), int))[0].dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("llama.py:8b", 8_030_261_248),
        ("llama.py:1b", 1_235_814_400),
        ("mixtral.py:8x7b", 46_702_792_704),
        ("gpt2.py", 124_373_760),
    ],
)
def test_published_parameter_counts(recipe, parameters):
    c = configs.resolve(configs.load(f"configs/{recipe}"))
    assert num_parameters(abstract_state(c)[0].params) == parameters


def test_flops_are_those_of_the_compiled_step():
    """6 N + 12 N H T against XLA's count of the forward and backward pass."""
    c = small_config(
        model__embed_dim=256, model__mlp_dim=1024, model__scan=False, data__seq_len=128
    )
    c.model.context_length = 128
    params = fresh_state(c).params
    tokens = jnp.zeros((1, 128), jnp.int32)

    def f(p):
        x, _ = build(c).apply({"params": p}, tokens)
        return jnp.sin(logits_of(x, unembedding(p), 0.0)).sum()

    counted = jax.jit(jax.grad(f)).lower(params).compile().cost_analysis()["flops"] / 128
    assert counted == pytest.approx(flops_per_token(c, params), rel=0.1)


def test_golden_tree_of_llama_8b():
    """Names, shapes and logical axes that checkpoints and sharding rules rely on."""
    state, axes = abstract_state(configs.resolve(configs.load("configs/llama.py:8b")))

    def key(path):
        return jax.tree_util.keystr(path, simple=True, separator="/")

    shapes = {key(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(state.params)}
    names = {key(path): tuple(leaf) for path, leaf in jax.tree.leaves_with_path(axes.params)}
    assert {path: (shapes[path], names[path]) for path in shapes} == {
        "embed/tokens": ((128256, 4096), ("vocab", "embed")),
        "final_norm/scale": ((4096,), ("norm",)),
        "layers/block_0/attention/key/kernel": (
            (32, 4096, 8, 128),
            ("layers", "embed", "kv_heads", "head_dim"),
        ),
        "layers/block_0/attention/out/kernel": (
            (32, 32, 128, 4096),
            ("layers", "heads", "head_dim", "embed"),
        ),
        "layers/block_0/attention/query/kernel": (
            (32, 4096, 32, 128),
            ("layers", "embed", "heads", "head_dim"),
        ),
        "layers/block_0/attention/value/kernel": (
            (32, 4096, 8, 128),
            ("layers", "embed", "kv_heads", "head_dim"),
        ),
        "layers/block_0/attention_norm/scale": ((32, 4096), ("layers", "norm")),
        "layers/block_0/mlp/down/kernel": ((32, 14336, 4096), ("layers", "mlp", "embed")),
        "layers/block_0/mlp/gate/kernel": ((32, 4096, 14336), ("layers", "embed", "mlp")),
        "layers/block_0/mlp/up/kernel": ((32, 4096, 14336), ("layers", "embed", "mlp")),
        "layers/block_0/mlp_norm/scale": ((32, 4096), ("layers", "norm")),
        "unembed": ((128256, 4096), ("vocab", "embed")),
    }
