"""plan: what is counted is what was computed and sent, and a step compiles for pods that are not here."""

import json
import subprocess
import sys
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, program, refused, small_config

from jaxlm.config.keys import MESH_AXES
from jaxlm.errors import ConfigError
from jaxlm.kernels.attention import attention, mask_of
from jaxlm.kernels.grouped_matmul import grouped_matmul
from jaxlm.kernels.tpu_attention import splash
from jaxlm.parallel import chips
from jaxlm.parallel.mesh import make_mesh
from jaxlm.plan import step_time as predict
from jaxlm.plan import topology
from jaxlm.plan.flops import matmul_flops, run_share
from jaxlm.plan.hlo import (
    Collective,
    Program,
    axes_of_groups,
    count,
    groups_of,
    largest_factor,
    traffic,
)
from jaxlm.plan.measure import Measured
from jaxlm.plan.page import MOVES, Plan, figures, page
from jaxlm.step import costs
from jaxlm.step.state import abstract_inputs, abstract_state, jit_train_step

# ---------------------------------------------------------------- FLOPs


def flops(f, *shapes):
    return matmul_flops(
        jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr
    )


def test_products_are_counted_in_loops_branches_and_recomputed():
    def square(x):
        return x @ x

    one = 2 * 8**3
    assert flops(square, (8, 8)) == one
    assert (
        flops(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0], (8, 8)) == 5 * one
    )
    assert (
        flops(lambda x: jax.lax.cond(x[0, 0] > 0, square, lambda x: x @ x @ x, x), (8, 8))
        == 2 * one
    )

    def two(x):
        return jnp.sum(jnp.sin(x @ x) @ x)

    kept = flops(jax.grad(two), (8, 8))
    again = flops(jax.grad(jax.checkpoint(two)), (8, 8))
    assert kept == 6 * one
    assert again == 7 * one

    def batched(x, y):
        return jnp.einsum("BTD,DF->BTF", x, y)

    assert flops(batched, (2, 3, 4), (4, 5)) == 2 * 2 * 3 * 4 * 5


def test_the_largest_factor_of_a_product_is_found_and_of_a_batch_of_products_one():
    a = jnp.zeros((8, 64, 32))
    b = jnp.zeros((8, 32, 16))
    c = jnp.zeros((16, 500))

    def text(f, *arrays):
        return jax.jit(f).lower(*arrays).compile().as_text()

    assert largest_factor(text(jnp.matmul, a, b)) == 4 * 64 * 32
    assert (
        largest_factor(text(lambda a, b, c: a @ b @ c, a, b, c)) == 4 * 8 * 64 * 16
    )  # by c it is one product
    assert largest_factor(text(lambda a: a + 1, a)) == 0


def test_a_grouped_product_is_counted_once_for_each_row_and_its_transposes_too():
    sizes = jnp.array([3, 125])

    def f(x, y):
        return jnp.sum(grouped_matmul(x, y, sizes, implementation="megablox"))

    assert flops(f, (128, 4), (2, 4, 6)) == 2 * 128 * 4 * 6
    assert flops(jax.grad(f, argnums=(0, 1)), (128, 4), (2, 4, 6)) == 3 * 2 * 128 * 4 * 6


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"stage": 2, "fsdp": 4}], ids=str
)
def test_the_step_executes_what_arithmetic_says(sizes):
    """6 for each multiplying parameter and token; 2 more for layers computed again, their last product not."""
    c = small_config(
        model__remat="full", model__num_heads=8, model__num_kv_heads=8, train__batch_size=64
    )
    c.model.update({"vocab_size": 256, "attention": "reference", "pipeline_microbatches": 4})
    c.mesh.update(dict.fromkeys(MESH_AXES, 1) | sizes)
    mesh = make_mesh(c)
    with jax.set_mesh(mesh):
        counted = matmul_flops(jit_train_step(c, mesh).trace(*abstract_inputs(c, mesh)).jaxpr)
    params = abstract_state(c)[0].params
    tokens = c.train.batch_size * c.data.seq_len
    layers = costs.num_parameters(params["layers"])
    attention_again = (
        16 * c.model.num_heads * c.model.head_dim * c.data.seq_len * c.model.num_layers
    )
    table = 6 * c.model.embed_dim * c.model.vocab_size
    stages = sizes.get("stage", 1)
    bubble = (4 + stages - 1) / 4  # stages compute on nothing while the pipeline fills
    last = 2 * c.model.mlp_dim * c.model.embed_dim * c.model.num_layers
    want = tokens * ((8 * layers - last + attention_again) * bubble + table)
    assert counted == pytest.approx(want, rel=0.02)


