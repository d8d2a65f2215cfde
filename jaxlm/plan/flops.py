"""FLOPs of a traced step: what is multiplied, recomputation and kernels included, the same on every backend."""

import math
from collections.abc import Iterator

CUDNN = "dot_product_attention_"  # how the names of cuDNN's attention begin
KERNELS = ("pallas_call", "mpmd_map")


def matmul_flops(jaxpr, attended: float = 1.0, only: str = "") -> float:
    """Of all matrix products of a jaxpr, on all devices; a multiplication and an addition are two.

    attended: part of attention's blocks that are not skipped (a `cond` of which one branch does nothing).
    only: "kernels": of Pallas kernels alone; "8 bits": of products of factors of 8 bits.
    """
    return sum(equation_flops(eqn, attended, only) for eqn in jaxpr.eqns)


def equation_flops(eqn, attended: float, only: str) -> float:
    """Of one equation of a jaxpr, with all that it calls."""
    name = eqn.primitive.name
    is_kernel = name in KERNELS or name.startswith(CUDNN)
    if name == "dot_general":
        return product_flops(eqn, only)
    if is_kernel and only == "8 bits":
        return 0.0
    if name == "pallas_call":
        return kernel_flops(eqn.params)
    if name == "mpmd_map":
        return gpu_attention_flops(eqn)
    if is_kernel:
        return cudnn_attention_flops(eqn)
    if name == "cond":
        branches = [matmul_flops(b.jaxpr, attended, only) for b in eqn.params["branches"]]
        return max(branches) * (attended if min(branches) == 0 else 1)
    times = 1
    if name == "scan":
        times = eqn.params["length"]
    elif name == "shard_map":
        times = eqn.params["mesh"].size
    return times * sum(matmul_flops(inner, attended, only) for inner in inner_jaxprs(eqn.params))


def product_flops(eqn, only: str) -> float:
    """Of a dot_general outside of kernels."""
    is_narrow = all(x.aval.dtype.itemsize == 1 for x in eqn.invars)
    if only == "kernels" or (only == "8 bits" and not is_narrow):
        return 0.0
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    inner = math.prod(shape[i] for i in contracted)
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * inner


def cudnn_attention_flops(eqn) -> float:
    """Causal, half is skipped: two products forward; backward five, two of them again."""
    B, T, N, H = eqn.invars[0].aval.shape
    S = eqn.invars[1].aval.shape[1]
    products = 5 if "bwd" in eqn.primitive.name else 2
    return 2.0 * products * B * T * S * N * H / 2


def gpu_attention_flops(eqn) -> float:
    """Attention in Pallas on GPUs, causal: two products forward; backward three for dq, four for dk and dv."""
    query = eqn.invars[0].aval.shape
    *B, T, N, H = query
    S = eqn.invars[1].aval.shape[-3]
    is_backward = eqn.invars[3].aval.shape == query  # gradients come in after q, k and v
    products = 2 + len(eqn.outvars) * is_backward
    return 2.0 * products * math.prod(B) * T * S * N * H / 2


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
    """The jaxprs among the parameters of an equation."""
    for value in params.values():
        items = value if isinstance(value, (tuple, list)) else (value,)
        for item in items:
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner
