"""Laws of the LSTMs: the published equations, causality, isolation, cached = uncached, any mesh = one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fresh_state, one_step, random_batch, small_config
from flax import linen as nn

from jaxlm.kernels.cross_entropy import cross_entropy
from jaxlm.models import build
from jaxlm.models.lstm import SCORES, Attention
from jaxlm.models.transformer import unembedding
from jaxlm.parallel.hosts import to_global
from jaxlm.parallel.mesh import make_mesh
from jaxlm.step.state import check_sharding, init_state
from jaxlm.verify.laws import STEPS, difference, on_mesh, train_on, worst

VARIANTS = {
    "lstm": {"model__hidden_dim": 64, "model__tie_embeddings": False, "model__num_labels": 3},
    "bilstm": {},
    "lstm_seq2seq": {
        "model__cross_attention": "additive",
        "model__hidden_dim": 64,
        "model__encoder_layers": 1,
    },
}


@functools.cache
def made(variant, **more):
    """(parameters far from their small initial values, jitted (params, tokens, ...) -> (x, cache), model)."""
    model = build(c := small_config(model__name=variant, **VARIANTS[variant], **more))

    def move(path, x):
        return x + 0.2 * jax.random.normal(jax.random.key(len(str(path))), x.shape)

    params = jax.tree_util.tree_map_with_path(move, fresh_state(c).params)

    def apply(params, tokens, segments=None, positions=None, **more):
        return model.apply({"params": params}, tokens, segments, positions, **more)

    return params, jax.jit(apply, static_argnames="train"), model


def packed_pairs(variant, rows=2, padding=3):
    """Three documents of 8 tokens in each row, their sources of 6, and padding behind both."""
    rng = np.random.default_rng(0)
    batch = {}
    for prefix, length in (("", 8), ("enc_", 6)):
        tokens = rng.integers(0, 64, (rows, 3 * length + padding))
        segments = np.pad(np.repeat([1, 2, 3], length), (0, padding)) + 0 * tokens
        positions = np.arange(3 * length + padding) % length + 0 * tokens
        if not prefix or "seq2seq" in variant:
            batch |= {
                f"{prefix}tokens": tokens,
                f"{prefix}segments": segments,
                f"{prefix}positions": positions,
            }
    return {name: x.astype(np.int32) for name, x in batch.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_are_as_if_alone(variant):
    """Also where only segments tell them apart."""
    params, apply, _ = made(variant)
    batch = packed_pairs(variant)
    alone = {}
    for name in batch:
        if "tokens" in name:
            alone[name] = batch[name][:, : 18 if "enc" in name else 24].reshape(6, -1)
    packed, _ = apply(params, **batch)
    np.testing.assert_allclose(
        packed[:, :24].reshape(6, 8, -1), apply(params, **alone)[0], atol=1e-5
    )
    unnumbered = {name: x for name, x in batch.items() if "positions" not in name}
    np.testing.assert_allclose(apply(params, **unnumbered)[0], packed, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_position_sees(variant):
    """By gradient: its own document up to itself (bilstm: all of it), and all of the source of the same segment."""
    params, apply, _ = made(variant)
    batch = packed_pairs(variant, 1) | {"tokens": np.arange(27)[None]}
    batch |= {"enc_tokens": np.arange(30, 51)[None]} if "seq2seq" in variant else {}

    def at(table, place):
        return jnp.sin(apply({**params, "embed": {"tokens": table}}, **batch)[0][0, place]).sum()

    gradient = jax.jit(jax.grad(at))
    for place in (1, 10, 15):
        n = place // 8
        targets = range(8 * n, 8 * n + 8 if variant == "bilstm" else place + 1)
        if "seq2seq" in variant:
            sources = range(30 + 6 * n, 36 + 6 * n)
        else:
            sources = ()
        seen = np.abs(gradient(params["embed"]["tokens"], place)).max(axis=1) > 0
        assert list(np.flatnonzero(seen)) == [*targets, *sources]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "bilstm"])
def test_the_cache_changes_nothing(variant):
    """In parts, behind padding of different lengths, and with its rows in another order."""
    params, apply, model = made(variant)
    rng = np.random.default_rng(2)
    source = {}
    tokens = rng.integers(0, 64, (3, 15))
    places = np.arange(15) - np.array([[0], [3], [5]])
    segments = (places >= 0).astype(np.int32)
    positions = np.maximum(places, 0)
    if "seq2seq" in variant:  # padded on the right
        source = {"enc_tokens": rng.integers(0, 64, (3, 12)), "enc_segments": segments[:, 11::-1]}
    order = np.array([2, 0, 1])
    cache = model.init_cache(3, 15, 12 if source else 0)
    parts = []
    for start, stop in ((0, 7), (7, 8), (8, 15)):
        rows = order if start else np.arange(3)
        now = (x[rows, start:stop] for x in (tokens, segments, positions))
        x, cache = apply(params, *now, cache=cache, **({} if start else source))
        parts.append(x[np.argsort(rows)])
        if start:
            cache = cache
        else:
            cache = model.take_rows(cache, order)
    want, _ = apply(params, tokens, segments, positions, **source)
    np.testing.assert_allclose(
        jnp.where(segments[..., None], jnp.concatenate(parts, 1) - want, 0), 0, atol=1e-5
    )


def test_the_equations():
    """Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, in numpy."""
    params, apply, _ = made("bilstm", model__num_layers=1)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    h = np.zeros(16)
    c = np.zeros(16)
    W, R, b = (
        np.asarray(params["layers"]["left_0"][name])
        for name in ("input_kernel", "recurrent_kernel", "bias")
    )
    for x in np.asarray(params["embed"]["tokens"])[:5]:
        i, f, g, o = (x @ W[:, k] + h @ R[:, k] + b[k] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    np.testing.assert_allclose(apply(params, np.arange(5)[None])[0][0, -1, :16], h, atol=1e-5)
    assert (
        fresh_state(small_config(model__name="lstm")).params["layers"]["left_1"]["bias"][1] == 1
    ).all()


@pytest.mark.parametrize("kind", SCORES)
def test_attention_as_published(kind):
    rng = np.random.default_rng(0)
    model = Attention(small_config(model__cross_attention=kind).model)
    h, keys = (rng.normal(size=(1, n, 32)).astype(np.float32) for n in (3, 5))
    same = np.array(
        [[[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]], bool
    )  # the last has no source
    params = nn.unbox(model.init(jax.random.key(0), h, keys, same))
    W = {}
    for name, weights in params["params"].items():
        W[name] = np.asarray(weights["kernel"])
    scores = {
        "dot": lambda: h[0] @ keys[0].T,
        "bilinear": lambda: h[0] @ W["query"] @ keys[0].T,
        "additive": lambda: (
            np.tanh((h[0] @ W["query"])[:, None] + keys[0] @ W["key"]) @ W["score"][:, 0]
        ),
    }[kind]()
    e = np.exp(scores) * same[0]
    context = e / np.maximum(e.sum(axis=1, keepdims=True), 1e-9) @ keys[0]
    want = np.tanh(np.concatenate([context, h[0]], axis=1) @ W["out"])
    np.testing.assert_allclose(model.apply(params, h, keys, same)[0], want, atol=1e-5)


def test_dropout_is_the_same_at_every_position():
    """Of one token again and again, the state being forgotten each time: what is dropped is the same everywhere."""
    tokens = jnp.ones((4, 6), jnp.int32)
    rngs = {"dropout": jax.random.key(1)}
    params, apply, _ = made("bilstm", model__num_layers=1, model__dropout=0.5)
    x, _ = apply(params, tokens, None, 0 * tokens, rngs=rngs, train=True)
    assert (x == x[:, :1]).all()
    assert 0.3 < (x == 0).mean() < 0.7
    assert (x[0] != x[1]).any()
    params, apply, _ = made("lstm", model__num_layers=1, model__recurrent_dropout=0.5)
    x, y = (apply(params, tokens, rngs=rngs, train=train)[0] for train in (True, False))
    np.testing.assert_allclose(x[:, 0], y[:, 0], atol=1e-6)  # h is 0 before: nothing to drop
    assert (jnp.abs(x - y)[:, 1:].max(axis=(1, 2)) > 1e-3).all()


@functools.cache
def on(variant, name):
    """lstm: 20 steps of training on this mesh ("": one device); others: a gradient. Both with dropout."""
    settings = {"data__seq_len": 8, "model__dropout": 0.1, "model__recurrent_dropout": 0.1}
    c = on_mesh(small_config(model__name=variant, **VARIANTS[variant], **settings), name)
    check_sharding(c, mesh := make_mesh(c, jax.devices()[: 8 if name else 1]))
    if variant == "lstm":
        return train_on(
            c, mesh, [random_batch(np.random.default_rng(k), length=8) for k in range(STEPS)]
        )

    def loss(params, batch):
        x, _ = made(variant, **settings)[1](
            params, **batch, rngs={"dropout": jax.random.key(0)}, train=True
        )
        return jnp.sin(3 * x).mean()

    with jax.set_mesh(mesh):
        batch = to_global(packed_pairs(variant, 16, 0), mesh, 16)
        return jax.device_get(jax.jit(jax.grad(loss))(init_state(c, mesh).params, batch))


def FAST(variant, mesh):
    return variant == "lstm" or mesh == "fsdp=4 tensor=2"


MESHES = "fsdp=8", "tensor=8", "fsdp=4 tensor=2"
CASES = [
    pytest.param(v, m, marks=[] if FAST(v, m) else pytest.mark.slow)
    for v in VARIANTS
    for m in MESHES
]


@pytest.mark.parametrize(("variant", "mesh"), CASES)
def test_any_mesh_is_one_device(variant, mesh):
    got = on(variant, mesh)
    want = on(variant, "")
    assert difference(got, want).ok if variant == "lstm" else worst(got, want)[0] < 1e-4


def test_it_learns_to_count():
    """Every fourth token differs, from a random one on: known once it has been seen."""
    settings = {
        "model__embed_std": 0.5,
        "model__num_layers": 1,
        "train__steps": 60,
        "optim__learning_rate": 2e-2,
    }
    c = small_config(model__name="lstm", **settings)
    rng = np.random.default_rng(0)
    state = fresh_state(c)
    batch = random_batch(rng, documents=1)
    for _ in range(60):
        window = ((rng.integers(0, 4, (16, 1)) + np.arange(33)) % 4 == 0).astype(np.int32)
        batch |= {
            "tokens": window[:, :-1],
            "targets": window[:, 1:],
            "weights": np.float32(batch["positions"] > 3),
        }
        state, metrics = one_step(c, state, batch)
    assert metrics["loss"] < 0.05


def test_it_learns_to_reverse():
    settings = {
        "model__num_layers": 1,
        "model__embed_dim": 64,
        "model__vocab_size": 12,
        "model__embed_std": 0.5,
    }
    c = small_config(model__name="lstm_seq2seq", **settings)
    model = build(c)
    params = fresh_state(c).params
    optimizer = optax.adam(1e-2)

    def loss(params, source):
        target = source[:, ::-1]
        x, _ = model.apply(
            {"params": params}, jnp.pad(target[:, :-1], ((0, 0), (1, 0))), enc_tokens=source
        )
        return cross_entropy(x, unembedding(params), target)[0].mean()

    def train(carry, key):
        nats, grads = jax.value_and_grad(loss)(carry[0], jax.random.randint(key, (32, 8), 1, 12))
        updates, opt_state = optimizer.update(grads, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), opt_state), nats

    run = jax.jit(
        lambda *carry: jax.lax.scan(train, carry, jax.random.split(jax.random.key(0), 250))[1]
    )
    assert run(params, optimizer.init(params))[-1] < 0.2  # of log(11) = 2.4
