"""Pieces (jaxlm/data/transforms.py) to the rows of a batch: what keys a task's batches have, and of which shapes."""

import numpy as np
from ml_collections import ConfigDict

from jaxlm.config.tasks import task_of
from jaxlm.data.transforms import TOKENS, Vocabulary


def piece_lengths(piece: dict) -> tuple[int, int]:
    """(positions of the row, of the row of sources) that a piece takes."""
    return piece["tokens"].shape[-1], len(piece.get("enc_tokens", ()))


def lay_out(pieces: list[dict], config: ConfigDict) -> dict[str, np.ndarray]:
    """One row of a batch: the pieces one after the other, those that do not fit cut off."""
    task = task_of(config)
    d = config.data
    row = {}
    for key, (shape, dtype) in row_shapes(config).items():
        row[key] = np.zeros(shape, dtype)
    at = enc_at = 0
    for number, piece in enumerate(pieces, 1):
        n = min(piece_lengths(piece)[0], d.seq_len - at)
        enc_n = min(piece_lengths(piece)[1], d.enc_len - enc_at)
        if n <= 0 or (task.reads_source and enc_n <= 0):
            break
        here = slice(at, at + n)
        row["tokens"][..., here] = piece["tokens"][..., :n]
        row["positions"][..., here] = np.arange(n)
        row["segments"][..., here] = number
        if "targets" in row:
            row["targets"][..., here] = piece["targets"][..., :n]
        if "labels" in row:
            row["labels"][number - 1] = piece["label"]
            row["weights"][number - 1] = piece.get("weight", 1)
        elif "weights" in piece:
            row["weights"][..., here] = piece["weights"][..., :n]
        else:
            row["weights"][..., here] = 1
        if "reach" in row:
            row["reach"][here] = at + np.minimum(piece["reach"][:n], n - 1)
        if "negatives" in row:
            row["negatives"][:, here] = piece["negatives"][:, :n]
        if "enc_tokens" in row:
            there = slice(enc_at, enc_at + enc_n)
            row["enc_tokens"][there] = piece["enc_tokens"][:enc_n]
            row["enc_positions"][there] = np.arange(enc_n)
            row["enc_segments"][there] = number
        at = at + n
        enc_at = enc_at + enc_n
    if "reach" in row:
        row["reach"][at:] = np.arange(at, d.seq_len)
    return row


def row_shapes(config: ConfigDict) -> dict[str, tuple[tuple[int, ...], type]]:
    """{key: (shape, dtype)} of one row of a task's batches. config: resolved."""
    task = task_of(config)
    d = config.data
    T = (d.seq_len,)
    M = (d.examples_per_row,)
    T = (2, *T) if task.is_preference else T
    keys = ["tokens", "positions", "segments"]
    keys += ["targets"] * (not task.labels_examples) + ["reach"] * task.reads_prefix
    shapes = dict.fromkeys(keys, (T, np.int32)) | {
        "weights": (M if task.labels_examples else T, np.float32)
    }
    if task.labels_examples:
        kinds = {"class": (M, np.int32), "number": (M, np.float32)}
        shapes["labels"] = kinds.get(task.answer, ((*M, config.model.num_labels), np.float32))
    if "task.negatives" in task.keys and config.task.negatives:
        shapes["negatives"] = ((config.task.negatives, d.seq_len), np.int32)
    if task.transform == "pairs":
        shapes["counts"] = (T, np.float32)
    if task.reads_source:
        shapes |= dict.fromkeys(
            ("enc_tokens", "enc_positions", "enc_segments"), ((d.enc_len,), np.int32)
        )
    return shapes


def documents_of(batch: dict, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(targets, inputs) of each document, or stretch of one, in a row of token batches."""
    segments = batch["segments"][row]
    return [
        (batch["targets"][row][segments == s], batch["tokens"][row][segments == s])
        for s in np.unique(segments)
        if s
    ]


def from_tokens(
    batch: dict, keys: list[tuple], config: ConfigDict, vocab: Vocabulary
) -> dict[str, np.ndarray]:
    """A batch of config.task from one of plain token rows; what is random in row i follows from keys[i] alone."""
    make = TOKENS[task_of(config).transform]
    rows = []
    for i, key in enumerate(keys):
        rng = np.random.default_rng(key)
        rows.append(
            lay_out(
                [make(*text, rng, config.task, vocab) for text in documents_of(batch, i)], config
            )
        )
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
