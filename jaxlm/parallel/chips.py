"""Chips: what each can do, and the options of its compiler.

Figures of one device as jax counts them (a chip; of TPU v4 and v5p both cores together), from the makers' documents.
"""

from typing import NamedTuple

GB = 1e9
GIB = 2**30


class Chip(NamedTuple):
    kinds: tuple[str, ...]  # words of jax's device_kind
    flops: float  # dense bfloat16, a second
    memory: int  # bytes of HBM
    bandwidth: float  # of HBM, bytes a second
    link: float  # of one link (TPU: to a neighbour of the torus) or of all (GPU: NVLink), bytes a second one way
    network: float  # between slices or hosts (DCN), bytes a second one way for each device
    clock: float = 0.0  # Hz; of TPUs, whose compiler estimates cycles
    dims: int = 0  # of a TPU slice's torus
    host: int = 8  # devices of one host


CHIPS = {
    # cloud.google.com/tpu/docs (v4, v5e, v5p, v6e); links and DCN: jax-ml.github.io/scaling-book
    "v4": Chip(("TPU v4",), 275e12, 32 * GIB, 1228 * GB, 45 * GB, 6.25 * GB, 1.05e9, 3, 4),
    "v5p": Chip(
        ("TPU v5p", "TPU v5"), 459e12, 95 * GIB, 2765 * GB, 90 * GB, 6.25 * GB, 1.75e9, 3, 4
    ),
    "v5e": Chip(
        ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819 * GB, 45 * GB, 3.125 * GB, 1.5e9, 2, 4
    ),
    "v6e": Chip(
        ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1640 * GB, 90 * GB, 12.5 * GB, 1.75e9, 2, 4
    ),
    # nvidia.com data sheets; network: one 400 Gb/s adapter for each GPU (A100: 200 Gb/s)
    "a100": Chip(("A100",), 312e12, 80 * GIB, 2039 * GB, 300 * GB, 25 * GB),
    "h100": Chip(("H100",), 989e12, 79 * GIB, 3352 * GB, 450 * GB, 50 * GB),
    "h200": Chip(("H200",), 989e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB),
}
# Compiler options, {option: (value, reason)}. train and plan use the same, so a refusal is found before a run.
TPU_OPTIONS = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": (
        True,
        "sums over DCN run beside the next layers' work",
    ),
    "xla_tpu_data_parallel_opt_different_sized_ops": (True, "also where layers differ in size"),
}
GPU_OPTIONS = {
    "xla_gpu_enable_triton_gemm": (
        False,
        "cuBLAS: adds and GELU inside products, and no minutes of choosing kernels",
    ),
    "xla_gpu_dot_merger_threshold_mb": (
        0,
        "of products joined into one, the parts would be copied out again",
    ),
    "xla_gpu_enable_latency_hiding_scheduler": (
        True,
        "collectives start early and end late, beside products",
    ),
    "xla_gpu_all_gather_combine_threshold_bytes": (
        512 << 20,
        "one gather for a layer, not one for each matrix",
    ),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": (512 << 20, "the same for its gradients"),
    "xla_gpu_all_reduce_combine_threshold_bytes": (
        512 << 20,
        "and for those that are summed over copies",
    ),
}
COMPILER_OPTIONS = {"tpu": TPU_OPTIONS, "gpu": GPU_OPTIONS, "cpu": {}}
GPU_MEMORY_FRACTION = 0.92  # that XLA takes when it starts; its own default is 0.75
PCIE = {"H100 PCIe": 756e12}  # slower cards of the same name


def find_chip(device_kind: str) -> str | None:
    """The key of CHIPS for jax's word for a device, or None. 'TPU v5 lite' is v5e, although 'TPU v5' is v5p."""
    longest = ""
    found = None
    for name, chip in CHIPS.items():
        for kind in chip.kinds:
            if kind in device_kind and len(kind) > len(longest):
                longest = kind
                found = name
    return found


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s, or None for a chip that is not in the table."""
    for kind, flops in PCIE.items():
        if kind in device_kind:
            return flops
    chip = find_chip(device_kind)
    if chip:
        return CHIPS[chip].flops
    return None
