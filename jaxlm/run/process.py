"""What a program sets up before jax starts: memory that is kept, and compiled programs that are."""

import ctypes
import hashlib
import os
import platform
import re
from pathlib import Path, PurePath

import jax

from jaxlm.parallel.chips import GPU_MEMORY_FRACTION

# mallopt(3): options of glibc's malloc, and what makes it keep freed memory.
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
KEEP_MEMORY = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 256 << 20}
ACCELERATORS = ("accel*", "vfio/*", "nvidiactl", "kfd")  # devices of TPUs, NVIDIA and AMD GPUs


def manage_memory() -> None:
    """Keeps glibc from giving large freed blocks back to the kernel after every step on a CPU; gives XLA most of a GPU.

    On a CPU each step would fault its temporaries in again, page by page: 159 ms a step instead of 113 for
    configs/quickstart.py with AdamW on 2 cores. Programs then run on the thread that calls them, not on one of jax's:
    glibc's options reach only the main thread's heap, and a second step's temporaries never stand beside a first's.
    Call it before jax starts. With another libc nothing happens.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))
    if jax.config.jax_platforms != "cpu" and has_accelerator():
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in KEEP_MEMORY.items():
        mallopt(option, value)


def has_accelerator() -> bool:
    return any(any(Path("/dev").glob(name)) for name in ACCELERATORS)


def quick_random_numbers() -> None:
    """On one GPU, random numbers come from jax's own kernel, not from code that XLA compiles wherever they are drawn.

    The numbers are the same. The program that makes the state of GPT-2 compiles in 4 s instead of 23. On several GPUs
    each device would make the numbers of all.
    """
    if jax.device_count() == 1:
        jax.config.update("jax_threefry_gpu_kernel_lowering", True)


def keep_compiled(folder: PurePath) -> None:
    """Keeps compiled programs in `folder`, where the next start of the same command finds them.

    JAX_COMPILATION_CACHE_DIR overrules the folder. CPUs that differ do not share: jax does not tell them apart, and one
    may lack instructions that another's program uses. On several CPU devices nothing is kept or used: the collectives
    of a kept program can wait for each other forever there (jax 0.10).
    """
    if jax.default_backend() == "cpu":
        if jax.device_count() > 1:
            jax.config.update("jax_enable_compilation_cache", False)
            return
        folder /= hashlib.sha256(instructions().encode()).hexdigest()[:12]
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    # A start compiles many small programs: keep even those that take no time.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def instructions() -> str:
    """The instruction sets of this CPU, from Linux; elsewhere its name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"^(flags|Features)\s*: (.*)$", text, re.MULTILINE)
    if found is None:
        return platform.processor()
    return found[2]
