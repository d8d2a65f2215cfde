"""How surprising texts are to a model: nats of each token, and bits of each byte."""

import logging
import math
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm.data.batches import eval_rows
from jaxlm.data.bits_per_byte import why_dropped, why_none
from jaxlm.data.tokenization.base import replace_surrogates
from jaxlm.parallel.hosts import fetch, to_global
from jaxlm.step.forward import mesh_order
from jaxlm.step.losses import token_losses


class TextLoss(NamedTuple):
    """Of one text. tokens: how many are counted; without any, the two others are nan."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int


def text_losses(lm, texts: list[str]) -> list[TextLoss]:
    """See LM.loss."""
    T = lm.config.data.seq_len
    rows = []
    owners = []  # the number of the text that a row is of
    for owner, text in enumerate(texts):
        ids = lm.tokenizer.encode(text)
        for start in range(0, len(ids), T):
            rows.append(row_of(lm.tokenizer, ids, start, T))
            owners.append(owner)
    nats_N = np.zeros(len(texts))
    counted_N = np.zeros(len(texts))
    for owner, row, nats in zip(owners, rows, losses_of_rows(lm, rows)):
        nats_N[owner] += nats
        counted_N[owner] += row["weights"].sum()
    sizes = predicted_bytes(lm.tokenizer, texts)
    return list(map(text_loss, nats_N.tolist(), counted_N.tolist(), sizes))


def text_loss(nats: float, counted: float, size: float) -> TextLoss:
    per_token = math.nan
    per_byte = math.nan
    if counted:
        per_token = nats / counted
        per_byte = nats / math.log(2) / size
    return TextLoss(per_token, per_byte, int(counted))


def losses_of_rows(lm, rows: list[dict]) -> np.ndarray:
    """float32 [rows]: weighted nats, in batches of one size."""
    B = min(eval_rows(lm.config), 1 << max(len(rows) - 1, 0).bit_length())
    config = FrozenConfigDict(lm.config)
    found = []
    with jax.set_mesh(lm.mesh):
        for start in range(0, len(rows), B):
            chunk = rows[start : start + B]
            chunk = chunk + [chunk[0]] * (B - len(chunk))
            batch = {}
            for key in chunk[0]:
                batch[key] = np.stack([row[key] for row in chunk])
            batch = to_global(batch, lm.mesh, B)
            found.extend(fetch(row_losses(lm.model, lm.params, batch, config)))
    return np.array(found[: len(rows)], np.float32)


@partial(jax.jit, static_argnames=("model", "config"))
def row_losses(model, params, batch, config):
    """float32 [B]: weighted nats of each row."""
    batch, places = mesh_order(batch)
    return (token_losses(model, params, batch, places, config)[0] * batch["weights"]).sum(axis=1)


def row_of(tokenizer, ids: np.ndarray, start: int, T: int) -> dict[str, np.ndarray]:
    """The batch row, each value [T], whose targets are ids[start : start + T]."""
    targets = ids[start : start + T]
    bos = tokenizer.bos_id
    first = bos
    if start:
        first = ids[start - 1]
    elif bos is None:
        first = targets[0]
    weights = np.ones(len(targets))
    segments = np.ones(len(targets))
    if bos is None and not start:  # nothing stands before the first token, so it can't be predicted
        weights[0] = 0
        segments[0] = 0
    row = {"tokens": np.concatenate([[first], targets[:-1]]), "targets": targets}
    row |= {"segments": segments, "weights": weights}
    for key, value in row.items():
        dtype = np.float32 if key == "weights" else np.int32
        row[key] = np.pad(value, (0, T - len(targets))).astype(dtype)
    return row | {"positions": np.arange(T, dtype=np.int32)}


def predicted_bytes(tokenizer, texts: list[str]) -> list[float]:
    """UTF-8 bytes of what is predicted of each text; nan, with a warning, where the tokenizer loses some of it."""
    sizes = []
    flawed = 0  # texts with unknown tokens
    unknown = 0  # of their tokens
    total = 0
    dropped = 0  # characters
    for text in texts:
        ids = tokenizer.encode(text)
        size = len(replace_surrogates(text)[0].encode())
        if tokenizer.bos_id is None:
            size -= len(tokenizer.decode(ids[:1]).encode())
        here = int(np.sum(ids == tokenizer.unknown_id))
        if here:
            flawed += 1
            unknown += here
            total += len(ids)
            size = math.nan
        elif tokenizer.may_lose(ids):
            lost = tokenizer.lost(text)
            if lost:
                dropped += len("".join(lost))
                size = math.nan
        sizes.append(size)
    reasons = (
        why_none(unknown, total, f"{flawed:,} of the {len(texts):,} texts"),
        why_dropped(dropped, "these texts"),
    )
    for why in filter(None, reasons):
        logging.getLogger("jaxlm").warning(why)
    return sizes
