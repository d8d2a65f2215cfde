"""Pods that need not be here: devices for which a step can be compiled.

The TPU compiler (the extra `tpu`) and XLA's GPU compiler (the extra `cuda`) run on a machine without either.
"""

import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from jaxlm.cli import did_you_mean
from jaxlm.errors import ConfigError, UserError
from jaxlm.parallel.chips import CHIPS, GPU_MEMORY_FRACTION, Chip, find_chip

# Google's names of TPU slices: v4 and v5p count cores, two a chip; v5e and v6e count chips.
SHAPES_3D = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8",
             1024: "8x8x8", 2048: "8x8x16", 4096: "8x16x16", 8192: "16x16x16"}  # fmt: skip
SHAPES_2D = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}


class Topology(NamedTuple):
    name: str  # v5p:4x4x4, h100:1x8x8
    chip: str  # a key of CHIPS; of devices that are here perhaps another word, such as cpu
    shape: tuple[int, ...]  # of one slice: the torus, or hosts x GPUs
    slices: int
    devices: list  # of all slices
    estimate: bool  # compiled for CPUs instead: memory, sharding and FLOPs are near, kernels and cycles unknown

    @property
    def spec(self) -> Chip:
        """Of a chip without a data sheet in CHIPS its memory alone: `flops` is 0 and no time can be predicted."""
        return CHIPS.get(self.chip) or Chip((self.chip,), 0.0, memory_here(), 0.0, 0.0, 0.0)

    @property
    def memory(self) -> int:
        """Bytes of a device that a program may use."""
        if self.name == "local":
            return memory_here()
        if self.spec.dims:
            return int(self.spec.memory)
        return int(self.spec.memory * GPU_MEMORY_FRACTION)


def parse(text: str) -> tuple[str, tuple[int, ...]]:
    """(chip, shape) of "v5p:4x4x4", "v5p-128", "h100:8", "h100:1x16x8" (slices x hosts x GPUs). Raises ConfigError."""
    chip, separator, size = re.fullmatch(
        r"([^:-]*)([:-]?)(.*)", text.replace("v5litepod", "v5e")
    ).groups()
    if chip not in CHIPS:
        known = ", ".join(CHIPS)
        raise ConfigError(
            f"--topology={text}: no chip {chip!r}{did_you_mean(chip, CHIPS)} (known: {known}, or local)"
        )
    dims = CHIPS[chip].dims
    table = {3: SHAPES_3D, 2: SHAPES_2D}.get(dims, {})
    if separator == "-" and dims:
        if not size.isdecimal() or int(size) not in table:
            raise ConfigError(
                f"--topology={text}: {chip}- is followed by one of {', '.join(map(str, table))}"
            )
        size = table[int(size)]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        example = table[64] if dims else "1x8x8"
        raise ConfigError(f"--topology={text}: give a shape, such as {chip}:{example}")
    shape = tuple(map(int, size.split("x")))
    if dims and len(shape) != dims:
        raise ConfigError(
            f"--topology={text}: a slice of {chip} has {dims} dimensions, such as {chip}:{table[64]}"
        )
    if not dims:
        if len(shape) > 3:
            raise ConfigError(
                f"--topology={text}: GPUs are slices x hosts x GPUs of a host, such as {chip}:1x8x8"
            )
        host = CHIPS[chip].host
        is_whole_hosts = len(shape) == 1 and shape[0] > host and shape[0] % host == 0
        if is_whole_hosts:  # h100:64 is eight hosts of eight
            shape = (shape[0] // host, host)
        shape = (1,) * (3 - len(shape)) + shape
        if shape[-1] > host:
            raise ConfigError(
                f"--topology={text}: a host has {host} {chip} at most, so give hosts x GPUs: 1x2x{host}"
            )
    return chip, shape


def prepare_environment(num_devices: int) -> None:
    """Before jax starts: no accelerator here is asked for, and there are CPUs enough to stand in for devices."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to wait for
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # what XLA warns of, that a step does not fit, is on the page
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # nothing is locked: another plan may run
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}",
    }
    jax.config.update("jax_platforms", "cpu")


def describe(text: str, slices: int = 1) -> Topology:
    """The devices of a topology, none of which need be here. Raises ConfigError, or UserError without the extra."""
    chip, shape = parse(text)
    if not CHIPS[chip].dims:
        slices = shape[0] * slices
        shape = shape[1:]
        return gpus(text, chip, shape, slices)
    options = {}
    if any(wraps(shape)):
        rings = (*wraps(shape), False)
        options["wrap"] = rings[:3]
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip}:{'x'.join(map(str, shape))}",
            num_slices=slices,
            **options,
        )
    except Exception as error:
        missing = re.search(r"libtpu|not installed|Unable to initialize", str(error))
        if missing or isinstance(error, ImportError):
            raise UserError(
                f"--topology={text} needs the TPU compiler: pip install -e '.[tpu]' ({error})"
            ) from None
        raise ConfigError(
            f"--topology={text}: the TPU compiler knows no such slice ({error})"
        ) from None
    if len(found.devices) != slices * math.prod(shape):
        raise ConfigError(
            f"--topology={text}: the compiler counts the cores of {chip}, two a chip, as train does not"
        )
    return Topology(text, chip, shape, slices, list(found.devices), False)


def wraps(shape: tuple[int, ...]) -> list[bool]:
    """Which dimensions of a TPU slice are rings: of a 3D torus all or none, in multiples of 4; of a 2D one those of 16.

    The compiler needs this: without it, all-gathers over a whole slice become all-reduces.
    """
    if len(shape) == 3:
        return [math.gcd(4, *shape) == 4] * 3
    return [n == 16 for n in shape]


# An H100 SXM as XLA describes it (a GpuTargetConfigProto); others differ in what GPU_CHANGES says.
H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3" """
GPU_CHANGES = {
    "h100": (),
    "h200": (
        ("3352320000000", "4800000000000"),
        ("84978434048", "150121545728"),
        ("H100 80GB HBM3", "H200"),
    ),
}


def gpus(text: str, chip: str, shape: tuple[int, int], slices: int) -> Topology:
    """GPUs by XLA's GPU compiler where the extra `cuda` is installed and knows the chip, else CPUs in their place."""
    if chip in GPU_CHANGES:
        target = H100
        for old, new in GPU_CHANGES[chip]:
            target = target.replace(old, new)
        try:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=chip,
                topology="x".join(map(str, (slices, *shape))),
                target_config=target,
            )
            return Topology(text, chip, shape, slices, list(found.devices), False)
        except Exception as error:
            if "cuda" not in str(error).lower() and "plugin" not in str(error).lower():
                raise
    devices = jax.devices("cpu")[: slices * math.prod(shape)]
    return Topology(text, chip, shape, slices, devices, True)


def local() -> Topology:
    """The devices that are here, also of a chip that is not in CHIPS."""
    devices = jax.devices()
    kind = devices[0].device_kind
    return Topology("local", find_chip(kind) or kind, (1, len(devices)), 1, devices, False)


def memory_here() -> int:
    """Bytes that each device here may use: its own, or, of CPUs, its part of the machine's."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit") or machine // len(devices)
