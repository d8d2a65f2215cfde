"""The attention kernels that model.attention may name, and what each can do.

The choice of `auto` (jaxlm/kernels/attention.py), the checks of a config, and the tests read this table. It stands here
because checking a config needs no jax. A new kernel is a function of the signature that jaxlm/kernels/attention.py
describes, and a row here.
"""

from typing import NamedTuple

HALF_PRECISION = ("bfloat16", "float16")


class Kernel(NamedTuple):
    """What a kernel can do. All but `function` restrict it: the defaults are those of a kernel that can do everything.

    function: MODULE.NAME below jaxlm.kernels, imported where it is first used.
    auto: whether model.attention=auto may choose it.
    chips: where it runs, of cpu, gpu and tpu.
    compute_capability, package: the GPUs it is compiled for ("9.0": Hopper), and the package it needs; "": any, none.
    dtypes, head_dims: those of the queries that it takes; None: all.
    length_multiple: the numbers of queries and of keys are multiples of this.
    softcap: whether it has a soft-cap on the logits.
    bidirectional: whether it can do without the causal mask.
    any_order: whether positions may be others than 0, 1, ...: a prefix, generation with a cache, shards in zig-zag.
    any_mask: whether windows and packed documents are as fast as a plainly causal mask or none; else `auto` chooses it
        for those alone.
    keeps_logits: whether its memory grows with queries x keys; `auto` passes over it where the logits are many.
    names_residuals: whether it names itself what model.remat=attention keeps; else its result is.
    ring: whether the ring of jaxlm/parallel/context_parallel.py is made of it.
    """

    function: str
    auto: bool = True
    chips: tuple[str, ...] = ("cpu", "gpu", "tpu")
    compute_capability: str = ""
    package: str = ""
    dtypes: tuple[str, ...] | None = None
    head_dims: tuple[int, ...] | range | None = None
    length_multiple: int = 1
    softcap: bool = True
    bidirectional: bool = True
    any_order: bool = True
    any_mask: bool = True
    keeps_logits: bool = False
    names_residuals: bool = False
    ring: bool = False

    @property
    def auto_on_cpu(self) -> bool:
        return self.auto and "cpu" in self.chips


# `auto` chooses the first that can do what is asked.
ATTENTION_KERNELS = {
    "splash": Kernel(
        "tpu_attention.splash",
        chips=("tpu",),
        length_multiple=128,
        any_order=False,
        names_residuals=True,
    ),
    "cudnn": Kernel(
        "library_attention.cudnn",
        chips=("gpu",),
        dtypes=HALF_PRECISION,
        head_dims=range(8, 129, 8),  # that every GPU has
        softcap=False,
        any_mask=False,
    ),
    "tokamax": Kernel(
        "hopper_attention.tokamax",
        chips=("gpu",),
        compute_capability="9.0",
        package="tokamax",
        dtypes=HALF_PRECISION,
        head_dims=(64, 128),
        length_multiple=128,
        bidirectional=False,
        any_order=False,
    ),
    "dense": Kernel("cpu_attention.dense", chips=("cpu",), softcap=False, keeps_logits=True),
    "reference": Kernel("attention.reference", keeps_logits=True),
    "blockwise": Kernel("blockwise.blockwise", names_residuals=True, ring=True),
    "xla": Kernel("library_attention.xla", auto=False, softcap=False, keeps_logits=True),
}
UNRESTRICTED = Kernel("", ring=True)


def capabilities(name: str) -> Kernel:
    """The record of model.attention=name.

    Of `auto`, which chooses what can do what is asked, one without restrictions; of a word that is no kernel too, which
    another check refuses.
    """
    return ATTENTION_KERNELS.get(name, UNRESTRICTED)
