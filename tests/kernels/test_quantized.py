"""Products in 8 bits: as near as their digits allow, of linear layers alone, on any mesh; and a model learns."""

import functools
import re
import sys
from collections import Counter
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh_state, mesh_of, one_step, random_batch, small_config, step
from ml_collections import FrozenConfigDict

from jaxlm.errors import ConfigError
from jaxlm.kernels.grouped_matmul import grouped_matmul
from jaxlm.kernels.quantized import DTYPES, tensordot
from jaxlm.parallel.hosts import to_global
from jaxlm.parallel.linear import columns
from jaxlm.step.state import abstract_state, gradients, init_state

# Relative, root mean square, of normal numbers: rounding to 3 binary digits after the first is off by 2.6%, to 2 by
# 5.2%, to 1/127 of the largest of 64 by 0.6%; of a product, both factors are.
ERRORS = {"fp8": (0.04, 0.065), "int8": (0.01, 0.01)}  # of the product; of its gradients


def distance(tree, other) -> float:
    def flat(tree):
        return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])

    return np.linalg.norm(flat(tree) - flat(other)) / np.linalg.norm(flat(other))


def normal(*shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def product_and_gradients(multiply, x, kernel, dy):
    @jax.jit
    def run(x, kernel, dy):
        y, transpose = jax.vjp(multiply, x, kernel)
        return y, transpose(dy)

    return run(x, kernel, dy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("quantize", DTYPES)
def test_a_product_and_its_gradients_are_near(quantize, axes, dtype):
    inputs, outputs = ((64,), (4, 32)) if axes == 1 else ((4, 16), (128,))
    arrays = normal((8, 16, *inputs), (*inputs, *outputs), (8, 16, *outputs), dtype=dtype)
    y, grads = product_and_gradients(
        lambda x, kernel: tensordot(quantize)(x, kernel, axes), *arrays
    )
    exact = product_and_gradients(
        lambda x, kernel: jnp.tensordot(x, kernel, axes), *(a.astype("float32") for a in arrays)
    )
    assert y.dtype == dtype
    assert {grad.dtype for grad in grads} == {jnp.dtype(dtype)}
    more = 1.0 if dtype == "float32" else 1.2
    assert 0 < distance(y, exact[0]) < more * ERRORS[quantize][0]
    assert all(
        0 < distance(got, want) < more * ERRORS[quantize][1] for got, want in zip(grads, exact[1])
    )


@pytest.mark.parametrize("quantize", DTYPES)
def test_what_8_bits_can_say_is_exact(quantize):
    """Small whole numbers, beside one in each sum that makes the scale 1 and meets a zero."""
    largest, of_gradients = [
        127.5 if quantize == "int8" else float(jnp.finfo(dtype).max) for dtype in DTYPES[quantize]
    ]
    rng = np.random.default_rng(0)
    x_BD, kernel_DF, dy_BF = (
        rng.integers(-8, 9, shape).astype(np.float32) for shape in ((10, 20), (20, 30), (10, 30))
    )
    x_BD[:, 0] = largest
    kernel_DF[0] = 0
    x_BD[:, 1] = 0
    kernel_DF[1] = largest
    dy_BF[:, 0] = of_gradients
    kernel_DF[2:, 0] = 0
    dy_BF[0] = of_gradients
    x_BD[0, 2:] = 0
    y, (dx, dkernel) = product_and_gradients(
        lambda x, k: tensordot(quantize)(x, k, 1), x_BD, kernel_DF, dy_BF
    )
    np.testing.assert_array_equal(y, x_BD @ kernel_DF)
    np.testing.assert_array_equal(dx[1:, 2:], (dy_BF @ kernel_DF.T)[1:, 2:])
    np.testing.assert_array_equal(dkernel[2:, 1:], (x_BD.T @ dy_BF)[2:, 1:])


@pytest.mark.parametrize("quantize", DTYPES)
def test_no_token_depends_on_those_beside_it(quantize):
    x_BTD, kernel_DF = normal((2, 8, 64), (64, 32))
    multiply = jax.jit(lambda x: tensordot(quantize)(x, kernel_DF, 1))
    loud = x_BTD.at[:, 3].mul(1e4)
    np.testing.assert_allclose(multiply(loud)[:, 4:], multiply(x_BTD)[:, 4:], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        multiply(x_BTD[:1, 2:3]), multiply(x_BTD)[:1, 2:3], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("quantize", DTYPES)
def test_rows_of_experts_as_if_alone(quantize):
    sizes, (rows_MD, kernel_EDF) = (5, 0, 9, 2), normal((20, 64), (4, 64, 32))
    got = grouped_matmul(rows_MD, kernel_EDF, jnp.array(sizes), quantize=quantize)
    ends = np.cumsum(sizes)
    multiply = jax.jit(lambda x, kernel: tensordot(quantize)(x, kernel, 1))
    for end, size, kernel in zip(ends, sizes, kernel_EDF):
        if not size:
            continue
        want = multiply(rows_MD[end - size : end], kernel)
        np.testing.assert_allclose(got[end - size : end], want, rtol=1e-5, atol=1e-5)
    assert not np.any(got[ends[-1] :])


# ---------------------------------------------------------------- the step


def dots(config) -> list[tuple[str, str, bool]]:
    """(type of the left, of the right, whether the vocabulary's 80 is among their sizes) of the traced step's dots."""
    batch = random_batch(np.random.default_rng(0), vocab=80)
    text = step.lower(abstract_state(config)[0], batch, config=config).as_text()
    found = re.findall(
        r"stablehlo\.dot_general.*: \(tensor<([\dx]*)x(\w+)>, tensor<([\dx]*)x(\w+)>\)", text
    )
    return [(left, right, "80" in f"{a}x{b}".split("x")) for a, left, b, right in found]


MODELS = {
    "scanned": ({}, 1),
    "unrolled": ({"model__scan": False}, 2),
    "remat": ({"model__remat": "dots"}, 1),  # keeps products, so that none is made again
    "experts": ({"model__num_experts": 4}, 1),
    "slots": ({"model__num_experts": 4, "model__capacity_factor": 1.5}, 1),
}


@pytest.mark.parametrize(
    ("model", "quantize"), [*((model, "fp8") for model in MODELS), ("scanned", "int8")]
)
def test_each_linear_layer_and_nothing_else_is_multiplied_in_8_bits(model, quantize):
    overrides, layers = MODELS[model]

    def make(quantize):
        return FrozenConfigDict(
            small_config(model__quantize=quantize, model__vocab_size=80, **overrides)
        )

    found = dots(make(quantize))
    counts = Counter((left, right) for left, right, _ in found)
    linear = 7 * layers  # query, key, value, out; up, gate, down
    if quantize == "fp8":
        want = {("f8E4M3FN", "f8E4M3FN"): linear, ("f8E5M2", "f8E4M3FN"): 2 * linear}
    else:
        want = {("i8", "i8"): 3 * linear}
    rest = counts.pop(("f32", "f32"))
    assert counts == want
    assert rest == len(dots(make("none"))) - 3 * linear
    assert {left for left, _, of_table in found if of_table} == {"f32"}


class Walk:
    """Batches of a walk over 64 tokens that goes astray at one step in ten."""

    def __getitem__(self, k):
        rng = np.random.default_rng(k)
        tokens = np.zeros((16, 33), np.int32)
        for t in range(33):
            astray = (rng.random(16) < 0.1) | (t == 0)
            tokens[:, t] = np.where(
                astray, rng.integers(0, 64, 16), (5 * tokens[:, t - 1] + 3) % 64
            )
        return random_batch(rng) | {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


@functools.cache
def last_loss(quantize: str) -> float:
    """The mean of the last 5 of 60 steps."""
    config = small_config(model__quantize=quantize, train__steps=60)
    losses = []
    state = fresh_state(config)
    for k in range(60):
        state, metrics = one_step(config, state, Walk()[k])
        losses.append(float(metrics["loss"]))
    return np.mean(losses[-5:])


@pytest.mark.parametrize("quantize", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_model_learns_as_in_float32(quantize):
    """From 4.16 to 0.84 nats, within 2%."""
    assert last_loss("none") < 0.9
    assert abs(last_loss(quantize) / last_loss("none") - 1) < 0.02


# ---------------------------------------------------------------- meshes


@pytest.mark.parametrize("quantize", DTYPES)
def test_columns_on_a_mesh_are_those_of_one_device(quantize):
    x_BTD, *kernels = normal((8, 16, 64), (64, 4, 8), (64, 48))
    axes = [("embed", "heads", "head_dim"), ("embed", "mlp")]

    def run(*arrays):
        return columns(arrays[0], list(arrays[1:]), axes, tensordot(quantize))

    alone = jax.jit(run)(x_BTD, *kernels)
    with jax.set_mesh(mesh_of(fsdp=4, tensor=2)):
        for got, want in zip(jax.jit(run)(x_BTD, *kernels), alone):
            assert (
                distance(got, want) < 1e-3
            )  # a last digit of a scale may decide how a half is rounded


def gradients_on(mesh, quantize: str, experts: int) -> tuple[float, dict]:
    """(loss, gradients) of a batch at the first step."""
    config = small_config(model__quantize=quantize, model__num_experts=experts)
    batch = random_batch(np.random.default_rng(0))
    with jax.set_mesh(mesh):
        run = jax.jit(partial(gradients, config=FrozenConfigDict(config)))
        grads, sums = run(
            init_state(config, mesh).params, to_global(batch, mesh, 16), jax.random.key(0)
        )
    return float(sums["loss"]), jax.device_get(grads)


@functools.cache
def alone(quantize: str, experts: int):
    return gradients_on(mesh_of(1), quantize, experts)


MESHES = {
    "fsdp=4 tensor=2": ({"fsdp": 4, "tensor": 2}, 0),
    "stage=2 fsdp=2 tensor=2": ({"stage": 2, "fsdp": 2, "tensor": 2}, 0),
    "expert=2 fsdp=2 tensor=2": ({"expert": 2, "fsdp": 2, "tensor": 2}, 4),
}
FAST = ("fp8", "fsdp=4 tensor=2")


@pytest.mark.parametrize(
    ("quantize", "mesh"),
    [
        pytest.param(*case, marks=() if case == FAST else pytest.mark.slow, id=" ".join(case))
        for case in product(DTYPES, MESHES)
    ],
)
def test_a_mesh_changes_no_more_than_the_rounding_does(quantize, mesh):
    sizes, experts = MESHES[mesh]
    (loss, exact), (loss_alone, rounded) = alone("none", experts), alone(quantize, experts)
    loss_many, many = gradients_on(mesh_of(**sizes), quantize, experts)
    assert loss_alone == pytest.approx(loss, rel=2e-3)
    assert loss_many == pytest.approx(loss_alone, rel=1e-3)
    bound = 1.1 * distance(rounded, exact)
    assert distance(many, exact) < bound
    assert distance(many, rounded) < bound


def test_without_the_library_it_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix._src.core.dot_general_qt", None)
    with pytest.raises(
        ConfigError,
        match=r'quantize=fp8: qwix.* is not installed; type: pip install -e "\.\[quantize',
    ):
        abstract_state(FrozenConfigDict(small_config(model__quantize="fp8", model__embed_dim=48)))
