"""FLOPs of a traced step: what is multiplied, recomputation and kernels included, the same on every backend."""

import math
from collections.abc import Iterator


def matmul_flops(jaxpr, visited: float = 1.0, only: str = "") -> float:
    """Of all matrix products of a jaxpr, on all devices; a multiplication and an addition are two.

    visited: part of the blocks of attention by blocks that are not skipped (a `cond` of which one branch does nothing).
    only: "kernels": of Pallas kernels alone; "8 bits": of products of factors of 8 bits.
    """
    total = 0.0

    def inside(inner):
        return matmul_flops(inner, visited, only)

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        p = eqn.params
        if name == "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            narrow = all(x.aval.dtype.itemsize == 1 for x in eqn.invars)
            if only == "kernels" or (only == "8 bits" and not narrow):
                continue
            total += (
                2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
            )
        elif only == "8 bits" and (
            name in ("pallas_call", "mpmd_map") or name.startswith("dot_product_attention_")
        ):
            continue
        elif name == "pallas_call":
            total += kernel_flops(p)
        elif name.startswith(
            "dot_product_attention_"
        ):  # cuDNN; forward 2 products, backward 5 (two of them again)
            (B, T, N, H), S = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
            total += (
                2.0 * (5 if "bwd" in name else 2) * B * T * S * N * H / 2
            )  # causal: half is skipped
        elif (
            name == "mpmd_map"
        ):  # attention in Pallas on GPUs: 2 products forward; dq 3; dk and dv 4
            (*B, T, N, H), S = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[-3]
            backward = (
                eqn.invars[3].aval.shape == eqn.invars[0].aval.shape
            )  # gradients come in after q, k and v
            total += 2.0 * (2 + len(eqn.outvars) * backward) * math.prod(B) * T * S * N * H / 2
        elif name == "cond":
            costs = [inside(branch.jaxpr) for branch in p["branches"]]
            total += max(costs) * (visited if min(costs) == 0 else 1)
        else:
            if name == "scan":
                times = p["length"]
            else:
                times = p["mesh"].size if name == "shard_map" else 1
            total += times * sum(map(inside, inner_jaxprs(p)))
    return total


def kernel_flops(params: dict) -> float:
    """Of a Pallas kernel: by its grid, or what it says of itself where the grid's size depends on the data."""
    grid = params["grid_mapping"].grid
    if not all(isinstance(n, int) for n in grid):
        return float(params["cost_estimate"].flops)
    return math.prod(grid) * run_share(grid) * matmul_flops(params["jaxpr"])


def run_share(grid: tuple[int, ...]) -> float:
    """Part of a causal attention kernel's grid [heads, i, j] whose blocks are computed; its rows may be windows."""
    if len(grid) < 3:
        return 1.0
    J, n = sorted(grid[-2:])
    return (n - (J - 1) / 2) / n


def inner_jaxprs(params: dict) -> Iterator:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner
