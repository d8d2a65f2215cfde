"""What a run costs, by arithmetic: parameters, FLOPs, bytes per device. Nothing here touches a device."""

import math
import re
from collections import defaultdict

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.config.keys import ATTENDING, COUNTED, MESH_AXES
from jaxlm.config.recipe import pipeline_microbatches
from jaxlm.kernels.attention import choose
from jaxlm.parallel.mesh import RULES, abstract_mesh, batch_shards, names_of
from jaxlm.parallel.pipeline_parallel import bubble_fraction
from jaxlm.step.optim import split
from jaxlm.step.state import abstract_state, state_shardings


def num_parameters(params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def embedding_parameters(params) -> int:
    """Of the tables that are looked up: positions, n-grams, and token embeddings where they do not give the output."""
    embed = params["embed"]
    tables = [embed[name] for name in ("positions", "ngrams") if name in embed]
    return num_parameters(
        tables + ([embed["tokens"]] if "unembed" in params or "head" in params else [])
    )


def active_parameters(config: ConfigDict, params) -> int:
    """Those that a token meets: of a mixture of experts, experts_per_token of the experts."""
    experts = []
    for path, leaf in jax.tree.leaves_with_path(params):
        if "experts" in jax.tree_util.keystr(path):
            experts.append(leaf)
    idle = config.model.num_experts - config.model.experts_per_token
    return num_parameters(params) - (
        num_parameters(experts) // config.model.num_experts * idle if experts else 0
    )


def reach(config: ConfigDict) -> dict[str, int]:
    """The tokens that one sees at most in a row, itself included, by the letter of its layer in model.layers."""
    m = config.model
    T = config.data.seq_len
    return {"S": min(m.window, m.context_length, T), "L": min(m.context_length, T)}


def flops_per_token(config: ConfigDict, params) -> int:
    """Of one training step, model FLOPs without recomputation, as PaLM counts them (Chowdhery et al. 2022, appendix B).

    6 for each parameter that multiplies, and 12 N H T a layer for attention, T being at most the layer's window (the
    half that the causal mask leaves out is counted, as the field does). An encoder-decoder's is of a target
    and a source token, one in each stack. What is counted, not trained, has none.
    """
    m = config.model
    seen = reach(config)
    if m.name in COUNTED:
        return 0
    if m.name == "vectors" and (config.task.negatives or config.task.name == "glove"):
        return 6 * m.embed_dim * (1 + config.task.negatives)  # a product with each context
    attended = sum(seen[m.layers[i % len(m.layers)]] for i in range(m.num_layers))
    multiplying = active_parameters(config, params) - embedding_parameters(params)
    if m.name in ATTENDING:
        attention = 12 * m.num_heads * m.head_dim * attended
    else:
        attention = 0
    return 6 * multiplying + attention


def bytes_per_device(abstract, shardings) -> int:
    """Of one device's shards of a tree."""
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize,
        abstract,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def least_traffic(config: ConfigDict, mesh) -> dict[tuple[str, tuple[str, ...]], int]:
    """{(gather, sum or permute; mesh axes): bytes on a device} that a step of this strategy moves at least.

    Counted as what a gather gives, a sum takes in, a permutation sends, in the compute dtype. Every matrix is gathered
    for the forward and for the backward pass of a microbatch (the output table once for both), and its gradient summed:
    over what it is sharded by in each microbatch (Rajbhandari et al. 2020), over its copies once. Tensor parallelism
    gathers and sums a layer's activations twice in each pass (Korthikanti et al. 2022); a ring passes on keys and
    values, and then their gradients too (Liu et al. 2023). Looked-up tables, norms, recomputation and experts' tokens
    are not in it.
    """
    m, parts, (state, axes) = config.model, config.train.grad_accumulation, abstract_state(config)
    params = state.params
    axes = axes.params
    places = state_shardings(config, mesh).params
    if "unembed" in params:  # the other table is only looked up
        params, axes, places = (
            {k: v for k, v in tree.items() if k != "embed"} for tree in (params, axes, places)
        )
    itemsize = np.dtype(m.dtype).itemsize
    traffic = defaultdict(int)

    def in_order(names):
        return tuple(name for name in MESH_AXES if name in names and mesh.shape[name] > 1)

    tokens = {*RULES["batch"], *RULES["length"]}
    for (path, leaf), logical, place in zip(
        jax.tree.leaves_with_path(params), *map(jax.tree.leaves, (axes, places))
    ):
        rows = []
        for axis, entry in zip(logical, place.spec):
            if axis in ("embed", "expert_embed"):
                rows.append(names_of(entry))
        if not rows:  # a norm, a bias
            continue
        mine = itemsize * math.prod(place.shard_shape(leaf.shape))
        gathered = in_order(rows[0])
        copies = in_order(tokens - {n for entry in place.spec for n in names_of(entry)})
        whole = parts * mine * math.prod(mesh.shape[name] for name in gathered)
        passes = 2 if path[0].key == "layers" else 1
        moved = (
            ("gather", gathered, passes * whole),
            ("sum", gathered, whole),
            ("sum", copies, mine),
        )
        for what, names, number in moved:
            traffic[what, names] += number if names else 0
    n = mesh.shape["tensor"]
    sequence = mesh.shape["sequence"]
    here = (
        itemsize * config.train.batch_size * config.data.seq_len // (batch_shards(mesh) * sequence)
    )
    if n > 1:
        traffic["gather", ("tensor",)] = traffic["sum", ("tensor",)] = (
            4 * here * m.embed_dim * m.num_layers
        )
    if sequence > 1:
        heads = max(m.num_kv_heads // n, 1)
        traffic["permute", ("sequence",)] = (
            6 * (sequence - 1) * here * heads * m.head_dim * m.num_layers
        )
    return {key: number for key, number in traffic.items() if number}


def human(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            if unit == "B":
                return f"{num_bytes:,.0f} {unit}"
            return f"{num_bytes:,.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} TiB"


def describe(config: ConfigDict, num_devices: int, train_tokens: int | None) -> str:
    """The page that `train --dry_run` prints. config: resolved. train_tokens: in the training data, if known."""
    state, _ = abstract_state(config)
    mesh = abstract_mesh(config, num_devices)
    places = state_shardings(config, mesh)
    total = num_parameters(state.params)
    embedding = embedding_parameters(state.params)
    active = active_parameters(config, state.params)
    flops = flops_per_token(config, state.params)
    step_tokens = config.train.batch_size * config.data.seq_len
    run_tokens = step_tokens * config.train.steps
    parameters = bytes_per_device(state.params, places.params)
    ema = bytes_per_device(state.ema, places.ema)
    optimizer = bytes_per_device(state.opt_state, places.opt_state)
    gradients = bytes_per_device(*(split(tree.params, config)[0] for tree in (state, places)))
    saved = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(state))
    axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in MESH_AXES if mesh.shape[axis] > 1)
    lines = [
        ("parameters", f"{total:,} (active {active:,}, input embedding {embedding:,})"),
        ("FLOPs per token", f"{flops:,} forward and backward"),
        (
            "tokens per step",
            f"{step_tokens:,} = {config.train.batch_size:,} rows x {config.data.seq_len:,}",
        ),
        (
            "tokens in all",
            f"{run_tokens:,} in {config.train.steps:,} steps ({flops * run_tokens:.3g} FLOPs)",
        ),
        ("mesh", f"{axes}, {num_devices:,} devices" if num_devices > 1 else "one device"),
        *pipeline_lines(config, mesh),
        (
            "bytes per device",
            f"{human(parameters + optimizer + gradients + ema)} besides activations",
        ),
        ("  parameters", human(parameters)),
        ("  optimizer", human(optimizer)),
        ("  gradients", human(gradients)),
        *([("  average (EMA)", human(ema))] if config.train.ema else []),
        ("checkpoint", human(saved)),
        (
            "data",
            f"{train_tokens:,} tokens, {run_tokens / train_tokens:.2f} epochs"
            if train_tokens
            else "not known",
        ),
    ]
    return (
        "\n".join(f"{name:18} {text}" for name, text in lines)
        + "\n\n"
        + sharding_table(state.params, places.params)
    )


def attention_lines(config: ConfigDict, mesh) -> list[tuple[str, str]]:
    """Which kernel a device of this mesh takes, for each letter of model.layers; of a target's attention to itself."""
    m = config.model
    T = config.data.seq_len
    if m.name not in ATTENDING or not m.num_layers:
        return []
    if mesh.shape["sequence"] > 1 and m.context_parallel == "ring":
        return [("attention", f"blockwise, around a ring of {mesh.shape['sequence']}")]
    rows = -(-config.train.batch_size // config.train.grad_accumulation // batch_shards(mesh))
    q = jax.ShapeDtypeStruct(
        (rows, T, -(-m.num_heads // mesh.shape["tensor"]), m.head_dim), np.dtype(m.dtype)
    )
    causal = m.name != "encoder"
    in_order = mesh.shape["sequence"] == 1
    kernels = {}
    for kind in m.layers:
        plain = in_order and not config.data.isolate and (reach(config)[kind] == T or not causal)
        with jax.set_mesh(mesh):
            auto = choose(
                q, T, plain=plain, in_order=in_order, causal=causal, softcap=m.attention_softcap
            )
        kernels[kind] = auto if m.attention == "auto" else m.attention
    if len(set(kernels.values())) == 1:
        return [("attention", next(iter(kernels.values())))]
    return [("attention", ", ".join(f"{kind}: {name}" for kind, name in kernels.items()))]


def pipeline_lines(config: ConfigDict, mesh) -> list[tuple[str, str]]:
    stages = mesh.shape["stage"]
    rounds = config.model.pipeline_rounds
    if stages == 1:
        return []
    rows = config.train.batch_size // config.train.grad_accumulation // batch_shards(mesh)
    parts = pipeline_microbatches(config.model, rows, stages)
    bubble = bubble_fraction(stages, parts, rounds)
    text = f"{stages} stages, {parts} microbatches, rounds: {rounds}; {bubble:.1%} of the time is bubble"
    return [("pipeline", text)]


def sharding_table(params, shardings) -> str:
    """One line for each parameter, layers that are alike being one: name, shape, sharding, shape on a device."""
    alike = defaultdict(list)  # names of the same parameter in several layers
    for (path, leaf), place in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(shardings)):
        spec = list(place.spec) + [None] * (leaf.ndim - len(place.spec))
        words = ["-" if e is None else "+".join(e) if isinstance(e, tuple) else e for e in spec]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        row = str(leaf.shape), f"({', '.join(words)})", str(place.shard_shape(leaf.shape))
        alike[re.sub(r"block_\d+", "block_*", name), *row].append(name)
    rows = [
        (f"{kind} ({len(names)} x)" if len(names) > 1 else names[0], *row)
        for (kind, *row), names in alike.items()
    ]
    rows.insert(0, ("parameter", "shape", "sharding", "on each device"))
    widths = []
    for i in range(4):
        widths.append(max(len(row[i]) for row in rows))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )
