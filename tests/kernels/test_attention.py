"""Kernels equal their reference; the loss is the same in any number of chunks and keeps no logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from flax import linen as nn

from jaxlm.config.attention_kernels import ATTENTION_KERNELS
from jaxlm.kernels import blockwise, cpu_attention
from jaxlm.kernels.attention import attention, choose, visible
from jaxlm.kernels.cross_entropy import Mix, chunk_length, cross_entropy, logits_of, weighted
from jaxlm.kernels.hopper_attention import first_keys
from jaxlm.kernels.lstm import Steps, recur, run
from jaxlm.kernels.norm import normalize
from jaxlm.parallel.linear import lookup, product


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [3, 100])
@pytest.mark.parametrize("segmented", [True, False])
def test_library_attention_is_the_reference(heads, kv_heads, window, segmented):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 17, heads, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 17, kv_heads, 8)).astype(np.float32)
    if segmented:
        segments = np.sort(rng.integers(1, 4, (2, 17)), axis=1)
    else:
        segments = None

    def run(name):
        return jax.jit(
            jax.value_and_grad(
                lambda q: jnp.sin(
                    attention(q, k, v, segments, segments, window=window, implementation=name)
                ).sum()
            )
        )(q)

    for a, b in zip(jax.tree.leaves(run("reference")), jax.tree.leaves(run("xla"))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


HERE = [name for name, kernel in ATTENTION_KERNELS.items() if "cpu" in kernel.chips]
CASES = [  # T, S, N, K, segments?, order of places, what attention is told
    (32, 32, 4, 4, False, "natural", {"window": 100}),
    (37, 37, 4, 2, True, "natural", {"window": 5}),
    (32, 32, 2, 1, True, "natural", {"window": 100, "causal": False}),
    (37, 37, 4, 1, True, "any", {"window": 9, "softcap": 2.0}),
    (1, 24, 4, 2, True, "late", {"window": 100}),
    (13, 24, 4, 2, False, "late", {"window": 16}),
]


def qkv(rng, T, S, N, K, dtype=np.float32):
    return [
        jnp.asarray(rng.normal(size=(2, *shape, 8)), dtype) for shape in ((T, N), (S, K), (S, K))
    ]


@pytest.mark.parametrize("name", [name for name in HERE if name != "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("T", "S", "N", "K", "segmented", "order", "options"), CASES)
def test_every_kernel_of_a_cpu_is_the_reference(
    monkeypatch, name, T, S, N, K, segmented, order, options, dtype
):
    monkeypatch.setattr(blockwise, "BLOCK", 8)
    monkeypatch.setattr(cpu_attention, "MIN_QUERIES", 4)
    if not ATTENTION_KERNELS[name].softcap:
        options = {key: options[key] for key in options if key != "softcap"}
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, (2, S)), axis=1)
    if order == "any":
        places = rng.permutation(S)
    else:
        places = None
    if segmented:
        marks = (segments[:, S - T :], segments)
    else:
        marks = (None, None)

    def run(implementation, *qkv):
        return jax.jit(
            jax.value_and_grad(
                lambda *qkv: (
                    jnp.sin(
                        attention(
                            *qkv,
                            *marks,
                            places_T=S - T + np.arange(T) if order == "late" else places,
                            places_S=places,
                            implementation=implementation,
                            **options,
                        )
                    )
                    .astype(jnp.float32)
                    .sum()
                ),
                (0, 1, 2),
            )
        )(*qkv)

    inputs = qkv(rng, T, S, N, K, dtype)
    want = run("reference", *(x.astype(jnp.float32) for x in inputs))
    got = run(name, *inputs)
    bound = 1e-5 if dtype == "float32" else 3e-2
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        np.testing.assert_allclose(
            a, b.astype(jnp.float32), rtol=bound, atol=bound * max(1, float(jnp.abs(a).max()))
        )


@pytest.mark.parametrize("window", [1, 5, 32, 100])
@pytest.mark.parametrize("segmented", [True, False])
def test_the_first_key_of_each_query_says_what_it_sees(window, segmented):
    """What the kernel for Hopper GPUs is told: with the causal mask it is the mask of the others, padding included."""
    T = 32
    rng = np.random.default_rng(0)
    rows = [np.sort(rng.integers(1, documents + 1, T)) for documents in (1, 3, 40)] + [
        np.r_[[1] * 5, [2] * 9, [0] * 18]
    ]
    if segmented:
        segments = jnp.asarray(rows, jnp.int32)
    else:
        segments = None
    places = jnp.arange(T)[:, None]
    keys = jnp.arange(T)
    seen = (keys >= first_keys(segments, T, window)[:, :, None]) & (keys <= places)
    np.testing.assert_array_equal(seen, visible((keys, segments), (keys, segments), window))


def test_the_kernel_for_hopper_gpus_is_refused_elsewhere():
    x = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="Hopper"):
        attention(x, x, x, window=128, implementation="tokamax")


@pytest.mark.parametrize("name", ["blockwise", "dense"])
def test_a_query_that_sees_no_key_gets_zero_and_gives_no_gradient(name):
    q, k, v = qkv(np.random.default_rng(0), 4, 4, 2, 1)
    places = {"places_T": np.arange(4), "places_S": np.arange(2, 6)}
    out, pull = jax.vjp(
        jax.jit(lambda *qkv: attention(*qkv, **places, window=9, implementation=name)), q, k, v
    )
    dq, *dkv = pull(out)
    assert not out[:, :2].any()
    assert out[:, 2:].all()
    assert not dq[:, :2].any()
    assert all(np.isfinite(x).all() for x in dkv)


def test_auto_keeps_no_logits_of_long_inputs():
    T = 8192
    shape = jax.ShapeDtypeStruct((1, 8192, 1, 8), jnp.float32)
    f = jax.jit(jax.grad(lambda *qkv: attention(*qkv, window=T).sum(), (0, 1, 2)))
    assert (
        f.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes < 4 * T * T / 10
    )


@pytest.mark.parametrize(
    ("length", "options", "kernel"),
    [
        (64, {}, "dense"),
        (64, {"causal": False}, "dense"),
        (64, {"softcap": 5.0}, "reference"),
        (8192, {}, "blockwise"),
        (8192, {"softcap": 5.0}, "blockwise"),
    ],
)
def test_what_auto_is_on_a_cpu(length, options, kernel):
    q = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)
    assert (
        choose(
            q, length, **{"plain": True, "in_order": True, "causal": True, "softcap": 0.0} | options
        )
        == kernel
    )


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("implementation", HERE)
def test_attention_equals_a_loop_by_hand(implementation, scale):
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(3, 1, 6, 1, 4)).astype(np.float32)
    got = attention(q, k, v, window=3, scale=scale, implementation=implementation)
    for t in range(6):
        keys = slice(max(0, t - 2), t + 1)
        weights = np.exp(q[0, t, 0] @ k[0, keys, 0].T * (scale or 0.5))
        np.testing.assert_allclose(got[0, t, 0], weights @ v[0, keys, 0] / weights.sum(), atol=1e-6)


@pytest.mark.parametrize("name", ["xla", "cudnn", "dense"])
def test_soft_cap_is_refused_where_it_would_be_ignored(name):
    x = jnp.ones((1, 4, 1, 8))
    with pytest.raises(ValueError, match="soft-cap"):
        attention(x, x, x, window=4, softcap=5.0, implementation=name)


@pytest.mark.parametrize("name", ["splash", "tokamax"])
def test_a_kernel_that_cannot_have_a_prefix_is_replaced(name):
    q, k, v = qkv(np.random.default_rng(0), 6, 6, 2, 1)
    places = {"places_T": np.full((2, 6), 5), "places_S": np.arange(6)}
    want = attention(q, k, v, **places, window=6, implementation="reference")
    got = attention(q, k, v, **places, window=6, implementation=name)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def examples():
    """(x [2, 12, 8], table [50, 8], targets, weights)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 12, 8)).astype(np.float32)
    table = rng.normal(size=(50, 8)).astype(np.float32)
    return x, table, rng.integers(0, 50, (2, 12)), rng.random((2, 12)).astype(np.float32)


