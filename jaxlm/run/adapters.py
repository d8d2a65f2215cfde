"""Adapters (LoRA, Hu et al. 2021) folded into the weights that they stand beside."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


def fold_adapters(params: dict, section: ConfigDict) -> tuple[dict, ConfigDict]:
    """(params, model section) without adapters: each kernel with its product of two narrow matrices added.

    section: the resolved `model` section that params are of. Layers may be stacked by scan, on a leading axis.
    """
    scale = section.lora_alpha / max(section.lora_rank, 1)
    section = section.copy_and_resolve_references()
    section.lora_rank = 0
    return fold(params, scale), section


def fold(tree, scale: float):
    if not isinstance(tree, dict):
        return tree
    tree = {name: fold(part, scale) for name, part in tree.items()}
    if "lora_a" in tree:
        a = tree.pop("lora_a")
        b = tree.pop("lora_b")
        kernel = tree["kernel"]
        tree["kernel"] = (kernel + product(a, b, scale, kernel.ndim)).astype(kernel.dtype)
    return tree


def product(a, b, scale: float, kernel_ndim: int):
    """scale * a @ b in float32. Where a and b have more axes than the kernel's, the first is of stacked layers."""

    def of_one_layer(a, b):
        return scale * jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1)

    if a.ndim + b.ndim - 2 > kernel_ndim:
        return jax.vmap(of_one_layer)(a, b)
    return of_one_layer(a, b)
