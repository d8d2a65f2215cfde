"""Generation, by sampling or beam search: prefill and every further token in one jitted loop over a model's cache.

K hypotheses of a row, J = 2 K candidates, M new tokens, R = B K; the other letters are those of jaxlm/models/__init__.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlm.kernels.attention import NEVER
from jaxlm.models import next_logits
from jaxlm.parallel.hosts import fetch

COLDEST = 1e-30  # a temperature below which no difference of float32 logits leaves a choice
WARMEST = 1e30  # and one above which none of them matters
BIG = 1024  # sizes from here on are its multiples
MANY = 64  # rows of a batch, likewise


def sample(logits_BV, keys_B, temperature, top_k, top_p) -> jax.Array:
    """int32 [B]. temperature 0: the likeliest. top_k, top_p: keep the k likeliest, the likeliest of mass p; 0: off.

    The last three are scalars, numbers or traced: one program serves all of their values. What a value does not ask
    for is not computed: sorting a vocabulary costs more than a token of a small model.
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    top_k = jnp.asarray(top_k, jnp.int32)
    top_p = jnp.asarray(top_p, jnp.float32)

    def likeliest(logits_BV):
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def cut(logits_BV):
        return cut_tail(logits_BV, top_k, top_p)

    def uncut(logits_BV):
        return logits_BV

    def draw(logits_BV):
        logits_BV = logits_BV / temperature
        logits_BV = jax.lax.cond((top_k > 0) | (top_p > 0), cut, uncut, logits_BV)
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)

    return jax.lax.cond(temperature == 0, likeliest, draw, logits_BV)


def cut_tail(logits_BV, top_k, top_p) -> jax.Array:
    """[B, V]: the logits, -inf where they are below the top_k largest or outside of the likeliest of mass top_p.

    Nucleus sampling (Holtzman et al. 2020): the token that crosses top_p is kept. 0: off.
    """
    V = logits_BV.shape[1]
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    kth = jnp.clip(top_k, 1, V) - 1
    kth_B1 = jax.lax.dynamic_slice_in_dim(descending_BV, kth, 1, axis=1)
    chances_BV = jax.nn.softmax(descending_BV, axis=-1)
    before_BV = jnp.cumsum(chances_BV, axis=-1) - chances_BV
    nucleus_BV = jnp.where(before_BV < top_p, descending_BV, jnp.inf)
    crossing_B1 = jnp.min(nucleus_BV, axis=-1, keepdims=True)
    lowest_B1 = jnp.where(top_k > 0, kth_B1, -jnp.inf)
    lowest_B1 = jnp.where(top_p > 0, jnp.maximum(lowest_B1, crossing_B1), lowest_B1)
    return jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)


def as_float32(temperature: float, top_p: float) -> tuple[np.float32, np.float32]:
    """(temperature, top_p) as a program takes them, clipped where float32 holds no such number."""
    if temperature < COLDEST:
        temperature = 0.0
    if top_p >= 1:  # all tokens: nothing is to be sorted
        top_p = 0.0
    elif top_p > 0:
        top_p = max(top_p, float(np.finfo(np.float32).tiny))  # 0 would be off
    return np.float32(min(temperature, WARMEST)), np.float32(top_p)