def nats_in_full(x, table, targets, softcap):
    logits = logits_of(x, table, softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], log_z


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_chunks_change_neither_loss_nor_gradient(softcap, examples):
    x, table, targets, _ = examples

    def total(nats, log_z):
        return nats.sum() + 1e-2 * jnp.square(log_z).sum()

    want = jax.value_and_grad(
        lambda x, table: total(*nats_in_full(x, table, targets, softcap)), (0, 1)
    )(x, table)
    for chunk in (1, 3, 12):

        def loss(x, table, chunk=chunk):
            return total(*cross_entropy(x, table, targets, softcap=softcap, chunk=chunk))

        got = jax.value_and_grad(loss, (0, 1))(x, table)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), want, got)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("mix", [Mix(), Mix(0.7, 0.3), Mix(1.0, 0.0, 0.1), Mix(0.0, 0.5, 0.2)])
@pytest.mark.parametrize("of_gpus", [False, True])
def test_a_gradient_made_beside_the_loss_is_the_gradient(
    softcap, mix, of_gpus, examples, monkeypatch
):
    x, table, targets, weights = examples

    def in_full(x, table):
        nats, log_z = nats_in_full(x, table, targets, softcap)
        return 3 * jnp.sum(
            weights * (mix.loss * nats + mix.log_z * log_z + mix.z_loss * jnp.square(log_z))
        )

    want = jax.value_and_grad(in_full, (0, 1))(x, table)
    chunks = (1, 3, 12)
    if of_gpus:
        monkeypatch.setattr("jaxlm.kernels.cross_entropy.platform", lambda: "gpu")
    for chunk in chunks:

        def total(x, table, c=chunk):
            return 3 * weighted(x, table, targets, weights, mix, softcap=softcap, chunk=c)[0]

        got = jax.value_and_grad(total, (0, 1))(x, table)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), want, got)
        found = weighted(x, table, targets, weights, mix, softcap=softcap, chunk=chunk)[1:]
        np.testing.assert_allclose(
            found, nats_in_full(x, table, targets, softcap), rtol=1e-5, atol=1e-5
        )