def test_a_causal_kernel_skips_what_no_query_sees():
    assert run_share((4, 8, 8)) == pytest.approx(36 / 64)
    assert run_share((4, 3, 8)) == pytest.approx(
        (1 + 2 + 3 * 6) / 24
    )  # windows: at most three blocks a row
    q = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.float32)
    mask = mask_of(1024, 1024, None, None, None, None, window=1024, causal=True)
    f = partial(splash, mask=mask, scale=1.0, softcap=0.0, interpret=True)
    counted = matmul_flops(jax.make_jaxpr(f)(q, q, q).jaxpr, only="kernels")
    assert counted == 2 * 2 * 2 * 1024**2 * 128  # one block: nothing to skip


@pytest.mark.parametrize(
    ("window", "softcap", "kv_heads"), [(256, 0.0, 4), (100, 0.0, 2), (256, 20.0, 1)]
)
def test_splash_is_the_reference(window, softcap, kv_heads):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, 256, n, 128)), jnp.float32) for n in (4, kv_heads, kv_heads)
    )
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, 256)), axis=1), jnp.int32)
    options = {"window": window, "softcap": softcap}
    mask = mask_of(256, 256, segments, segments, None, None, window=window, causal=True)
    want = jax.value_and_grad(
        lambda q, k, v: jnp.sum(
            jnp.sin(attention(q, k, v, segments, segments, implementation="reference", **options))
        ),
        argnums=(0, 1, 2),
    )(q, k, v)
    got = jax.value_and_grad(
        lambda q, k, v: jnp.sum(
            jnp.sin(splash(q, k, v, mask, scale=128**-0.5, softcap=softcap, interpret=True))
        ),
        argnums=(0, 1, 2),
    )(q, k, v)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3), got, want)


def test_products_of_8_bits_are_told_apart():
    x = jnp.ones((4, 8), jnp.float8_e4m3fn)
    w = jnp.ones((8, 16), jnp.float8_e4m3fn)

    def f(x, w):
        return (
            jnp.dot(x, w, preferred_element_type=jnp.float32).sum()
            + (x.astype(jnp.float32) @ jnp.ones((8, 3))).sum()
        )

    counted = {}
    for only in ("", "8 bits", "kernels"):
        counted[only] = matmul_flops(jax.make_jaxpr(f)(x, w).jaxpr, only=only)
    assert counted == {"": 2 * 4 * 8 * 19, "8 bits": 2 * 4 * 8 * 16, "kernels": 0}