def size_for(number: int, least: int, most: int = BIG) -> int:
    """The padded size of `number` items: a power of two from `least` to `most`, then a multiple of `most`.

    A program is compiled for each size, not for each number.
    """
    if number > most:
        return -(-number // most) * most
    return max(least, 1 << (max(int(number), 1) - 1).bit_length())


def fill_rows(*arrays):
    """The arrays [B, ...], padded to a size with copies of their first row. None is unchanged."""

    def fill(x):
        x = np.asarray(x)
        missing = size_for(len(x), 1, MANY) - len(x)
        return np.concatenate([x, np.repeat(x[:1], missing, axis=0)])

    return jax.tree.map(fill, arrays)


def only_tokens(logits_BV, vocab_size: int | None) -> jax.Array:
    """The logits, -inf from vocab_size on: a model may have more rows than there are tokens. None: all are tokens."""
    V = logits_BV.shape[1]
    if vocab_size is None or vocab_size >= V:
        return logits_BV
    return jnp.where(jnp.arange(V) < vocab_size, logits_BV, -jnp.inf)


def start(
    model, params, prompts_BP, lengths_B, length: int, source: dict | None, whole: bool, vocab_size: int | None
):  # fmt: skip
    """(logits after each prompt [B, V], a function that goes on with tokens, the cache): all but the loop.

    prompts: int32 [B, P], each at the right end of its row. length: positions to make room for. source: enc_tokens and
    enc_segments [B, S] of an encoder-decoder. whole: every token of a prompt sees all of it (a prefix).
    vocab_size: tokens from here on are never written.
    """
    B, P = prompts_BP.shape
    offset_BP = jnp.arange(P) - (P - lengths_B)[:, None]

    def forward(tokens_BT, segments_BT, positions_BT, cache, **seen):
        x_BTD, cache = model.apply(
            {"params": params}, tokens_BT, segments_BT, positions_BT, cache=cache, **seen
        )
        logits_BV = next_logits(model, params, x_BTD[:, -1:])[:, 0]
        return only_tokens(logits_BV, vocab_size), cache

    sizes = ()
    seen = {}
    if source:
        sizes = (source["enc_tokens"].shape[1],)
        seen = source
    elif whole:
        seen = {"reach_BT": jnp.full((B, P), P - 1)}
    segments_BP = (offset_BP >= 0).astype(jnp.int32)
    positions_BP = jnp.maximum(offset_BP, 0)
    cache = model.init_cache(B, P + length, *sizes)
    logits_BV, cache = forward(prompts_BP, segments_BP, positions_BP, cache, **seen)
    return logits_BV, forward, cache


def generate_tokens(
    model: nn.Module, params, prompts_BP, lengths_B, seeds_B, source=None, *, max_tokens, temperature, top_k, top_p,
    eos_id, whole=False, vocab_size=None,
) -> np.ndarray:  # fmt: skip
    """int32 [B, max_tokens]: what follows each prompt; eos_id, or 0, after the end.

    seeds: a row's text depends on its own seed alone. The others: see `start`. One program serves a model, a shape of
    prompts and a size of max_tokens (`size_for`), whatever the other numbers are.
    """
    B = len(prompts_BP)
    temperature, top_p = as_float32(temperature, top_p)
    rows = fill_rows(prompts_BP, lengths_B, seeds_B, source)
    numbers = np.int32(max_tokens), temperature, np.int32(top_k), top_p
    fixed = {
        "room": size_for(max_tokens, 64),
        "eos_id": eos_id,
        "whole": whole,
        "vocab_size": vocab_size,
    }
    out = sampled(model, params, *rows, *numbers, **fixed)
    return fetch(out)[:B, :max_tokens]


@partial(jax.jit, static_argnames=("model", "room", "eos_id", "whole", "vocab_size"))
def sampled(
    model: nn.Module, params, prompts_BP, lengths_B, seeds_B, source, max_tokens, temperature, top_k, top_p, *, room,
    eos_id, whole, vocab_size,
):  # fmt: skip
    """int32 [B, room]: generate_tokens, of which the first max_tokens count."""
    B = len(prompts_BP)
    end = 0 if eos_id is None else eos_id
    keys_B = jax.vmap(jax.random.key)(seeds_B)
    logits_BV, forward, cache = start(
        model, params, prompts_BP, lengths_B, room, source, whole, vocab_size
    )

    def more(carry):
        i, _, _, done_B, _ = carry
        return (i < max_tokens) & ~jnp.all(done_B)

    def step(carry):
        i, logits_BV, cache, done_B, out_BM = carry
        here_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)
        token_B = sample(logits_BV, here_B, temperature, top_k, top_p)
        token_B = jnp.where(done_B, end, token_B)
        done_B |= (token_B == eos_id) if eos_id is not None else False
        out_BM = jax.lax.dynamic_update_slice_in_dim(out_BM, token_B[:, None], i, axis=1)
        logits_BV, cache = forward(
            token_B[:, None], jnp.ones((B, 1), jnp.int32), (lengths_B + i)[:, None], cache
        )
        return i + 1, logits_BV, cache, done_B, out_BM

    zero = jnp.zeros((), jnp.int32)
    out_BM = jnp.full((B, room), end, jnp.int32)
    carry = (zero, logits_BV, cache, jnp.zeros(B, bool), out_BM)
    *_, out_BM = jax.lax.while_loop(more, step, carry)
    return out_BM


