"""The recurrence of an LSTM (Hochreiter & Schmidhuber 1997), with a backward pass of its own.

Here H is the width of the state and G the gates: input, forget, cell, output. K is H where it is summed over.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.parallel.mesh import constrain


def cell(z_BGH, c_BH):
    """(h, c), c in float32: the forget gate of Gers et al. 2000, no peepholes."""
    input_gate = jax.nn.sigmoid(z_BGH[:, 0])
    forget_gate = jax.nn.sigmoid(z_BGH[:, 1])
    candidate = jnp.tanh(z_BGH[:, 2])
    output_gate = jax.nn.sigmoid(z_BGH[:, 3])
    c_BH = forget_gate * c_BH + input_gate * candidate
    return output_gate * jnp.tanh(c_BH), c_BH


class Steps(NamedTuple):
    """What each step gets besides the state; None: nothing."""

    x_TBGH: jax.Array  # the input's part of the gates
    keep_TB1: jax.Array | None  # 0 where the state is forgotten first
    start_TBH: tuple[jax.Array, jax.Array] | None  # added to h and c then


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def recur(reverse: bool, kernel_HGH, steps: Steps, mask_BH, h_BH, c_BH):
    """(h [T, B, H], the last h, the last c). mask: a factor of the recurrent h, or None.

    reverse: from the last step to the first. h, c: the first state. It has a backward pass of its own because that of a
    scan would add a gradient of the kernel's size to memory (and, on a mesh, reduce it over the devices) at each step;
    here it is one product after all steps.
    """
    out, _ = run(reverse, kernel_HGH, steps, mask_BH, h_BH, c_BH)
    return out


def run(reverse, kernel_HGH, steps, mask_BH, h_BH, c_BH):
    """(what `recur` returns, what its backward pass keeps of each step: recurrent h, gates, c before)."""

    def step(state, now: Steps):
        h_BH, c_BH = state
        if now.keep_TB1 is not None:
            h_BH = h_BH * now.keep_TB1.astype(h_BH.dtype)
            c_BH = c_BH * now.keep_TB1
        if now.start_TBH is not None:
            start_h_BH, start_c_BH = now.start_TBH
            h_BH = h_BH + start_h_BH
            c_BH = c_BH + start_c_BH
        if mask_BH is not None:
            h_BH = h_BH * mask_BH
        m_BH = constrain(h_BH, "batch", None)
        recurrent_BGH = jnp.einsum(
            "BK,KGH->BGH", m_BH, kernel_HGH, preferred_element_type=jnp.float32
        )
        z_BGH = constrain(now.x_TBGH + recurrent_BGH, "batch", None, "mlp")
        h_BH, new_BH = cell(z_BGH, c_BH)
        h_BH = constrain(h_BH.astype(m_BH.dtype), "batch", "mlp")
        return (h_BH, new_BH), (h_BH, (m_BH, z_BGH.astype(m_BH.dtype), c_BH))

    (h_BH, c_BH), (h_TBH, kept) = jax.lax.scan(step, (h_BH, c_BH), steps, reverse=reverse)
    return (h_TBH, h_BH, c_BH), kept


def recur_forward(reverse, kernel_HGH, steps, mask_BH, h_BH, c_BH):
    out, kept = run(reverse, kernel_HGH, steps, mask_BH, h_BH, c_BH)
    return out, (kernel_HGH, steps._replace(x_TBGH=None), mask_BH, kept)


def recur_backward(reverse, residuals, cotangents):
    kernel_HGH, given, mask_BH, (m_TBH, z_TBGH, c_TBH) = residuals
    dh_TBH, dh_BH, dc_BH = cotangents
    # Transposed once: on a CPU twice as fast as in the loop.
    kernel_GHK = jax.lax.optimization_barrier(kernel_HGH.transpose(1, 2, 0))

    def step(cotangent, now):
        dh_BH, dc_BH = cotangent
        out_BH, z_BGH, c_BH, keep_B1 = now
        dh_BH = (dh_BH + out_BH).astype(jnp.float32)
        _, pull_back = jax.vjp(cell, z_BGH.astype(jnp.float32), c_BH)
        dz_BGH, dc_BH = pull_back((dh_BH, dc_BH))
        dz_BGH = constrain(dz_BGH.astype(z_BGH.dtype), "batch", None, "mlp")
        dh_BH = constrain(jnp.einsum("BGH,GHK->BK", dz_BGH, kernel_GHK), "batch", "mlp")
        if mask_BH is not None:
            dh_BH = dh_BH * mask_BH
        start = None
        if given.start_TBH is not None:
            start = (dh_BH, dc_BH)
        if keep_B1 is not None:
            dh_BH = dh_BH * keep_B1.astype(dh_BH.dtype)
            dc_BH = dc_BH * keep_B1
        return (dh_BH, dc_BH), (dz_BGH, start)

    each = (dh_TBH, z_TBGH, c_TBH, given.keep_TB1)
    (dh_BH, dc_BH), (dz_TBGH, start) = jax.lax.scan(step, (dh_BH, dc_BH), each, reverse=not reverse)
    dkernel_HGH = jnp.einsum("TBK,TBGH->KGH", m_TBH, dz_TBGH)
    return dkernel_HGH, Steps(dz_TBGH, None, start), None, dh_BH, dc_BH


recur.defvjp(recur_forward, recur_backward)