def test_the_traffic_of_a_gpus_program_leaves_out_products_and_multiplies_loops_out():
    text = """
%put (p: f32[10,256], q: f32[256]) -> f32[10,256] {
  ROOT %u = f32[10,256]{1,0} dynamic-update-slice(%p, %q)
}
%take (p: f32[10,256]) -> f32[256] {
  ROOT %s = f32[256]{0} dynamic-slice(%p)
}
%body (t: (f32[10,256], s32[])) -> (f32[10,256], s32[]) {
  %a = f32[10,256]{1,0} get-tuple-element(%t), index=0
  %b = f32[256]{0} fusion(%a), kind=kLoop, calls=%take
  %c = f32[10,256]{1,0} fusion(%a, %b), kind=kLoop, calls=%put
}
ENTRY %main (x: bf16[64,64], y: bf16[64,64]) -> bf16[64,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  %y = bf16[64,64]{1,0} parameter(1)
  %d = (bf16[64,64]{1,0}, s8[4194304]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul"
  %e = bf16[64,64]{1,0} get-tuple-element(%d), index=0
  %f = f32[64,64]{1,0} fusion(%e, %x), kind=kLoop, calls=%take2
  %g = f32[64,64]{1,0} fusion(%f), kind=kCustom, calls=%gemm
  %w = (f32[10,256], s32[]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"10"}}
}
"""
    once = 2 * 4 * 256 + 4 * 256  # twice the slice is allowed for what is read of it
    assert traffic(text) == 64 * 64 * (2 + 2 + 4) + 10 * (once + 2 * 4 * 256)


def test_what_gpus_are_told_is_known_to_this_jaxlib():
    options = {}
    for name, (value, _) in chips.GPU_OPTIONS.items():
        options[name] = value
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_a_gpu_is_reckoned_by_its_products_and_its_traffic():
    """One H100, 26 November 2026: GPT-2 124M, 32 rows of 1,024 in bfloat16, 64.46 ms; 1.3B, 8 of 2,048, 253.95 ms."""
    pod = topology.Topology("h100", "h100", (1, 1), 1, jax.devices()[:1], False)
    mesh = mesh_of(1)
    for flops, bytes, measured in (
        (2.646e13, 5.753e10, 64.46e-3),
        (1.404e14, 1.2165e11, 253.95e-3),
    ):
        times = predict.step_times(Program([], 0.0, bytes), flops, 0.0, mesh, pod)
        assert times.expected == pytest.approx(measured, rel=0.025)
    unknown = predict.step_times(Program([], 0.0), 1.404e14, 0.0, mesh, pod)
    assert unknown.low < unknown.work == pytest.approx(1.404e14 / (predict.GPU_WORK * 989e12))
    assert pod.memory < 0.93 * pod.spec.memory  # what XLA takes of it


# ---------------------------------------------------------------- collectives


@pytest.mark.parametrize("text, groups", [
    ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
    ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
])  # fmt: skip
def test_every_way_of_writing_groups_is_read(text, groups):
    assert groups_of(text) == groups


def test_groups_are_told_by_their_mesh_axes():
    mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
    table = axes_of_groups(dict(mesh.shape))
    assert table[frozenset(map(frozenset, [[0, 1], [2, 3], [4, 5], [6, 7]]))] == ("tensor",)
    assert table[frozenset(map(frozenset, [[0, 2, 4, 6], [1, 3, 5, 7]]))] == ("data", "fsdp")


def test_what_one_tpu_slice_sends_to_another_is_told_apart():
    """In the form in which the TPU compiler writes it: a program for each slice, and transfers by the host."""
    text = """ENTRY %main (p: f32[8]) -> f32[8] {
  %gathered = f32[4,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %send = (f32[16,8]{1,0}, u32[], token[]) send(%x, %t), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}"""
    inner, outer = count(text, mesh_of(8, data=2, fsdp=4), 2, "data").collectives
    assert inner[:5] == ("all-gather", ("fsdp",), 128, 4, 1)
    assert inner.inside
    assert outer[:5] == ("all-reduce", ("data",), 512, 2, 1)
    assert not outer.inside


def test_a_collective_spread_over_fusions_is_one():
    """As the TPU compiler puts a gather beside products: a start, middles and an end, each with the instruction."""
    gather = "%g = f32[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}"
    fusion = "= f32[4,8]{1,0} fusion(%p), kind=kCustom, calls=%"
    bodies = []
    for name in ("start", "end"):
        bodies.append(f"%{name} (p: f32[8]) -> f32[8] {{\n  {gather}\n}}\n")
    body = f"%body (p: f32[8]) -> f32[8] {{\n  %a {fusion}start\n  %b {fusion}end\n}}\n"
    loop = '%w = f32[8]{0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    text = (
        "".join(bodies)
        + body
        + f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  {loop}\n  %a {fusion}start\n}}"
    )
    found = count(text, mesh_of(8, data=2, fsdp=4)).collectives
    assert [(one.axes, one.bytes, one.times, one.overlapped) for one in found] == [
        (("fsdp",), 128, 5, True), (("fsdp",), 128, 1, False),
    ]  # fmt: skip


