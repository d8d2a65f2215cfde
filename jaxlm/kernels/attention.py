"""Scaled dot-product attention (Vaswani et al. 2017) with causal, segment and window masks and grouped queries.

B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head dimension.

All kernels have the signature of `reference`: (q [B, T, N, H], k and v [B, S, K, H], Mask, scale=, softcap=) ->
[B, T, N, H] in q's dtype, and give what it gives. `attention` chooses one of them, by the table in
jaxlm/config/attention_kernels.py.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import backend

from jaxlm.config.attention_kernels import ATTENTION_KERNELS, Kernel, capabilities
from jaxlm.parallel.mesh import platform

MAX_LOGITS = 64 << 20  # bytes of float32 logits beyond which auto keeps none
NEVER = -1e30  # a logit that no exponential survives; finite, so that differences are numbers
LAST = np.iinfo(np.int32).max
ANYWHERE = LAST - 1  # the place of a query that sees all keys, with a window of LAST
FALLBACK = "blockwise"  # where a kernel that is named can't have this mask, as in generation
einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Mask(NamedTuple):
    """Which keys each query sees.

    at_T, at_S: (places, segments) of queries and keys. Places: int32 [T] and [S]. The place of a query is the last that
    it sees: its own under the causal mask, ANYWHERE without it, and the end of the prefix, then [B, T], in a prefix
    (Raffel et al. 2020). Segments: int [B, T] and [B, S], or None where every row is one document.
    window: keys that a query sees at most, up to its place; LAST without the causal mask.
    causal, in_order: under the causal mask; queries and keys are both at the places 0, 1, ...
    plain: in order, and each query sees all keys, or all up to its own place.
    """

    at_T: tuple[jax.Array, jax.Array | None]
    at_S: tuple[jax.Array, jax.Array | None]
    window: int
    causal: bool
    in_order: bool
    plain: bool


def visible(at_T, at_S, window) -> jax.Array:
    """bool [B or 1, T, S]: key s, of the same segment, is at the place of query t or less than `window` before it."""
    places_T, segments_BT = at_T
    places_S, segments_BS = at_S
    mask_BTS = (places_S <= places_T[..., None]) & (places_S > places_T[..., None] - window)
    if mask_BTS.ndim == 2:
        mask_BTS = mask_BTS[None]
    if segments_BT is not None:
        mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    return mask_BTS


def reference(q_BTNH, k_BSKH, v_BSKH, mask: Mask, *, scale: float, softcap: float) -> jax.Array:
    """[B, T, N, H] in v's dtype. A query that sees no key gets the mean of all values."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * scale
    logits = einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    logits = capped(logits, softcap)
    mask_BTS = visible(mask.at_T, mask.at_S, mask.window)
    logits = jnp.where(mask_BTS[:, None, None], logits, NEVER)
    weights = jax.nn.softmax(logits, axis=-1)
    weights = weights.astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)


def capped(logits, softcap: float):
    """softcap x tanh(logits / softcap) (Gemma Team 2024); 0: the logits."""
    if softcap:
        return softcap * jnp.tanh(logits / softcap)
    return logits


def attention(
    q_BTNH, k_BSKH, v_BSKH, segments_BT=None, segments_BS=None, *, places_T=None, places_S=None,
    window, causal=True, softcap=0.0, scale=None, implementation="auto",
) -> jax.Array:  # fmt: skip
    """[B, T, N, H]. Queries see keys of their own segment, none later than themselves, at most `window` back.

    q: [B, T, N, H]; k, v: [B, S, K, H], K dividing N. segments: int [B, T] and [B, S], or None where every row is one
    document. places: int32 [T] and [S], where queries and keys are in the sequence; None: 0, 1, ...; of queries also
    [B, T], the last place that each sees. window: tokens a query sees, itself included. causal: False: all keys of the
    segment, whatever the window. softcap: of the logits; 0: none. scale: the logits' factor; None: H^-0.5.
    implementation: a key of ATTENTION_KERNELS, or auto: the first of them that `choose` finds fit. One that is named
    but can't have this mask, as in generation, is replaced by `blockwise`. What the backward pass needs is named
    "attention"; of the kernels for GPUs only the result is, and their forward pass runs again.

    Raises ValueError where a kernel that is named has no soft-cap, or doesn't take these shapes.
    """
    if softcap and not capabilities(implementation).softcap:
        raise ValueError(
            f"model.attention={implementation} has no soft-cap: set reference, blockwise or auto"
        )
    S = k_BSKH.shape[1]
    mask = mask_of(
        q_BTNH.shape[1],
        S,
        segments_BT,
        segments_BS,
        places_T,
        places_S,
        window,
        causal,
    )
    name = implementation
    if name == "auto":
        name = choose(
            q_BTNH,
            S,
            plain=mask.plain,
            in_order=mask.in_order,
            causal=mask.causal,
            softcap=softcap,
        )
    elif not takes_mask(ATTENTION_KERNELS[name], mask.in_order, mask.causal):
        name = FALLBACK
    if scale is None:
        scale = q_BTNH.shape[3] ** -0.5
    out_BTNH = function_of(name)(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap)
    if ATTENTION_KERNELS[name].names_residuals:
        return out_BTNH
    return checkpoint_name(out_BTNH, "attention")


