"""Matrix products whose factors are rounded to 8 bits, forward and backward, by qwix (google/qwix).

Each factor is divided by its largest magnitude along what is summed over: x has a scale for each token, a kernel one
for each output. So no token's result depends on the tokens beside it, in training or in generation. Backward, the
rounded factors are used again: their scales go into the gradient, which is rounded anew for each of its two products.

On a mesh a device scales by what it holds of the sum. `columns` sums over all inputs on each device: the result is that
of one device. Where the sum goes over devices (`rows`, and gradients), each part has a scale of its own, never a
coarser one; the result differs from that of one device about as much as both do from the exact one.

Matrix units that take 8 bits gain. For an H100 XLA makes fp8 products of cuBLASLt or Triton of all three. By the TPU
compiler's cycles an MLP of Llama 8B, forward and backward, takes 32% less in int8 on v5e, 30% on v5p, 16% on v6e (one
scale a tensor would change that by 2% at most), and in fp8 3% less, as much, and 21% more.

What is imported is not among qwix's public names, though MaxText imports it too: pyproject.toml says which versions
have it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.errors import ConfigError

DTYPES = {  # model.quantize: of both factors; of the gradient that comes back
    # Gradients need range more than digits (Micikevicius et al. 2022).
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
    "int8": (jnp.int8, jnp.int8),
}


def tensordot(quantize: str) -> Callable:
    """What stands for jnp.tensordot(x, kernel, axes), axes being a number. quantize: none, or a key of DTYPES."""
    if quantize == "none":
        return jnp.tensordot
    return partial(rounded, quantize)


def rounded(quantize: str, x, kernel, axes: int) -> jax.Array:
    """[..., D] [D, ...], the last `axes` dimensions of x summed over. Raises ConfigError without qwix."""
    try:
        from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'config.model.quantize={quantize}: {error.name} is not installed; type: pip install -e ".[quantize]"'
        ) from None
    factor, gradient = DTYPES[quantize]
    # The scales' own gradient would be zeros, which XLA must carry through the search for the largest magnitude.
    constant = jax.lax.stop_gradient
    config = DotGeneralQtConfig(
        lhs_qtype=factor, rhs_qtype=factor, dlhs_grad_qtype=gradient, drhs_grad_qtype=gradient,
        lhs_collect_quant_stat=constant, rhs_collect_quant_stat=constant,
    )  # fmt: skip
    summed_of_x = tuple(range(x.ndim - axes, x.ndim))
    summed_of_kernel = tuple(range(axes))
    return dot_general_qt(x, kernel, ((summed_of_x, summed_of_kernel), ((), ())), config)