def compiled(c, mesh):
    with jax.set_mesh(mesh):
        return jit_train_step(c, mesh).lower(*abstract_inputs(c, mesh)).compile()


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"tensor": 8}, {"fsdp": 2, "sequence": 4}]
)
def test_little_more_is_sent_than_must_be(sizes):
    """Layers gathered twice, gradients summed once: within 10% of the least; a ring has one turn more."""
    c = small_config(
        model__num_layers=4, model__vocab_size=64, train__batch_size=64, data__seq_len=128
    )
    c.model.update({"num_heads": 8, "num_kv_heads": 8})
    c.mesh.update(dict.fromkeys(MESH_AXES, 1) | sizes)
    mesh = make_mesh(c)
    sent = Counter()
    for one in count(compiled(c, mesh).as_text(), mesh).collectives:
        sent[MOVES.get(one.kind), one.axes] += one.bytes * one.times
    least = costs.least_traffic(c, mesh)
    parameters = 4 * costs.num_parameters(abstract_state(c)[0].params)
    if sizes == {"fsdp": 8}:
        assert least["sum", ("fsdp",)] == pytest.approx(parameters, rel=0.02)
        assert (
            least["gather", ("fsdp",)]
            == 2 * least["sum", ("fsdp",)] - 4 * c.model.vocab_size * c.model.embed_dim
        )
    for (what, axes), number in least.items():
        more = {"tensor": 1.7, "sequence": 1.1 if what != "permute" else 1.5}.get(axes[-1], 1.1)
        assert 0.9 * number < sent[what, axes] < more * number, (
            what,
            axes,
            sent[what, axes] / number,
        )


def test_what_is_sent_takes_longer_over_a_slower_network():
    pod = topology.Topology("h100:2x1x4", "h100", (1, 4), 2, jax.devices(), True)
    mesh = mesh_of(8, data=2, fsdp=4)
    assert predict.network_of(("data",), mesh, pod).name == "DCN"
    assert predict.network_of(("fsdp",), mesh, pod).name == "NVLink"
    one = Collective("all-gather", ("fsdp",), 4_000_000, 4, 10, False)
    slow = predict.Network("DCN", 1e9, 1e9)
    assert predict.seconds(one, slow) == pytest.approx(10 * 3e6 / 1e9)
    assert predict.seconds(one._replace(kind="all-reduce"), slow) == pytest.approx(20 * 3e6 / 1e9)
    busy = predict.step_times(Program([one], 0.0), 1e15, 0.0, mesh, pod)
    assert busy.low == pytest.approx(
        (1 - predict.ERROR) * busy.work
    )  # all of it fits beside the work
    assert busy.low < busy.expected < busy.high


