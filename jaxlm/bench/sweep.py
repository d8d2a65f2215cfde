"""The step's time at other batches, lengths, depths and widths, beside its arithmetic."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.bench.step import WARM_UP, Running
from jaxlm.config.check import check
from jaxlm.config.recipe import flatten, resolve, set_key
from jaxlm.evaluate import pictures
from jaxlm.step import costs

SIZES = {  # what a sweep varies -> the keys that grow with it
    "batch": ("train.batch_size",),
    "sequence": ("data.seq_len",),
    "depth": ("model.num_layers",),
    "width": ("model.embed_dim", "model.num_heads", "model.num_kv_heads", "model.mlp_dim"),
}
FACTORS = (0.5, 1, 2, 4)
TURNS = 5  # of the sizes of a sweep


def sweep(config: ConfigDict, steps: int, folder: Path) -> dict[str, list[dict]]:
    """{what varies: rows of its size, step_ms and FLOPs}, printed and drawn. config: unresolved."""
    found = {}
    for name, keys in SIZES.items():
        runs = scaled_runs(config, keys)
        if not runs:
            continue  # such as the depth of a model without layers
        steps_of_turn = -(-steps // TURNS)
        print(f"{name:9} {len(runs)} sizes in {TURNS} turns of {steps_of_turn} steps", flush=True)
        seconds = take_turns(runs, steps_of_turn)
        rows = []
        for run, seconds_of_run in zip(runs, seconds):
            rows.append(row_of(run, keys[0], seconds_of_run))
            print(line_of(name, rows), flush=True)
        found[name] = rows
        path = folder / f"{name}.png"
        draw(path, f"{name} ({keys[0]})", rows)
        print(f"{name}: {path}")
    return found


def scaled_runs(config: ConfigDict, keys: tuple[str, ...]) -> list[Running]:
    """The config with these keys times each of FACTORS, where that is valid: half of one layer is not."""
    runs = []
    for factor in FACTORS:
        scaled = config.copy_and_resolve_references()
        for key in keys:
            set_key(scaled, key, int(flatten(config)[key] * factor))
        size = flatten(scaled)[keys[0]]
        if size and not check(scaled, jax.device_count()):
            runs.append(Running(resolve(scaled)))
    return runs


def take_turns(runs: list[Running], steps: int) -> list[list[np.ndarray]]:
    """Of each run, seconds of the steps of each turn. Turns, so that a slow minute of the machine hits all sizes."""
    seconds = [[] for _ in runs]
    for turn in range(TURNS):
        warm_up = 1 if turn else WARM_UP
        for run, found in zip(runs, seconds):
            times, _ = run.time(steps, warm_up)
            found.append(times.step)
    return seconds


def row_of(run: Running, key: str, seconds: list[np.ndarray]) -> dict:
    c = run.config
    tokens = c.train.batch_size * c.data.seq_len
    return {
        "size": flatten(c)[key],
        "step_ms": 1e3 * float(np.median(seconds)),
        "flops": costs.flops_per_token(c, run.state.params) * tokens,
    }


def draw(path: Path, title: str, rows: list[dict]) -> None:
    columns = []
    for key in ("size", "step_ms", "flops"):
        columns.append([row[key] for row in rows])
    pictures.growth(path, title, *columns)


def line_of(name: str, rows: list[dict]) -> str:
    """The last row, beside the one before."""
    row = rows[-1]
    text = f"{name:9} {row['size']:>8,}  {row['step_ms']:10.2f} ms"
    if len(rows) > 1:
        time = row["step_ms"] / rows[-2]["step_ms"]
        flops = row["flops"] / rows[-2]["flops"]
        text += f"  x {time:.2f}; FLOPs x {flops:.2f}: {time / flops - 1:+.0%}"
    return text