def mask_of(
    T: int,
    S: int,
    segments_BT,
    segments_BS,
    places_T,
    places_S,
    window: int,
    causal: bool,
) -> Mask:
    """The Mask of what `attention` is given."""
    in_order = places_T is None and places_S is None and T == S
    plain = in_order and segments_BS is None and (window >= S or not causal)
    if not causal:
        window = LAST
        places_T = jnp.full(T, ANYWHERE)
    elif places_T is None:
        places_T = jnp.arange(T)
    if places_S is None:
        places_S = jnp.arange(S)
    return Mask(
        (places_T, segments_BT),
        (places_S, segments_BS),
        window,
        causal,
        in_order,
        plain,
    )


# ---------------------------------------------------------------- which kernel


def choose(q_BTNH, S: int, *, plain: bool, in_order: bool, causal: bool, softcap: float) -> str:
    """What auto is: the first of ATTENTION_KERNELS that the mesh in force has and that can do what is asked.

    q: the queries of a device, or their shape and dtype. S: keys. plain, in_order, causal: as in Mask.
    """
    B, T, N, _ = q_BTNH.shape
    too_many_logits = 4 * B * N * T * S > MAX_LOGITS
    for name, kernel in ATTENTION_KERNELS.items():
        if not kernel.auto or platform() not in kernel.chips:
            continue
        if softcap and not kernel.softcap:
            continue
        if too_many_logits and kernel.keeps_logits:
            continue
        if not plain and not kernel.any_mask:
            continue
        if takes_mask(kernel, in_order, causal) and fits(kernel, q_BTNH):
            return name
    raise ValueError("no attention kernel takes these queries")


def takes_mask(kernel: Kernel, in_order: bool, causal: bool) -> bool:
    return (in_order or kernel.any_order) and (causal or kernel.bidirectional)


def fits(kernel: Kernel, q_BTNH) -> bool:
    """Whether it takes queries of this shape and dtype, and what it needs is here."""
    _, T, _, H = q_BTNH.shape
    if T % kernel.length_multiple:
        return False
    if kernel.head_dims is not None and H not in kernel.head_dims:
        return False
    if kernel.dtypes is not None and str(q_BTNH.dtype) not in kernel.dtypes:
        return False
    if kernel.compute_capability and compute_capability() != kernel.compute_capability:
        return False
    return not kernel.package or has_package(kernel.package)


def compute_capability() -> str:
    """Of jax's default device, here or not; "" where it is no GPU."""
    device = backend.get_default_device()
    if device.platform != "gpu":
        return ""
    return device.compute_capability


@functools.cache
def has_package(name: str) -> bool:
    """Whether it is installed; logs once how to install it where it is not."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        logging.getLogger("jaxlm").warning(
            f"{name} is not installed: attention of packed documents goes by blocks in XLA, slower. "
            "For its kernel: Python >= 3.12 and pip install -e '.[cuda]'"
        )
    return found


def function_of(name: str) -> Callable:
    """The function of a key of ATTENTION_KERNELS, imported now: most runs need one kernel of them."""
    module, function = ATTENTION_KERNELS[name].function.split(".")
    return getattr(importlib.import_module(f"jaxlm.kernels.{module}"), function)
