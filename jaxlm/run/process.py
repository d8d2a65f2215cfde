"""What a program sets up before jax starts: memory that is kept, and compiled programs that are."""

import ctypes
import hashlib
import os
import platform
import re
from pathlib import Path, PurePath

import jax

from jaxlm.parallel.chips import GPU_MEMORY_FRACTION


def manage_memory() -> None:
    """Keeps glibc from giving large freed blocks back to the kernel after every step on a CPU; gives XLA most of a GPU.

    On a CPU each step would fault its temporaries in again, page by page: 159 ms a step instead of 113 for
    configs/quickstart.py with AdamW on 2 cores. Programs then run on the thread that calls them, not on one of jax's:
    only the main thread's blocks lie on the heap that these options speak of, and no second step's temporaries are ever
    made beside those of a first. To be called before jax starts. With another libc nothing happens.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))
    accelerators = ("accel*", "vfio/*", "nvidiactl", "kfd")  # devices of TPUs, NVIDIA and AMD GPUs
    if jax.config.jax_platforms != "cpu" and any(
        file for name in accelerators for file in Path("/dev").glob(name)
    ):
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    # mallopt(3)
    M_MMAP_MAX = -4
    M_TRIM_THRESHOLD = -1
    M_TOP_PAD = -2
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 256 << 20)):
        mallopt(option, value)


def quick_random_numbers() -> None:
    """On one GPU, random numbers come from a kernel of jax's, not from code that XLA compiles wherever they are drawn.

    The same numbers; the program that makes the state of GPT-2 compiles in 4 s instead of 23. On several GPUs each
    device would make the numbers of all.
    """
    if jax.device_count() == 1:
        jax.config.update("jax_threefry_gpu_kernel_lowering", True)


def keep_compiled(folder: PurePath) -> None:
    """Compiled programs are kept in `folder`, and found there by the next start of the same command.

    Where the user has named a folder (JAX_COMPILATION_CACHE_DIR), in that. CPUs that are not alike do not share: jax
    does not tell them apart, and one may lack what the program of another uses. On several CPU devices nothing is kept,
    and nothing used: there the collectives of programs that were kept can wait for each other forever (jax 0.10).
    """
    if jax.default_backend() == "cpu":
        if jax.device_count() > 1:
            jax.config.update("jax_enable_compilation_cache", False)
            return
        folder /= hashlib.sha256(instructions().encode()).hexdigest()[:12]
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", 0.0
    )  # a start compiles many small ones


def instructions() -> str:
    """The sets of instructions that this CPU knows, as Linux tells; elsewhere its name."""
    try:
        return re.search(
            r"^(flags|Features)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )[2]
    except (OSError, TypeError):
        return platform.processor()