def test_sums_of_rows_and_chunks_are_not_rounded_to_bfloat16():
    """Each of 4,096 equal gradients alone is below the last digit of their sum."""
    ids = jnp.zeros((4, 1024), jnp.int32)
    table = jnp.ones((8, 16), jnp.bfloat16)
    gradient = jax.grad(
        lambda table: lookup(table, ids, ("vocab", "embed")).astype(jnp.float32).sum()
    )(table)
    assert (gradient[0] == 4096).all()
    assert not gradient[1:].any()
    x = jnp.ones((4, 1024, 16), jnp.bfloat16)
    weights = jnp.ones((4, 1024))

    def loss(table, chunk):
        return weighted(x, table, ids, weights, Mix(), chunk=chunk)[0]

    for mesh in (mesh_of(1), mesh_of(4, fsdp=4), mesh_of(8, fsdp=4, tensor=2)):
        for chunk in (1, 64, 1024):
            with jax.set_mesh(mesh):
                found = jax.jit(jax.grad(partial(loss, chunk=chunk)))(table).astype(jnp.float32)
            np.testing.assert_allclose(found[1], 4096 / 8, rtol=1e-2)


def test_logits_are_never_kept_for_the_backward_pass():
    B = 4
    T = 256
    D = 32
    V = 4096
    zeros = jnp.zeros((B, T), jnp.int32)
    ones = jnp.ones((B, T))
    shapes = jax.ShapeDtypeStruct((B, T, D), jnp.float32), jax.ShapeDtypeStruct((V, D), jnp.float32)
    for loss in (
        lambda x, w: cross_entropy(x, w, zeros, chunk=32)[0].sum(),
        lambda x, w: weighted(x, w, zeros, ones, Mix(), chunk=32)[0],
    ):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        assert temporary < 4 * B * T * V, "a whole float32 [B, T, V] array was allocated"