@pytest.mark.parametrize(("sizes", "networks"), [
    ({"fsdp": 2, "tensor": 4}, {("tensor",): "NVLink", ("fsdp",): "DCN", ("fsdp", "tensor"): "DCN"}),
    ({"fsdp": 4, "tensor": 2}, {("tensor",): "NVLink", ("fsdp",): "DCN", ("fsdp", "tensor"): "DCN"}),
    ({"fsdp": 8}, {("fsdp",): "DCN"}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    "shape", [(1, 2, 4), (2, 1, 4)]
)  # hosts of one slice, or slices of one host
def test_gpus_of_one_host_and_of_several_are_told_apart(sizes, networks, shape):
    """By the groups of a compiled program's text, for two hosts of four GPUs."""
    slices, *of_one = shape
    pod = topology.Topology("h100", "h100", tuple(of_one), slices, jax.devices(), True)
    mesh = mesh_of(8, **sizes)
    order = np.arange(8).reshape(sizes.get("fsdp", 1), sizes.get("tensor", 1))
    groups = {("tensor",): order, ("fsdp",): order.T, ("fsdp", "tensor"): order.reshape(1, 8)}

    def write(rows):
        return "{" + ",".join("{" + ",".join(map(str, row)) + "}" for row in rows.tolist()) + "}"

    lines = []
    for i, axes in enumerate(networks):
        lines.append(
            f"  %g.{i} = f32[8,8]{{1,0}} all-gather(%p), replica_groups={write(groups[axes])}, dimensions={{0}}"
        )
    found = count("\n".join(["ENTRY %main (p: f32[8]) -> f32[8] {", *lines, "}"]), mesh).collectives
    assert {one.axes: predict.network_of(one.axes, mesh, pod).name for one in found} == networks


def test_rings_through_hosts_use_the_adapters_of_all_their_gpus():
    pod = topology.Topology("h100:1x2x4", "h100", (2, 4), 1, jax.devices(), True)
    mesh = mesh_of(8, fsdp=4, tensor=2)
    adapter = chips.CHIPS["h100"].network
    assert predict.network_of(("fsdp",), mesh, pod) == (
        "DCN",
        adapter,
        2 * adapter,
    )  # two of four on each host
    assert predict.network_of(("fsdp", "tensor"), mesh, pod) == ("DCN", adapter, 4 * adapter)
    one = Collective("all-gather", ("fsdp", "tensor"), 8_000_000, 8, 1, False)
    network = predict.network_of(one.axes, mesh, pod)
    assert predict.seconds(one, network) == pytest.approx(7e6 / (4 * adapter))
    assert predict.seconds(one._replace(kind="all-to-all"), network) == pytest.approx(
        7e6 / adapter
    )  # not a ring


# ---------------------------------------------------------------- topologies


@pytest.mark.parametrize("text, chip, shape", [
    ("v5p:4x4x4", "v5p", (4, 4, 4)), ("v5p-128", "v5p", (4, 4, 4)), ("v5e-256", "v5e", (16, 16)),
    ("h100:8", "h100", (1, 1, 8)), ("h100:64", "h100", (1, 8, 8)), ("h100:2x16x8", "h100", (2, 16, 8)),
    ("v5litepod-16", "v5e", (4, 4)),
])  # fmt: skip
def test_a_topology_is_read(text, chip, shape):
    assert topology.parse(text) == (chip, shape)


@pytest.mark.parametrize("text, hint", [
    ("v5q:4x4x4", "did you mean"), ("v5p:4x4", "3 dimensions"), ("v5p-100", "one of"), ("v5e:", "give a shape"),
    ("h100:1x2x3x4", "slices x hosts x GPUs"), ("h100:12", "a host has 8"), ("h100:1x2x16", "a host has 8"),
])  # fmt: skip
def test_a_topology_that_is_none_is_told(text, hint):
    with pytest.raises(ConfigError, match=hint):
        topology.parse(text)


def test_chips_are_known_by_what_jax_calls_them():
    assert chips.find_chip("TPU v5 lite") == "v5e"
    assert chips.find_chip("TPU v5") == "v5p"
    assert chips.find_chip("NVIDIA H100 80GB HBM3") == "h100"
    assert chips.find_chip("cpu") is None
    assert chips.peak_flops("NVIDIA H100 PCIe") == 756e12


# ---------------------------------------------------------------- the program

SMALL = ["--config=configs/llama.py:1b"] + [f"--config.{key}" for key in (
    "model.num_layers=2", "model.embed_dim=512", "model.mlp_dim=1024", "model.num_heads=4", "model.num_kv_heads=4",
    "model.vocab_size=4096", "data.seq_len=512", "train.batch_size=8",
)]  # fmt: skip


def plan(tmp_path, *flags, check=True):
    run = program("jaxlm.plan", *SMALL, f"--json={tmp_path / 'plan.json'}", *flags, check=check)
    return run, json.loads((tmp_path / "plan.json").read_text()) if (
        tmp_path / "plan.json"
    ).exists() else {}


def test_a_tpu_step_is_compiled_by_its_own_compiler(tmp_path):
    pytest.importorskip("libtpu")
    run, found = plan(
        tmp_path,
        "--topology=v5e:2x2",
        f"--save_hlo={tmp_path / 'a.hlo'}",
        "--price_per_chip_hour=1.2",
    )
    assert found["fits"]
    assert not found["estimate"]
    assert found["cycles"] > 0
    assert "tpu_custom_call" in (tmp_path / "a.hlo").read_text()  # splash
    parameters = 4096 * 512 + 512 + 2 * (2 * 512 + 4 * 512 * 512 + 3 * 512 * 1024)
    whole = 4 * 5 * 512  # norms
    assert found["memory"]["parameters"] == (4 * parameters - whole) // 4 + whole
    assert found["memory"]["optimizer"] == 2 * found["memory"]["parameters"] + 8
    assert found["time"]["low"] <= found["time"]["step"] <= found["time"]["high"]
    assert 0 < found["mfu"] < 1
    assert found["cost"] == pytest.approx(found["days"] * 24 * 4 * 1.2)
    assert {row["network"] for row in found["collectives"]} == {"ICI"}
    assert "fits: needs" in run.stdout


@pytest.mark.parametrize("flags, kernel", [
    (["--config.model.layers=SL"], "mosaic_gpu"),  # packed documents and windows: tokamax
    (["--config.data.isolate=False"], "__cudnn$fmha"),
], ids=["packed", "plain"])  # fmt: skip
def test_attention_on_hopper_gpus_is_a_library_kernel(tmp_path, flags, kernel):
    pytest.importorskip("jax_cuda13_plugin")
    if kernel == "mosaic_gpu":
        pytest.importorskip("tokamax")
    hlo = tmp_path / "a.hlo"
    _, found = plan(
        tmp_path, "--topology=h100:1x1x8", f"--save_hlo={hlo}", "--config.model.remat=full", *flags
    )
    targets = []
    for line in hlo.read_text().splitlines():
        if f'custom_call_target="{kernel}' in line:
            targets.append(line)
    assert found["fits"]
    assert not found["estimate"]
    assert targets
    assert "512,512]" not in "".join(targets)
    assert found["flops"]["executed"] > found["flops"]["model"]  # the kernels' products are counted


@pytest.mark.slow
def test_experts_on_a_tpu_are_computed_by_its_kernels(tmp_path):
    """Forward, again and backward, each product by grouped rows: no more FLOPs than each token's own experts'."""
    pytest.importorskip("libtpu")
    flags = "model.num_layers=2 data.seq_len=256 model.vocab_size=4096 train.batch_size=16".split()
    run = program(
        "jaxlm.plan", "--config=configs/mixtral.py:small", *(f"--config.{flag}" for flag in flags),
        "--topology=v5p:2x2x1", f"--json={tmp_path / 'plan.json'}", f"--save_hlo={tmp_path / 'a.hlo'}",
    )  # fmt: skip
    found = json.loads((tmp_path / "plan.json").read_text())
    text = (tmp_path / "a.hlo").read_text()
    assert found["fits"] and "jit(gmm)" in text and "jit(tgmm)" in text, run.stdout
    assert found["flops"]["executed"] < 1.4 * found["flops"]["model"]


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_refused_with_what_it_needs(tmp_path):
    pytest.importorskip("libtpu")
    run, found = plan(
        tmp_path, "--topology=v5e:2x2", "--config.train.batch_size=65536", check=False
    )
    assert run.returncode == 1 and not found["fits"] and "doesn't fit: needs" in run.stdout, (
        run.stderr
    )
    assert found["memory"]["needed"] > found["memory"]["available"]
    assert "Traceback" not in run.stderr
    assert sum(row["fits"] for row in found["remedies"]) == 2


def test_without_a_compiler_it_is_an_estimate_and_says_so(tmp_path):
    run, found = plan(tmp_path, "--topology=a100:2x1x4")
    assert found["estimate"]
    assert "AN ESTIMATE" in run.stdout
    assert found["devices"] == 8
    networks = set()
    for row in found["collectives"]:
        networks.add((tuple(row["axes"]), row["network"]))
    assert {network for axes, network in networks if axes == ("fsdp",)} == {"NVLink"}
    between_hosts = set()
    for axes, network in networks:
        if network == "DCN":
            between_hosts.add(axes)
    assert between_hosts
    assert between_hosts <= {("data",), ("data", "fsdp")}


def test_on_the_devices_here_a_prediction_stands_beside_what_is_measured(tmp_path):
    """A CPU has no data sheet: its memory is predicted, its time only measured."""
    run, found = plan(
        tmp_path, "--topology=local", "--config.model.dtype=float32", "--config.data.seq_len=128"
    )
    assert found["devices"] == 1
    assert found["fits"]
    assert "time" not in found
    measured = found["measured"]
    assert measured["step"] > 0
    assert measured["step_error"] is None
    assert measured["steps"] == 10
    if measured["memory"]:  # 0.1 GiB or so of the process is not the step's
        assert (
            found["memory"]["needed"]
            < 1.2 * measured["memory"]
            < 1.2 * (1.2 * found["memory"]["needed"] + 2**28)
        )
        assert measured["memory_error"] == pytest.approx(
            found["memory"]["needed"] / measured["memory"] - 1
        )
    assert (
        "the mean of 10 after 3 to warm up; not predicted: there is no data sheet of cpu"
        in run.stdout
    )


def test_what_is_measured_is_told_with_its_error():
    pod = topology.Topology("local", "h100", (1, 8), 1, jax.devices(), False)
    times = predict.Times(0.5, 0.8, {}, 0.1, 0.8, 1.0)
    c = small_config()
    memory = {"needed": 3 * 2**30, "available": 80 * 2**30}
    made = Plan(
        c,
        pod,
        memory,
        {"model": 1e15, "executed": 1e15, "recomputed": 0.0},
        Program([], 0.0),
        times,
        1.0,
        None,
    )
    found = figures(made, measured=Measured(1.0, 4 * 2**30))
    assert found["measured"]["step_error"] == pytest.approx(-0.1)
    assert found["measured"]["memory_error"] == -0.25
    text = page(made, found)
    assert "measured    1 s a step" in text
    assert "predicted 0.9 s: error -10.0%" in text
    assert "memory 4.00 GiB at its peak; predicted 3.00 GiB: error -25.0%" in text


@pytest.mark.parametrize("flags, hint", [
    ("--topology=v5p:4x4", "3 dimensions"),
    ("--topology=a100:8 --slices=2 --config.mesh.slices=4", "--slices give 2"),
    ("--topology=a100:8 --config.model.vocab_size=0", "set config.model.vocab_size"),
    ("--topology=a100:8 --config.task.name=classify --config.model.name=encoder", "set config.model.num_labels"),
    ("--topology=a100:8 --json=tests", "give a file"),
])  # fmt: skip
def test_what_cannot_be_planned_is_one_message(flags, hint):
    run = refused("jaxlm.plan", *SMALL, *flags.split())
    assert run.returncode == 2
    assert hint in run.stderr
    assert "Traceback" not in run.stderr


def test_a_slice_of_one_chip_and_one_whose_cores_are_counted():
    pytest.importorskip("libtpu")
    code = "from jaxlm.plan import topology as t; t.prepare_environment(1); print(len(t.describe('v6e-1').devices))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"
    assert (
        "counts the cores" in program("jaxlm.plan", *SMALL, "--topology=v4-8", check=False).stderr
    )
