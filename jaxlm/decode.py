"""Generation: prefill and every further token in one jitted loop over a key-value cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlm.kernels.cross_entropy import logits_of
from jaxlm.models.transformer import init_cache, unembedding


def sample(logits_BV, keys_B, temperature, top_k: int, top_p: float) -> jax.Array:
    """int32 [B]. temperature 0: the likeliest. top_k, top_p: keep the k likeliest, the likeliest of mass p; 0: off."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_k or top_p:
        descending = -jnp.sort(-logits_BV, axis=-1)
        lowest = jnp.full((logits_BV.shape[0], 1), -jnp.inf)
        if top_k:
            lowest = descending[:, min(top_k, logits_BV.shape[1]) - 1, None]
        if top_p:  # nucleus sampling (Holtzman et al. 2020): the token that crosses p is kept
            before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1) - jax.nn.softmax(descending, axis=-1)
            nucleus = jnp.where(before < top_p, descending, jnp.inf)
            lowest = jnp.maximum(lowest, jnp.min(nucleus, axis=-1, keepdims=True))
        logits_BV = jnp.where(logits_BV < lowest, -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


@partial(jax.jit, static_argnames=("model", "max_tokens", "temperature", "top_k", "top_p", "eos_id"))
def generate_tokens(
    model: nn.Module, params, prompts_BP, lengths_B, seeds_B, *, max_tokens, temperature, top_k, top_p, eos_id
):
    """int32 [B, max_tokens]: what follows each prompt; eos_id, or 0, after the end.

    prompts: int32 [B, P], each at the right end of its row. seeds: a row's text depends on its own seed alone.
    """
    B, P = prompts_BP.shape
    end = 0 if eos_id is None else eos_id
    offset_BP = jnp.arange(P) - (P - lengths_B)[:, None]
    keys_B = jax.vmap(jax.random.key)(seeds_B)
    table_VD = unembedding(params)

    def forward(tokens_BT, segments_BT, positions_BT, cache):
        x_BTD, cache = model.apply({"params": params}, tokens_BT, segments_BT, positions_BT, cache=cache)
        return logits_of(x_BTD[:, -1:], table_VD, model.config.logit_softcap)[:, 0], cache

    def more(carry):
        i, _, _, done_B, _ = carry
        return (i < max_tokens) & ~jnp.all(done_B)

    def step(carry):
        i, logits_BV, cache, done_B, out_BM = carry
        token_B = sample(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, i), temperature, top_k, top_p)
        token_B = jnp.where(done_B, end, token_B)
        done_B |= (token_B == eos_id) if eos_id is not None else False
        out_BM = jax.lax.dynamic_update_slice_in_dim(out_BM, token_B[:, None], i, axis=1)
        logits_BV, cache = forward(token_B[:, None], jnp.ones((B, 1), jnp.int32), (lengths_B + i)[:, None], cache)
        return i + 1, logits_BV, cache, done_B, out_BM

    cache = init_cache(model.config, B, P + max_tokens)
    segments_BP = (offset_BP >= 0).astype(jnp.int32)
    logits_BV, cache = forward(prompts_BP, segments_BP, jnp.maximum(offset_BP, 0), cache)
    start = (jnp.zeros((), jnp.int32), logits_BV, cache, jnp.zeros(B, bool), jnp.full((B, max_tokens), end, jnp.int32))
    return jax.lax.while_loop(more, step, start)[-1]


def pad_prompts(prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [B, P], lengths [B]): each prompt at the right end, P a power of two so that few shapes are compiled."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    P = 1 << max(int(lengths.max()) - 1, 15).bit_length()
    padded = np.zeros((len(prompts), P), np.int32)
    for row, prompt in zip(padded, prompts):
        row[P - len(prompt) :] = prompt
    return padded, lengths