def test_the_chosen_chunk_divides_the_length_and_fits():
    for rows, length, vocab in (
        (12, 64, 65),
        (16, 1024, 50304),
        (1, 8192, 128256),
        (8, 1000, 32000),
        (16, 127, 4096),
    ):
        for dim in (64, 4096):
            chunk = chunk_length(rows, length, (vocab, dim))
            assert length % chunk == 0
            assert chunk == 1 or 4 * rows * chunk * vocab <= 64 << 20
    assert chunk_length(16, 256, (4096, 128)) == 32  # what a CPU's caches hold
    assert chunk_length(4, 512, (32000, 512)) == 128  # of a table that is larger than they are
    assert (
        chunk_length(16, 127, (4096, 128)) == 127
    )  # never one position at a time where all of them fit
    assert chunk_length(16, 256, (4096, 128), 100) == 64


@pytest.mark.parametrize("reverse", [False, True])
def test_the_backward_pass_of_an_lstm_is_the_derivative(reverse):
    """Where the state is forgotten, doubled and added to, and its round trip is masked."""
    T = 6
    B = 2
    H = 4

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape)

    steps = Steps(
        normal(0, T, B, 4, H),
        jnp.sign(normal(1, T, B, 1)) + 1,
        (normal(2, T, B, H), normal(3, T, B, H)),
    )
    arguments = normal(4, H, 4, H), steps, normal(5, B, H), normal(6, B, H), normal(7, B, H)

    def for_all(f):
        return jax.jit(
            jax.grad(lambda *a: sum(jnp.sin(x).sum() for x in f(reverse, *a)), (0, 1, 3, 4))
        )

    got = for_all(recur)(*arguments)
    want = for_all(lambda *a: run(*a)[0])(*arguments)

    def drop_keep(grads):
        return (grads[0], grads[1]._replace(keep_TB1=None), *grads[2:])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), drop_keep(got), drop_keep(want)
    )


@pytest.mark.parametrize("shape", [(2, 5, 6), (3, 4, 2, 8)])
@pytest.mark.parametrize(("center", "biased"), [(True, True), (True, False), (False, False)])
def test_norms_are_those_of_flax(shape, center, biased):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(2.0, 3.0, (2, *shape)).astype(np.float32)
    scale, bias = rng.normal(size=(2, shape[-1])).astype(np.float32)
    if center:
        module = nn.LayerNorm(epsilon=1e-5, use_bias=biased)
    else:
        module = nn.RMSNorm(epsilon=1e-5)

    def theirs(x, scale, bias):
        return module.apply({"params": {"scale": scale} | ({"bias": bias} if biased else {})}, x)

    def ours(x, scale, bias):
        return normalize(x, scale, bias if biased else None, 1e-5, center)

    (want, pull), (got, our_pull) = (jax.vjp(f, x, scale, bias) for f in (theirs, ours))
    for a, b in zip((want, *pull(dy)), (got, *our_pull(dy))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_product_and_its_gradients_are_those_of_tensordot():
    rng = np.random.default_rng(0)
    x, kernel, dy = (
        rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 5), (5, 4), (2, 3, 4))
    )

    def plain(x, kernel):
        return jnp.tensordot(x, kernel, 1)

    (got, pull), (want, their_pull) = (jax.vjp(f, x, kernel) for f in (product, plain))
    for a, b in zip((got, *pull(dy)), (want, *their_pull(dy))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
