"""The second law of verify: a document packed into a row with others is computed as if it had the row to itself."""

from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.config.recipe import resolve
from jaxlm.parallel.mesh import make_mesh
from jaxlm.step.forward import rows_of
from jaxlm.step.state import State, eval_step, init_state
from jaxlm.verify.laws import Result, on_mesh
from jaxlm.verify.outputs import first_unlike, module_outputs

NAME = "packed = alone"
HIDDEN_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5  # relative
ROWS = 4  # that are compared
TRIED = 100  # batches, until one has a row of two documents


def packed_as_alone(tiny: ConfigDict, batches) -> Result:
    """A document's hidden states and loss are the same whatever is packed beside it, and as in a row of its own."""
    config = resolve(on_mesh(tiny, ""))
    if not config.data.isolate:
        reason = "data.isolate=False: documents in a row are meant to see each other"
        return Result(NAME, True, {"refused": reason})
    batch = packed_rows(batches)
    if batch is None:
        return Result(NAME, True, {"refused": "no row of this data holds two examples"})
    mesh = make_mesh(config, jax.devices()[:1])
    state = init_state(config, mesh)
    outputs = module_outputs(config, state.params, batch, mesh)
    others = module_outputs(config, state.params, first_changed(batch), mesh)
    place = first_unlike(after_first(outputs, batch), dict(after_first(others, batch)))
    if place:
        place = f"{place} depends on the document before, in the same row"
        return Result(NAME, False, {"place": place})
    alone = unpacked(batch)
    _, hidden = outputs[-1]
    _, hidden_alone = module_outputs(config, state.params, alone, mesh)[-1]
    figures = {
        "hidden_difference": hidden_difference(batch, hidden, hidden_alone),
        "loss_difference": loss_difference(config, state, batch, alone, mesh),
    }
    if figures["hidden_difference"] >= HIDDEN_TOLERANCE:
        figures["place"] = "positions: a document alone has other hidden states"
    elif figures["loss_difference"] >= LOSS_TOLERANCE:
        figures["place"] = "the loss: its sums are not those over the examples alone"
    return Result(NAME, "place" not in figures, figures)


def is_packed(segments: np.ndarray) -> np.ndarray:
    """[B]: which rows hold more than one document. segments: [B, ..., T], 0 being padding."""
    return segments.max(axis=tuple(range(1, segments.ndim))) > 1


def packed_rows(batches) -> dict | None:
    """A few rows of more than one document, of the first batch that has one; None where none has."""
    for k in range(TRIED):
        batch = batches[k]
        packed = is_packed(batch["segments"])
        if packed.any():
            return {name: x[packed][:ROWS] for name, x in batch.items()}
    return None


def first_changed(batch: dict) -> dict:
    """The batch with other tokens in the first document of each row."""
    other = dict(batch)
    for tokens, segments in (("tokens", "segments"), ("enc_tokens", "enc_segments")):
        if tokens in batch:
            changed = (batch[tokens] + 1) % 100
            other[tokens] = np.where(batch[segments] == 1, changed, batch[tokens])
    return other


def after_first(outputs: list[tuple[str, np.ndarray]], batch: dict) -> list:
    """The outputs [B, T, D] of modules, zero except in the documents after the first."""
    later = []
    for module, x in outputs:
        if x.ndim == 3:
            segments = rows_of(batch)["segments"]
            if module.startswith("encoder/"):
                segments = batch["enc_segments"]
            later.append((module, np.where(segments[..., None] > 1, x, 0)))
    return later


def documents(segments: np.ndarray) -> np.ndarray:
    """The numbers of the documents in a row, without padding."""
    numbers = np.unique(segments)
    return numbers[numbers > 0]


def unpacked(batch: dict) -> dict:
    """The same documents or examples, each at the start of a row of its own."""
    rows = []
    for i in range(len(batch["tokens"])):
        row = {name: x[i] for name, x in batch.items()}
        for number in documents(row["segments"]):
            rows.append(alone_in_row(row, number))
    result = {}
    for name in batch:
        result[name] = np.stack([row[name] for row in rows])
    return result


def alone_in_row(row: dict, number: int) -> dict:
    """One document of a row, moved to its start."""
    segments = row["segments"]
    here = segments.reshape(-1, segments.shape[-1])[0] == number
    alone = {}
    for name, x in row.items():
        alone[name] = np.zeros_like(x)
        if "labels" in row and name in ("labels", "weights"):  # one for each example
            alone[name][0] = x[number - 1]
            continue
        if name.startswith("enc_"):
            part = x[..., row["enc_segments"] == number]
        else:
            part = x[..., here]
        alone[name][..., : part.shape[-1]] = part
    for name in ("segments", "enc_segments"):
        if name in row:
            alone[name] = np.minimum(alone[name], 1)
    if "reach" in row:
        start = np.argmax(here)
        alone["reach"] = np.maximum(alone["reach"] - start, np.arange(len(here)))
    return alone


def hidden_difference(batch: dict, hidden: np.ndarray, hidden_alone: np.ndarray) -> float:
    """The largest, between documents in packed rows and the same in rows of their own, in the order of `unpacked`."""
    segments = rows_of(batch)["segments"]
    pairs = batch["segments"].shape[1] if batch["segments"].ndim == 3 else 1
    alone = iter(hidden_alone)
    largest = []
    for first in range(0, len(segments), pairs):  # the rows of a pair follow one another
        for number in documents(segments[first]):
            for row in range(first, first + pairs):
                here = segments[row] == number
                difference = hidden[row, here] - next(alone)[: here.sum()]
                largest.append(float(np.max(np.abs(difference))))
    assert len(largest) == len(hidden_alone)
    return max(largest)


def loss_difference(config: ConfigDict, state: State, batch: dict, alone: dict, mesh) -> float:
    packed_sums = sums_of_loss(config, state, batch, mesh)
    alone_sums = sums_of_loss(config, state, alone, mesh)
    differences = []
    for key, packed_sum in packed_sums.items():
        differences.append(abs(packed_sum - alone_sums[key]) / max(abs(packed_sum), 1e-6))
    return max(differences)


def sums_of_loss(config: ConfigDict, state: State, batch: dict, mesh) -> dict[str, float]:
    """What eval_step sums over a batch."""
    with jax.set_mesh(mesh):
        evaluate = jax.jit(partial(eval_step, config=config))
        sums, _ = evaluate(state.params, batch, state.teacher)
    return {"loss": float(sums["loss"]), "weight": float(sums["weight"])}