def beam_search(
    model: nn.Module, params, prompts_BP, lengths_B, source=None, *, max_tokens, beams, length_penalty, eos_id,
    whole=False, vocab_size=None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(int32 [B, K, max_tokens], scores [B, K]): the K best continuations, the best first; eos_id after the end.

    A score is the sum of log-probabilities over ((5 + length) / 6) ** length_penalty (Wu et al. 2016). The 2 K best
    extensions of K hypotheses always hold K that have not ended. The others: see `start`; what is compiled anew: see
    `generate_tokens`, and for each number of beams.
    """
    B = len(prompts_BP)
    rows = fill_rows(prompts_BP, lengths_B, source)
    numbers = np.int32(max_tokens), np.float32(length_penalty)
    fixed = {"beams": beams, "room": size_for(max_tokens, 64)}
    fixed |= {"eos_id": eos_id, "whole": whole, "vocab_size": vocab_size}
    texts, scores = searched(model, params, *rows, *numbers, **fixed)
    return fetch(texts)[:B, :, :max_tokens], fetch(scores)[:B]


@partial(jax.jit, static_argnames=("model", "beams", "room", "eos_id", "whole", "vocab_size"))
def searched(
    model: nn.Module, params, prompts_BP, lengths_B, source, max_tokens, length_penalty, *, beams, room, eos_id, whole,
    vocab_size,
):  # fmt: skip
    """(int32 [B, K, room], scores [B, K]): beam_search, of which the first max_tokens count."""
    B = len(prompts_BP)
    K = beams
    logits_BV, forward, cache = start(
        model, params, prompts_BP, lengths_B, room, source, whole, vocab_size
    )
    V = logits_BV.shape[1]
    every_row = jnp.repeat(jnp.arange(B), K)
    lengths_R = lengths_B[every_row]
    cache = model.take_rows(cache, every_row)

    def penalty(length):
        return ((5.0 + length) / 6.0) ** length_penalty

    def more(carry):
        i, _, _, alive_BK, _, done_BK, _ = carry
        # Log-probabilities only fall: no hypothesis can end better than this.
        hope_B = alive_BK.max(axis=1) / penalty(max_tokens)
        return (i < max_tokens) & jnp.any(hope_B > done_BK.min(axis=1))

    def step(carry):
        i, logits_BKV, cache, alive_BK, alive_BKM, done_BK, done_BKM = carry
        score_BJ, beam_BJ, token_BJ = extensions(alive_BK, logits_BKV)
        text_BJM = write_token(pick(alive_BKM, beam_BJ), token_BJ, i)
        if eos_id is not None:
            ended_BJ = token_BJ == eos_id
        else:
            ended_BJ = jnp.zeros_like(token_BJ, bool)
        ended_BJ |= i + 1 == max_tokens  # what is cut off counts too
        counts_BJ = ended_BJ & (jnp.arange(2 * K) < K)  # of the K best: so that one beam is greedy
        ends_BJ = jnp.where(counts_BJ, score_BJ / penalty(i + 1), NEVER)
        done_BK, done_BKM = best(
            K,
            jnp.concatenate([done_BK, ends_BJ], axis=1),
            jnp.concatenate([done_BKM, text_BJM], axis=1),
        )
        alive_BK, alive_BKM, beam_BK, token_BK = best(
            K, jnp.where(ended_BJ, NEVER, score_BJ), text_BJM, beam_BJ, token_BJ
        )
        rows = (jnp.arange(B)[:, None] * K + beam_BK).reshape(-1)
        token_R1 = token_BK.reshape(B * K)[:, None]
        ones = jnp.ones((B * K, 1), jnp.int32)
        logits, cache = forward(
            token_R1, ones, (lengths_R + i)[:, None], model.take_rows(cache, rows)
        )
        return i + 1, logits.reshape(B, K, V), cache, alive_BK, alive_BKM, done_BK, done_BKM

    # One hypothesis at first, not K that are alike.
    alive_BK = jnp.where(jnp.arange(K) == 0, 0.0, NEVER) + jnp.zeros((B, 1))
    nothing = jnp.full((B, K, room), 0 if eos_id is None else eos_id, jnp.int32)
    done_BK = jnp.full((B, K), NEVER)
    logits_BKV = jnp.broadcast_to(logits_BV[:, None], (B, K, V))
    zero = jnp.zeros((), jnp.int32)
    carry = (zero, logits_BKV, cache, alive_BK, nothing, done_BK, nothing)
    *_, done_BK, done_BKM = jax.lax.while_loop(more, step, carry)
    return done_BKM, done_BK


def extensions(alive_BK, logits_BKV) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of log-probabilities, hypothesis, token), each [B, 2 K]: the best extensions of K hypotheses by a token."""
    B, K, V = logits_BKV.shape
    total_BKV = alive_BK[..., None] + jax.nn.log_softmax(logits_BKV.astype(jnp.float32))
    score_BJ, index_BJ = jax.lax.top_k(total_BKV.reshape(B, -1), 2 * K)
    return score_BJ, index_BJ // V, (index_BJ % V).astype(jnp.int32)


def write_token(text_BJM, token_BJ, i) -> jax.Array:
    """The texts with these tokens at place i."""
    return jax.lax.dynamic_update_slice_in_dim(text_BJM, token_BJ[..., None], i, axis=2)


def pick(x, index_BJ) -> jax.Array:
    """Of x [B, N, ...] the entries [B, J, ...] of each row at index_BJ."""
    return jnp.take_along_axis(x, index_BJ.reshape(*index_BJ.shape, *[1] * (x.ndim - 2)), axis=1)


def best(count: int, score_BJ, *others) -> list[jax.Array]:
    """The `count` largest scores [B, count] of each row, and what the others [B, J, ...] have in their places."""
    order_BK = jnp.argsort(-score_BJ)[:, :count]
    return [pick(x, order_BK) for x in (score_BJ, *others)]


def pad_prompts(prompts: list[np.ndarray], least: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [B, P], lengths [B]): each prompt at the right end of its row, P a size of at least `least`."""
    lengths = np.array(list(map(len, prompts)), np.int32)
    P = size_for(lengths.max(), least)
    padded = np.zeros((len(prompts), P), np.int32)
    for row, prompt in zip(padded, prompts):
        row[P - len(prompt) :] = prompt
    return padded, lengths


def before_end(ids: np.ndarray, end_id: int | None) -> np.ndarray:
    """The ids before the first end_id; all where it does not occur, or is None."""
    if end_id is None:
        return ids
    ends = np.flatnonzero(ids == end_id)
    return ids[: ends[0]] if len(ends) else ids
