"""Attention on any mesh, by ring or all-gather, in any order of positions, is attention on one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.kernels import blockwise
from jaxlm.kernels.attention import ANYWHERE, attention
from jaxlm.kernels.blockwise import FLASH
from jaxlm.models.transformer import REMAT
from jaxlm.parallel.context_parallel import own_kv_heads, sharded_attention, zigzag


@pytest.fixture
def small_blocks(monkeypatch):
    """So that short sequences are of several blocks."""
    monkeypatch.setattr(blockwise, "BLOCK", 4)


def sharded(q, k, v, segments, places, context_parallel, **options):
    options = {"softcap": 0.0, "implementation": "auto"} | options
    return sharded_attention(
        q,
        k,
        v,
        segments,
        segments,
        places,
        places,
        attend=attention,
        flash=FLASH,
        anywhere=ANYWHERE,
        context_parallel=context_parallel,
        **options,
    )


def gradients(attend, *qkv):
    """(gradients of a function of q, k and v, its value), jitted."""

    def f(*qkv):
        y_BTNH = attend(*qkv)
        return jnp.sin(y_BTNH).sum(), y_BTNH

    return jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(*qkv)


CASES = [  # mesh, T, N, K, zig-zag order?, what attention is told
    ({"sequence": 8}, 64, 4, 2, False, {"window": 100}),
    ({"sequence": 8}, 64, 4, 2, True, {"window": 100}),
    (
        {"sequence": 4, "tensor": 2},
        64,
        4,
        2,
        True,
        {"window": 9, "softcap": 3.0, "implementation": "blockwise"},
    ),
    ({"sequence": 4, "tensor": 2}, 64, 4, 1, False, {"window": 100}),
    ({"sequence": 4, "tensor": 2}, 64, 6, 3, True, {"window": 100}),
    ({"sequence": 4, "tensor": 2}, 64, 3, 3, True, {"window": 20}),
    ({"fsdp": 2, "sequence": 2, "tensor": 2}, 64, 4, 2, True, {"window": 100}),
    ({"fsdp": 4, "tensor": 2}, 64, 4, 1, False, {"window": 100, "implementation": "blockwise"}),
    (
        {"sequence": 4, "tensor": 2},
        20,
        4,
        1,
        False,
        {"window": 100},
    ),  # the tensor axis divides neither K nor T
    ({"sequence": 4, "tensor": 2}, 20, 3, 3, False, {"window": 9}),
]


@pytest.mark.parametrize("context_parallel", ["ring", "all_gather"])
@pytest.mark.parametrize(("sizes", "T", "N", "K", "zigzagged", "options"), CASES)
def test_any_mesh_is_one_device(small_blocks, context_parallel, sizes, T, N, K, zigzagged, options):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(4, T, N, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, T, K, 8)).astype(np.float32)
    segments = np.sort(rng.integers(1, 4, (4, T)), axis=1)
    plain = options | {"implementation": "reference"}
    want = gradients(lambda q, k, v: attention(q, k, v, segments, segments, **plain), q, k, v)
    if zigzagged:
        places = zigzag(T, sizes["sequence"])
    else:
        places = None
    if places is None:
        order = np.arange(T)
    else:
        order = places

    def run(*qkv):
        ordered = (x[:, order] for x in qkv)
        return sharded(*ordered, segments[:, order], places, context_parallel, **options)[
            :, np.argsort(order)
        ]

    with jax.set_mesh(mesh_of(**sizes)):
        got = gradients(run, q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), want, got)


def staged(W_SLDX, x_SBTD, segments_SBT, places, attend, remat):
    """Layers of attention in stages under vmap, scanned over within a stage, as in the pipeline."""
    N = 4
    K = 2
    H = 8

    def layer(x_BTD, w_DX, segments_BT):
        y = (x_BTD @ w_DX).reshape(*x_BTD.shape[:2], N + 2 * K, H)
        q = y[:, :, :N]
        k = y[:, :, N : N + K]
        v = y[:, :, N + K :]
        return x_BTD + attend(q, k, v, segments_BT, places).reshape(x_BTD.shape)

    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)

    def stage(W, x, segments):
        return jax.lax.scan(lambda x, w: (layer(x, w, segments), None), x, W)[0]

    return jnp.sin(jax.vmap(stage, spmd_axis_name="stage")(W_SLDX, x_SBTD, segments_SBT)).mean()


def staged_program(mesh, context_parallel, remat):
    """(compiled value and gradients on a mesh, its inputs, what one device without it gives)."""
    rng = np.random.default_rng(0)
    T = 32
    W = 0.2 * rng.normal(size=(2, 3, 32, 64)).astype(np.float32)
    x = rng.normal(size=(2, 2, T, 32)).astype(np.float32)
    segments = np.sort(rng.integers(1, 4, (2, 2, T)), axis=2)
    places = zigzag(T, 2)

    def program(attend, remat):
        return jax.jit(
            jax.value_and_grad(
                lambda W, x, segments: staged(W, x, segments, places, attend, remat), (0, 1)
            )
        )

    def plain(q, k, v, segments, places):
        return attention(
            q,
            k,
            v,
            segments,
            segments,
            places_T=places,
            places_S=places,
            window=20,
            implementation="reference",
        )

    want = program(plain, "none")(W, x, segments)
    specs = PartitionSpec("stage"), *(PartitionSpec("stage", "data", "sequence"),) * 2
    inputs = []
    for a, spec in zip((W, x, segments), specs):
        inputs.append(jax.device_put(a, NamedSharding(mesh, spec)))

    def attend(*args):
        return sharded(*args, context_parallel, window=20)

    return program(attend, remat).lower(*inputs).compile(), inputs, want


@pytest.mark.parametrize(
    ("context_parallel", "remat"),
    [
        ("ring", "none"),
        ("ring", "full"),
        ("ring", "dots"),
        ("ring", "attention"),
        ("all_gather", "full"),
    ],
)
def test_in_scanned_layers_of_pipeline_stages(small_blocks, context_parallel, remat):
    mesh = mesh_of(data=2, stage=2, sequence=2)
    with jax.set_mesh(mesh):
        compiled, inputs, want = staged_program(mesh, context_parallel, remat)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            want,
            compiled(*inputs),
        )
    text = compiled.as_text()
    assert "replica_groups={{0}," not in text, "a collective over an axis of one device"
    if context_parallel == "ring":
        assert " conditional(" in text, "blocks that see nothing are no longer skipped"
        # k, v, places and segments go round forward and backward, gradients of k and v too, and home. What `attention`
        # keeps spares the third round.
        assert text.count(" collective-permute(") == {"none": 12, "attention": 12}.get(remat, 16)


def long_program(parts: int):
    """Compiled value and gradients of attention over 32,768 positions in this many shards."""
    T = 32768
    shape = jax.ShapeDtypeStruct((1, 32768, 2, 32), jnp.float32)

    def attend(q, k, v):
        return attention(q, k, v, window=T)

    if parts > 1:
        places = zigzag(T, parts)

        def attend(q, k, v):
            return sharded(q, k, v, None, places, "ring", window=T)

    f = jax.value_and_grad(lambda *qkv: jnp.square(attend(*qkv)).sum(), (0, 1, 2))
    mesh = mesh_of(parts, sequence=parts)
    one = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        return (
            jax.jit(f, in_shardings=one, out_shardings=(whole, one))
            .lower(shape, shape, shape)
            .compile()
        )


def test_the_ring_holds_one_shard(monkeypatch):
    """Memory falls with the devices of the ring, and no device ever holds all keys."""
    monkeypatch.setattr(blockwise, "BLOCK", 128)
    programs = {parts: long_program(parts) for parts in (1, 2, 4, 8)}
    memory = {parts: program.memory_analysis() for parts, program in programs.items()}
    made = {parts: m.temp_size_in_bytes for parts, m in memory.items()}
    held = {}
    for parts, m in memory.items():
        held[parts] = made[parts] + m.argument_size_in_bytes + m.output_size_in_bytes
    assert made[4] < 0.6 * made[2] and made[8] < 0.6 * made[4] and held[8] < held[1] / 3, (
        made,
        held,
    )
    assert not re.search(r"all-gather|all-to-all", programs[8].as_text())


@pytest.mark.parametrize("window", [64, 1000])
def test_zigzag_gives_every_device_the_same_work(small_blocks, window):
    def work(order, parts):  # blocks of keys, over the whole ring, that each device does not skip
        blocks = order.reshape(parts, blockwise.num_blocks(len(order) // parts), -1)
        pairs = []
        for mine in blocks:
            pairs.append([(a, b) for a in mine for b in blocks.reshape(-1, blocks.shape[-1])])
        return [
            sum(bool(blockwise.may_see((a, None), (b, None), window)) for a, b in device)
            for device in pairs
        ]

    T = 256
    parts = 8
    order = zigzag(T, parts)
    assert order.dtype == np.int32
    assert sorted(order) == list(range(T))
    natural = work(np.arange(T), parts)
    even = work(order, parts)
    assert sum(natural) == sum(even)
    if window >= T:
        assert len(set(even)) == 1
        assert max(natural) > 1.8 * max(even)


def test_zigzag_says_what_it_needs():
    with pytest.raises(ValueError, match="multiple of 2 x 4"):
        zigzag(20, 4)


@pytest.mark.parametrize(
    ("N", "K", "devices"), [(8, 2, 4), (12, 3, 2), (12, 3, 4), (6, 3, 2), (4, 1, 2)]
)
def test_devices_take_the_kv_heads_of_their_queries(N, K, devices):
    local = N // devices
    for device in range(devices):
        index = own_kv_heads(local, N // K, device)
        wanted = (device * local + np.arange(local)) // (N // K)
        np.testing.assert_array_equal(np.repeat(index, local // len(index)), wanted)
