"""What a run costs, by arithmetic: parameters, FLOPs, bytes per device. Nothing here touches a device."""

import itertools
import math
import re
from collections import defaultdict

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.config.keys import ATTENDING, COUNTED, MESH_AXES
from jaxlm.config.recipe import pipeline_microbatches
from jaxlm.config.tasks import task_of
from jaxlm.kernels.attention import choose
from jaxlm.parallel.mesh import (
    RULES,
    abstract_mesh,
    axes_in,
    batch_shards,
    names_of,
    sizes_text,
)
from jaxlm.parallel.pipeline_parallel import bubble_fraction
from jaxlm.step.patterns import name_of, partition
from jaxlm.step.state import abstract_state, state_shardings

# ---------------------------------------------------------------- parameters and FLOPs


def num_parameters(params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def embedding_parameters(params) -> int:
    """Of the tables that are looked up: positions, n-grams, and token embeddings where they do not give the output."""
    looked_up = {"positions", "ngrams"}
    if "unembed" in params or "head" in params:
        looked_up.add("tokens")
    tables = [table for name, table in params["embed"].items() if name in looked_up]
    return num_parameters(tables)


def active_parameters(config: ConfigDict, params) -> int:
    """Those that a token meets: of a mixture of experts, experts_per_token of the experts."""
    m = config.model
    experts = []
    for path, leaf in jax.tree.leaves_with_path(params):
        if "experts" in jax.tree_util.keystr(path):
            experts.append(leaf)
    if not experts:
        return num_parameters(params)
    one_expert = num_parameters(experts) // m.num_experts
    return num_parameters(params) - one_expert * (m.num_experts - m.experts_per_token)


def reach(config: ConfigDict) -> dict[str, int]:
    """The tokens that one sees at most in a row, itself included, by the letter of its layer in model.layers."""
    m = config.model
    T = config.data.seq_len
    long = min(m.context_length, T)
    return {"S": min(m.window, long), "L": long}


def flops_per_token(config: ConfigDict, params) -> int:
    """Of one training step, model FLOPs without recomputation, as PaLM counts them (Chowdhery et al. 2022, appendix B).

    6 for each parameter that multiplies, and 12 N H T a layer for attention, T being at most the layer's window (the
    half that the causal mask leaves out is counted, as the field does). An encoder-decoder's is of a target
    and a source token, one in each stack. What is counted, not trained, has none.
    """
    m = config.model
    if m.name in COUNTED:
        return 0
    if m.name == "vectors" and (config.task.negatives or task_of(config).loss == "glove"):
        return 6 * m.embed_dim * (1 + config.task.negatives)  # a product with each context
    flops = 6 * (active_parameters(config, params) - embedding_parameters(params))
    if m.name in ATTENDING:
        seen = reach(config)
        pattern = itertools.cycle(m.layers)
        for kind in itertools.islice(pattern, m.num_layers):
            flops += 12 * m.num_heads * m.head_dim * seen[kind]
    return flops


# ---------------------------------------------------------------- bytes


def itemsize(dtype) -> int:
    """Bytes of one number."""
    return np.dtype(dtype).itemsize


def bytes_per_device(abstract, shardings) -> int:
    """Of one device's shards of a tree."""

    def size(x, sharding):
        shard = sharding.shard_shape(x.shape)
        return math.prod(shard) * itemsize(x.dtype)

    sizes = jax.tree.map(size, abstract, shardings)
    return sum(jax.tree.leaves(sizes))


def human(num_bytes: float) -> str:
    """'1.50 GiB'."""
    if num_bytes < 1024:
        return f"{num_bytes:,.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        if num_bytes < 1024:
            return f"{num_bytes:,.2f} {unit}"
    return f"{num_bytes / 1024:,.2f} TiB"


# What is moved, over which mesh axes -> bytes on a device.
Traffic = dict[tuple[str, tuple[str, ...]], int]


def least_traffic(config: ConfigDict, mesh) -> Traffic:
    """{(gather, sum or permute; mesh axes): bytes on a device} that a step of this strategy moves at least.

    Counted as what a gather gives, a sum takes in, a permutation sends, in the compute dtype. Looked-up tables, norms,
    recomputation and experts' tokens are not in it.
    """
    traffic = weight_traffic(config, mesh) | activation_traffic(config, mesh)
    return {key: number for key, number in traffic.items() if number}


def weight_traffic(config: ConfigDict, mesh) -> Traffic:
    """Of matrices and their gradients.

    Every matrix is gathered for the forward and for the backward pass of a microbatch (the output table once for both),
    and its gradient summed: over what it is sharded by in each microbatch (Rajbhandari et al. 2020), over its copies
    once.
    """
    m = config.model
    traffic = defaultdict(int)
    tokens = {*RULES["batch"], *RULES["length"]}
    for path, leaf, axes, place in matrices(config, mesh):
        entries = dict(zip(axes, place.spec))
        embed = entries.get("embed", entries.get("expert_embed"))
        gathered = split_over(names_of(embed), mesh)
        copies = split_over(tokens - set(axes_in(place.spec)), mesh)
        mine = itemsize(m.dtype) * math.prod(place.shard_shape(leaf.shape))
        parts = math.prod(mesh.shape[name] for name in gathered)
        whole = config.train.grad_accumulation * mine * parts
        passes = 1
        if path[0].key == "layers":
            passes = 2
        if gathered:
            traffic["gather", gathered] += passes * whole
            traffic["sum", gathered] += whole
        if copies:
            traffic["sum", copies] += mine
    return traffic


def matrices(config: ConfigDict, mesh):
    """(path, shape, logical axes, sharding) of each parameter that multiplies: no norm, no bias, no looked-up table."""
    state, axes = abstract_state(config)
    places = state_shardings(config, mesh)
    leaves = jax.tree.leaves_with_path(state.params)
    names = jax.tree.leaves(axes.params)
    shardings = jax.tree.leaves(places.params)
    for (path, leaf), logical, place in zip(leaves, names, shardings):
        looked_up = "unembed" in state.params and path[0].key == "embed"
        if not looked_up and {"embed", "expert_embed"} & set(logical):
            yield path, leaf, logical, place


def split_over(names, mesh) -> tuple[str, ...]:
    """Those of the mesh axes that have several devices, in the mesh's order."""
    return tuple(name for name in MESH_AXES if name in names and mesh.shape[name] > 1)


def activation_traffic(config: ConfigDict, mesh) -> Traffic:
    """Of activations, over the tensor and the sequence axis.

    Tensor parallelism gathers and sums a layer's activations twice in each pass (Korthikanti et al. 2022); a ring
    passes on keys and values, and then their gradients too (Liu et al. 2023).
    """
    m = config.model
    tensor = mesh.shape["tensor"]
    sequence = mesh.shape["sequence"]
    tokens = config.train.batch_size * config.data.seq_len
    here = itemsize(m.dtype) * tokens // (batch_shards(mesh) * sequence)
    traffic = {}
    if tensor > 1:
        residual = 4 * here * m.embed_dim * m.num_layers
        traffic["gather", ("tensor",)] = residual
        traffic["sum", ("tensor",)] = residual
    if sequence > 1:
        heads = max(m.num_kv_heads // tensor, 1)
        keys = here * heads * m.head_dim * m.num_layers
        traffic["permute", ("sequence",)] = 6 * (sequence - 1) * keys
    return traffic


# ---------------------------------------------------------------- the page of --dry_run

Lines = list[tuple[str, str]]  # name, text


def describe(config: ConfigDict, num_devices: int, train_tokens: int | None) -> str:
    """The page that `train --dry_run` prints. config: resolved. train_tokens: in the training data, if known."""
    state, _ = abstract_state(config)
    mesh = abstract_mesh(config, num_devices)
    places = state_shardings(config, mesh)
    lines = work_lines(config, state.params)
    lines += mesh_lines(config, mesh)
    lines += memory_lines(config, state, places)
    lines += data_lines(config, train_tokens)
    page = "\n".join(f"{name:18} {text}" for name, text in lines)
    return f"{page}\n\n{sharding_table(state.params, places.params)}"


def run_tokens(config: ConfigDict) -> int:
    """Tokens of all steps, padding included."""
    return config.train.batch_size * config.data.seq_len * config.train.steps


def work_lines(config: ConfigDict, params) -> Lines:
    """Parameters, FLOPs and tokens."""
    total = num_parameters(params)
    active = active_parameters(config, params)
    embedding = embedding_parameters(params)
    flops = flops_per_token(config, params)
    rows = config.train.batch_size
    T = config.data.seq_len
    tokens = run_tokens(config)
    steps = config.train.steps
    return [
        ("parameters", f"{total:,} (active {active:,}, input embedding {embedding:,})"),
        ("FLOPs per token", f"{flops:,} forward and backward"),
        ("tokens per step", f"{rows * T:,} = {rows:,} rows x {T:,}"),
        ("tokens in all", f"{tokens:,} in {steps:,} steps ({flops * tokens:.3g} FLOPs)"),
    ]


def mesh_lines(config: ConfigDict, mesh) -> Lines:
    """The mesh and its pipeline."""
    if mesh.size == 1:
        return [("mesh", "one device")]
    text = f"{sizes_text(mesh)}, {mesh.size:,} devices"
    return [("mesh", text), *pipeline_lines(config, mesh)]


def memory_lines(config: ConfigDict, state, places) -> Lines:
    """Bytes of the state on a device and in a checkpoint. state, places: its shapes and its shardings."""
    trained, _ = partition(state.params, config)
    trained_places, _ = partition(places.params, config)
    parameters = bytes_per_device(state.params, places.params)
    optimizer = bytes_per_device(state.opt_state, places.opt_state)
    gradients = bytes_per_device(trained, trained_places)
    ema = bytes_per_device(state.ema, places.ema)
    total = parameters + optimizer + gradients + ema
    lines = [
        ("bytes per device", f"{human(total)} besides activations"),
        ("  parameters", human(parameters)),
        ("  optimizer", human(optimizer)),
        ("  gradients", human(gradients)),
    ]
    if config.train.ema:
        lines.append(("  average (EMA)", human(ema)))
    saved = 0
    for leaf in jax.tree.leaves(state):
        saved += math.prod(leaf.shape) * itemsize(leaf.dtype)
    return [*lines, ("checkpoint", human(saved))]


def data_lines(config: ConfigDict, train_tokens: int | None) -> Lines:
    """How often the data is seen."""
    if train_tokens is None:
        return [("data", "not known")]
    if train_tokens == 0:
        return [("data", "there; examples and pairs are not counted in tokens")]
    epochs = run_tokens(config) / train_tokens
    return [("data", f"{train_tokens:,} tokens, {epochs:.2f} epochs")]


def pipeline_lines(config: ConfigDict, mesh) -> Lines:
    """Stages, microbatches and bubble of a mesh with stages."""
    stages = mesh.shape["stage"]
    rounds = config.model.pipeline_rounds
    if stages == 1:
        return []
    rows = config.train.batch_size // config.train.grad_accumulation // batch_shards(mesh)
    parts = pipeline_microbatches(config.model, rows, stages)
    bubble = bubble_fraction(stages, parts, rounds)
    text = f"{stages} stages, {parts} microbatches, rounds: {rounds}; {bubble:.1%} of the time is bubble"
    return [("pipeline", text)]


def attention_lines(config: ConfigDict, mesh) -> Lines:
    """Which kernel a device of this mesh takes, for each letter of model.layers; of a target's attention to itself."""
    m = config.model
    ring = mesh.shape["sequence"]
    if m.name not in ATTENDING or not m.num_layers:
        return []
    if ring > 1 and m.context_parallel == "ring":
        return [("attention", f"blockwise, around a ring of {ring}")]
    kernels = {kind: kernel_of(kind, config, mesh) for kind in m.layers}
    names = set(kernels.values())
    if len(names) == 1:
        return [("attention", names.pop())]
    return [("attention", ", ".join(f"{kind}: {name}" for kind, name in kernels.items()))]


def kernel_of(kind: str, config: ConfigDict, mesh) -> str:
    """The attention kernel of layers of one letter of model.layers."""
    m = config.model
    if m.attention != "auto":
        return m.attention
    T = config.data.seq_len
    shards = config.train.grad_accumulation * batch_shards(mesh)
    rows = math.ceil(config.train.batch_size / shards)
    heads = math.ceil(m.num_heads / mesh.shape["tensor"])
    shape = (rows, T, heads, m.head_dim)
    q = jax.ShapeDtypeStruct(shape, np.dtype(m.dtype))
    causal = m.name != "encoder"
    in_order = mesh.shape["sequence"] == 1
    sees_all = reach(config)[kind] == T or not causal
    with jax.set_mesh(mesh):
        return choose(
            q,
            T,
            plain=in_order and not config.data.isolate and sees_all,
            in_order=in_order,
            causal=causal,
            softcap=m.attention_softcap,
        )


# ---------------------------------------------------------------- the table of shardings


def sharding_table(params, shardings) -> str:
    """One line for each parameter, layers that are alike being one: name, shape, sharding, shape on a device."""
    alike = defaultdict(list)  # names of the same parameter in several layers
    leaves = jax.tree.leaves_with_path(params)
    for (path, leaf), place in zip(leaves, jax.tree.leaves(shardings)):
        name = name_of(path)
        kind = re.sub(r"block_\d+", "block_*", name)
        sharding = spec_text(place.spec, leaf.ndim)
        shard = str(place.shard_shape(leaf.shape))
        alike[kind, str(leaf.shape), sharding, shard].append(name)
    rows = [("parameter", "shape", "sharding", "on each device")]
    for (kind, *cells), names in alike.items():
        label = names[0]
        if len(names) > 1:
            label = f"{kind} ({len(names)} x)"
        rows.append((label, *cells))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = map(str.ljust, row, widths)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def spec_text(spec, ndim: int) -> str:
    """'(-, fsdp, data+expert)': the mesh axes of each dimension."""
    words = ["+".join(names_of(entry)) or "-" for entry in spec]
    words += ["-"] * (ndim - len(words))
    return f"({', '.join(words)})"
