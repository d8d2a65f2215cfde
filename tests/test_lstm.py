"""Laws of the LSTMs: the published equations, causality, isolation, cached = uncached, any mesh = one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fresh_state, mesh_of, one_step, random_batch, small_config
from flax import linen as nn

from jaxlm.kernels.cross_entropy import cross_entropy, logits_of
from jaxlm.kernels.lstm import Steps, recur, run
from jaxlm.keys import MESH_AXES
from jaxlm.laws import difference, train_on, worst
from jaxlm.models import build
from jaxlm.models.lstm import SCORES, Attention
from jaxlm.models.transformer import unembedding
from jaxlm.parallel.hosts import to_global
from jaxlm.state import check_sharding, init_state

VARIANTS = {
    "lstm": {"model__hidden_dim": 64, "model__tie_embeddings": False, "model__num_labels": 3},
    "bilstm": {},
    "lstm_seq2seq": {"model__cross_attention": "bilinear", "model__encoder_layers": 1},
    "lstm_seq2seq additive": {"model__cross_attention": "additive", "model__hidden_dim": 64, "model__bias": True},
}


@functools.cache
def made(variant, **more):
    """(parameters far from their small initial values, jitted (params, tokens, ...) -> x or (x, cache), model)."""
    model = build(c := small_config(model__name=variant.split()[0], **VARIANTS[variant], **more))
    move = lambda path, x: x + 0.2 * jax.random.normal(jax.random.key(len(str(path))), x.shape)
    params = jax.tree_util.tree_map_with_path(move, fresh_state(c).params)

    @functools.partial(jax.jit, static_argnames="train")
    def apply(params, tokens, segments=None, positions=None, rngs=None, **rest):
        x, cache = model.apply({"params": params}, tokens, segments, positions, rngs=rngs, **rest)
        return x if cache is None else (x, cache)

    return params, apply, model


def packed_pairs(variant, rows=2):
    """Three documents of 8 tokens in each row, then 3 of padding; their sources of 6, then 2."""
    rng, batch = np.random.default_rng(0), {}
    for prefix, length, padding in (("", 8, 3), ("enc_", 6, 2)):
        tokens = rng.integers(0, 64, (rows, 3 * length + padding))
        segments = np.pad(np.repeat([1, 2, 3], length), (0, padding)) + 0 * tokens
        positions = np.arange(3 * length + padding) % length + 0 * tokens
        if not prefix or "seq2seq" in variant:
            batch |= {f"{prefix}tokens": tokens, f"{prefix}segments": segments, f"{prefix}positions": positions}
    return {name: x.astype(np.int32) for name, x in batch.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_are_as_if_alone(variant):
    """Also where only segments tell them apart."""
    params, apply, _ = made(variant)
    batch = packed_pairs(variant)
    alone = {name: batch[name][:, : 24 - 6 * (name[0] == "e")].reshape(6, -1) for name in batch if "tokens" in name}
    packed, want = apply(params, **batch), apply(params, **alone)
    np.testing.assert_allclose(packed[:, :24].reshape(6, 8, -1), want, atol=1e-5)
    unnumbered = apply(params, **{name: x for name, x in batch.items() if "positions" not in name})
    np.testing.assert_allclose(unnumbered, packed, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_position_sees(variant):
    """By gradient: of its own document, what precedes it (bilstm: all); of the source, all of the same segment."""
    params, apply, _ = made(variant)
    batch = packed_pairs(variant, 1) | {"tokens": np.arange(27)[None]}
    if "seq2seq" in variant:
        batch["enc_tokens"] = np.arange(30, 50)[None]
    at = lambda table, place: jnp.sin(apply({**params, "embed": {"tokens": table}}, **batch)[0, place]).sum()
    gradient = jax.jit(jax.grad(at))
    for place in (1, 10, 15):
        n = place // 8
        targets = range(8 * n, 8 * n + 8 if variant == "bilstm" else place + 1)
        sources = range(30 + 6 * n, 36 + 6 * n) if "seq2seq" in variant else ()
        seen = np.abs(gradient(params["embed"]["tokens"], place)).max(axis=1) > 0
        assert list(np.flatnonzero(seen)) == [*targets, *sources]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "bilstm"])
def test_the_cache_changes_nothing(variant):
    """In parts, behind padding of different lengths, and with its rows in another order."""
    params, apply, model = made(variant)
    rng, source = np.random.default_rng(2), {}
    tokens, pad = rng.integers(0, 64, (3, 15)), np.array([[0], [3], [5]])
    segments, positions = (np.arange(15) >= pad).astype(np.int32), np.maximum(np.arange(15) - pad, 0)
    if "seq2seq" in variant:
        ends = np.array([[12], [7], [9]])
        source = {"enc_tokens": rng.integers(0, 64, (3, 12)), "enc_segments": (np.arange(12) < ends).astype(np.int32)}
    order, cache, parts = np.array([2, 0, 1]), model.init_cache(3, 15, 12 if source else 0), []
    for start, stop in ((0, 7), (7, 8), (8, 15)):
        rows = order if start else np.arange(3)
        now = (x[rows, start:stop] for x in (tokens, segments, positions))
        x, cache = apply(params, *now, cache=cache, **({} if start else source))
        parts.append(x[np.argsort(rows)])
        cache = cache if start else model.take_rows(cache, order)
    want = apply(params, tokens, segments, positions, **source)
    np.testing.assert_allclose(jnp.where(segments[..., None], jnp.concatenate(parts, 1) - want, 0), 0, atol=1e-5)


def test_the_equations():
    """Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, in numpy."""
    params, apply, _ = made("bilstm", model__num_layers=1)
    sigmoid, h, c = lambda x: 1 / (1 + np.exp(-x)), np.zeros(16), np.zeros(16)
    W, R, b = (np.asarray(params["layers"]["left_0"][name]) for name in ("input_kernel", "recurrent_kernel", "bias"))
    for x in np.asarray(params["embed"]["tokens"])[:5]:
        i, f, g, o = (x @ W[:, k] + h @ R[:, k] + b[k] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    np.testing.assert_allclose(apply(params, np.arange(5)[None])[0, -1, :16], h, atol=1e-5)
    assert (fresh_state(small_config(model__name="lstm")).params["layers"]["left_1"]["bias"][1] == 1).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_the_backward_pass_is_the_derivative(reverse):
    T, B, H = 6, 2, 4
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    steps = Steps(normal(0, T, B, 4, H), jnp.sign(normal(1, T, B, 1)) + 1, (normal(2, T, B, H), normal(3, T, B, H)))
    arguments = normal(4, H, 4, H), steps, normal(5, B, H), normal(6, B, H), normal(7, B, H)
    for_all = lambda f: jax.jit(jax.grad(lambda *a: sum(jnp.sin(x).sum() for x in f(reverse, *a)), (0, 1, 3, 4)))
    got, want = for_all(recur)(*arguments), for_all(lambda *a: run(*a)[0])(*arguments)
    drop_keep = lambda grads: (grads[0], grads[1]._replace(keep_TB1=None), *grads[2:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), drop_keep(got), drop_keep(want))


@pytest.mark.parametrize("kind", SCORES)
def test_attention_as_published(kind):
    c, rng = small_config(model__cross_attention=kind, model__embed_dim=8), np.random.default_rng(0)
    model = Attention(c.model)
    h, keys = (rng.normal(size=(1, n, 8)).astype(np.float32) for n in (3, 5))
    same = np.array([[[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]], bool)  # the last has no source
    params = nn.unbox(model.init(jax.random.key(0), h, keys, same))
    W = {name: np.asarray(weights["kernel"]) for name, weights in params["params"].items()}
    scores = {
        "dot": lambda: h[0] @ keys[0].T,
        "bilinear": lambda: h[0] @ W["query"] @ keys[0].T,
        "additive": lambda: np.tanh((h[0] @ W["query"])[:, None] + keys[0] @ W["key"]) @ W["score"][:, 0],
    }[kind]()
    e = np.exp(scores) * same[0]
    context = e / np.maximum(e.sum(axis=1, keepdims=True), 1e-9) @ keys[0]
    want = np.tanh(np.concatenate([context, h[0]], axis=1) @ W["out"])
    np.testing.assert_allclose(model.apply(params, h, keys, same)[0], want, atol=1e-5)


def test_dropout_is_the_same_at_every_position():
    """Of one token again and again, the state being forgotten each time: what is dropped is the same everywhere."""
    tokens, rngs = jnp.ones((4, 6), jnp.int32), {"dropout": jax.random.key(1)}
    params, apply, _ = made("bilstm", model__num_layers=1, model__dropout=0.5)
    x = apply(params, tokens, None, 0 * tokens, rngs, train=True)
    assert (x == x[:, :1]).all() and 0.3 < (x == 0).mean() < 0.7 and (x[0] != x[1]).any()
    params, apply, _ = made("lstm", model__num_layers=1, model__recurrent_dropout=0.5)
    x, y = (apply(params, tokens, None, None, rngs, train=train) for train in (True, False))
    np.testing.assert_allclose(x[:, 0], y[:, 0], atol=1e-6)  # h is 0 before: nothing to drop
    assert (jnp.abs(x - y)[:, 1:].max(axis=(1, 2)) > 1e-3).all()


MESHES = {"fsdp=8": {"fsdp": 8}, "tensor=8": {"tensor": 8}, "fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2}}


class Batches:
    def __getitem__(self, k):
        return random_batch(np.random.default_rng(k), length=8)


@functools.cache
def on(variant, mesh_name):
    """lstm: 20 steps of training on this mesh ("": one device); others: a gradient. Both with dropout."""
    sizes = MESHES.get(mesh_name, {})
    settings = {"data__seq_len": 8, "model__dropout": 0.1, "model__recurrent_dropout": 0.1}
    c = small_config(model__name=variant.split()[0], **VARIANTS[variant], **settings)
    c.mesh.update(dict.fromkeys(MESH_AXES, 1) | sizes)
    mesh = mesh_of(8 if sizes else 1, **sizes)
    check_sharding(c, mesh)
    if variant == "lstm":
        return train_on(c, mesh, Batches())
    batch = packed_pairs(variant, 16)
    batch = {name: x[:, :24] if name[0] != "e" else x for name, x in batch.items()}

    def loss(params, tokens, segments, positions, **enc):
        rngs = {"dropout": jax.random.key(0)}
        x, _ = build(c).apply({"params": params}, tokens, segments, positions, train=True, rngs=rngs, **enc)
        return jnp.sin(3 * x).mean()

    with jax.set_mesh(mesh):
        params = init_state(c, mesh).params
        return jax.device_get(jax.jit(jax.grad(loss))(params, **to_global(batch, mesh, 16)))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_mesh_is_one_device(variant, mesh):
    got, want = on(variant, mesh), on(variant, "")
    if variant == "lstm":
        assert difference(got, want).ok, difference(got, want)
    else:
        assert worst(got, want)[0] < 1e-4, worst(got, want)


def test_it_learns_to_count():
    """A one at every fifth position, nothing between: after the first five all is known to who counts."""
    c = small_config(model__name="lstm", model__num_layers=1, model__embed_std=0.5, train__steps=150)
    rng = np.random.default_rng(0)
    state, batch = fresh_state(c), random_batch(rng, documents=1)
    weights = np.tile(np.arange(32) >= 5, (16, 1)).astype(np.float32)
    for _ in range(150):
        window = ((np.arange(33) + rng.integers(5, size=(16, 1))) % 5 == 0).astype(np.int32)
        state, metrics = one_step(
            c, state, batch | {"tokens": window[:, :-1], "targets": window[:, 1:], "weights": weights}
        )
    assert metrics["loss"] < 0.05


def test_it_learns_to_reverse():
    c = small_config(model__name="lstm_seq2seq", model__num_layers=1, model__embed_dim=64, model__vocab_size=12)
    model, params, optimizer = build(c), fresh_state(c).params, optax.adam(5e-3)

    def objective(params, source):
        target = source[:, ::-1]
        x, _ = model.apply({"params": params}, jnp.pad(target[:, :-1], ((0, 0), (1, 0))), enc_tokens=source)
        right = logits_of(x, unembedding(params), 0.0).argmax(-1) == target
        return cross_entropy(x, unembedding(params), target)[0].mean(), right.mean()

    @jax.jit
    def train(params, opt_state, key):
        grads, right = jax.grad(objective, has_aux=True)(params, jax.random.randint(key, (32, 8), 1, 12))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, right

    opt_state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(0), 800):
        params, opt_state, right = train(params, opt_state, key)
    assert right > 0.97
