"""The outputs of a model's modules, and the first of them that differs between two meshes."""

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.models import build
from jaxlm.parallel.hosts import to_global
from jaxlm.step.forward import arguments, rows_of
from jaxlm.step.state import init_state

ORDER = (  # of the modules within a layer, as the input meets them
    "embed attention_norm attention cross_attention_norm cross_attention mlp_norm mlp final_norm"
).split()
SIDES = ("encoder", "decoder")  # of a model of two stacks
OF_TWO_SIDES = ("encoder_decoder", "lstm_seq2seq")
BEFORE_LAYERS = "embed"
AFTER_LAYERS = "final_norm"


def worst(got: dict, want: dict) -> tuple[float, str]:
    """(largest difference of any tensor, over that tensor's largest entry in `want`, the tensor's name).

    Over at least a thousandth of the largest entry of all: the gradient of a key's bias is nothing but rounding errors.
    """
    wanted = jax.tree.leaves(want)
    least = 1e-3 * max(map(largest, wanted))
    differences = {}
    for (path, a), b in zip(jax.tree.leaves_with_path(got), wanted, strict=True):
        scale = max(largest(b), least)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        differences[name] = largest(a - b) / scale

    def badness(name):
        value = differences[name]
        return (not np.isfinite(value), value)

    name = max(differences, key=badness)
    return differences[name], name


def largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x)))


def is_shown(module, method: str) -> bool:
    return module.name in ORDER and method == "__call__"


def module_outputs(config: ConfigDict, params, batch, mesh) -> list[tuple[str, np.ndarray]]:
    """[(module, its output [B, T, ...])] in the order in which the input meets them."""

    def captured(params, batch):
        inputs, options = arguments(rows_of(batch), config)
        _, state = build(config).apply(
            {"params": params},
            *inputs,
            **options,
            capture_intermediates=is_shown,
            mutable=["intermediates"],
        )
        return state["intermediates"]

    with jax.set_mesh(mesh):
        batch = to_global(batch, mesh, len(batch["tokens"]))
        outputs = jax.device_get(jax.jit(captured)(params, batch))
    places = []
    for path, leaf in jax.tree.leaves_with_path(outputs):
        call, *returned = [key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)]
        is_first = not any(returned)  # of what the module returns
        if is_first and leaf.ndim >= 3:
            keys = [getattr(key, "key", None) for key in path]
            places += placed(config, keys, call, leaf)
    places.sort(key=lambda place: place[0])
    return [(name, output) for _, name, output in places]


def placed(config: ConfigDict, keys: list, call: int, leaf: np.ndarray) -> list[tuple]:
    """[(place in the model, name, output)] of a module, one for each layer where layers are scanned.

    call: how often the module was called before. Two sides may share a table, which is called for the source first.
    """
    module = next(key for key in reversed(keys) if key in ORDER)
    side = SIDES.index(keys[0]) if keys[0] in SIDES else call
    prefix = ""
    if config.model.name in OF_TWO_SIDES:
        prefix = f"{SIDES[side]}/"
    if module == BEFORE_LAYERS:
        return [((side, 0, 0, 0), prefix + module, leaf)]
    if module == AFTER_LAYERS:
        return [((side, 2, 0, 0), prefix + module, leaf)]
    outputs = [leaf]
    if config.model.scan:  # the pattern of layers is repeated, and its outputs are stacked
        outputs = leaf
    places = []
    for i, output in enumerate(outputs):
        layer = i * len(config.model.layers) + block_number(keys)
        place = (side, 1, layer, ORDER.index(module))
        places.append((place, f"{prefix}layer {layer} {module}", output))
    return places


def block_number(keys: list) -> int:
    """Of the module named block_N that holds the module; 0 where none does."""
    for key in keys:
        if str(key).startswith("block_"):
            return int(key.removeprefix("block_"))
    return 0


def first_difference(config: ConfigDict, mesh, one_device, batch) -> str:
    """Where the mesh and one device first differ: in a parameter at the start, or in a module's output."""
    here = init_state(config, mesh).params
    there = init_state(config, one_device).params
    apart, parameter = worst(jax.device_get(there), jax.device_get(here))
    if apart > 1e-6:
        return f"the initial value of {parameter}"
    outputs = module_outputs(config, here, batch, mesh)
    others = module_outputs(config, there, batch, one_device)
    unlike = first_unlike(others, dict(outputs))
    return unlike or "after the last module: the loss, its gradient, or the sum over devices"


def first_unlike(outputs: list, others: dict) -> str | None:
    """The first module whose output differs from the other's. Some (a pipeline's stages) may be missing in `others`."""
    before = "the input"
    known = True
    for name, a in outputs:
        if name not in others:
            known = False
        elif np.allclose(a, others[name], rtol=1e-4, atol=1e-5):
            before = name
            known = True
        elif known:
            return f"the output of {name}"
        else:
            return f"after {before}, at or before {name}"
    return None
