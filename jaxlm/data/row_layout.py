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
    row = {}
    for key, (shape, dtype) in row_shapes(config).items():
        row[key] = np.zeros(shape, dtype)
    at = 0
    enc_at = 0
    for number, piece in enumerate(pieces, 1):
        length, enc_length = piece_lengths(piece)
        length = min(length, config.data.seq_len - at)
        enc_length = min(enc_length, config.data.enc_len - enc_at)
        if length <= 0 or (task_of(config).reads_source and enc_length <= 0):
            break
        put_piece(row, piece, number, slice(at, at + length))
        if "enc_tokens" in row:
            put_source(row, piece, number, slice(enc_at, enc_at + enc_length))
        at += length
        enc_at += enc_length
    if "reach" in row:
        row["reach"][at:] = np.arange(at, config.data.seq_len)
    return row


def put_piece(row: dict[str, np.ndarray], piece: dict, number: int, here: slice) -> None:
    """Writes a piece into a stretch of the row, as its segment `number`."""
    length = here.stop - here.start
    row["tokens"][..., here] = piece["tokens"][..., :length]
    row["positions"][..., here] = np.arange(length)
    row["segments"][..., here] = number
    if "targets" in row:
        row["targets"][..., here] = piece["targets"][..., :length]
    if "labels" in row:
        row["labels"][number - 1] = piece["label"]
        row["weights"][number - 1] = piece.get("weight", 1)
    elif "weights" in piece:
        row["weights"][..., here] = piece["weights"][..., :length]
    else:
        row["weights"][..., here] = 1
    if "reach" in row:
        row["reach"][here] = here.start + np.minimum(piece["reach"][:length], length - 1)
    if "negatives" in row:
        row["negatives"][:, here] = piece["negatives"][:, :length]


def put_source(row: dict[str, np.ndarray], piece: dict, number: int, there: slice) -> None:
    """Writes what a piece's encoder reads into a stretch of the row of sources."""
    length = there.stop - there.start
    row["enc_tokens"][there] = piece["enc_tokens"][:length]
    row["enc_positions"][there] = np.arange(length)
    row["enc_segments"][there] = number


def row_shapes(config: ConfigDict) -> dict[str, tuple[tuple[int, ...], type]]:
    """{key: (shape, dtype)} of one row of a task's batches. config: resolved."""
    task = task_of(config)
    d = config.data
    T = (2, d.seq_len) if task.is_preference else (d.seq_len,)
    M = (d.examples_per_row,)
    shapes = {
        "tokens": (T, np.int32),
        "positions": (T, np.int32),
        "segments": (T, np.int32),
        "weights": (T, np.float32),
    }
    if task.labels_examples:
        kinds = {"class": (M, np.int32), "number": (M, np.float32)}
        shapes["labels"] = kinds.get(task.answer, ((*M, config.model.num_labels), np.float32))
        shapes["weights"] = (M, np.float32)
    else:
        shapes["targets"] = (T, np.int32)
    if task.reads_prefix:
        shapes["reach"] = (T, np.int32)
    if "task.negatives" in task.keys and config.task.negatives:
        shapes["negatives"] = ((config.task.negatives, d.seq_len), np.int32)
    if task.transform == "pairs":
        shapes["counts"] = (T, np.float32)
    if task.reads_source:
        for key in ("enc_tokens", "enc_positions", "enc_segments"):
            shapes[key] = ((d.enc_len,), np.int32)
    return shapes


def documents_of(batch: dict, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(targets, inputs) of each document, or stretch of one, in a row of token batches."""
    segments = batch["segments"][row]
    documents = []
    for number in np.unique(segments[segments > 0]):
        here = segments == number
        documents.append((batch["targets"][row][here], batch["tokens"][row][here]))
    return documents


def from_tokens(
    batch: dict, keys: list[tuple], config: ConfigDict, vocab: Vocabulary
) -> dict[str, np.ndarray]:
    """A batch of config.task from one of plain token rows; what is random in row i follows from keys[i] alone."""
    make = TOKENS[task_of(config).transform]
    rows = []
    for i, key in enumerate(keys):
        rng = np.random.default_rng(key)
        pieces = [make(*text, rng, config.task, vocab) for text in documents_of(batch, i)]
        rows.append(lay_out(pieces, config))
    stacked = {}
    for key in rows[0]:
        stacked[key] = np.stack([row[key] for row in rows])
    return stacked
