"""python -m jaxlm.bench --config=FILE.py[:ARG] [--config.KEY=VALUE ...] [--steps=50] [--json=FILE]: how fast it trains.

Runs the train step of a config on the devices that are here, on data that is read as train reads it (random tokens
where there is none), and prints the median and the spread of the step's time and what a step waits for.
--parts times attention, MLP, loss, optimizer, data, checkpoint, imports and start, each alone.
--sweep=DIR times it at other batches, lengths, depths and widths, and draws time against arithmetic.
"""

import json
import platform
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.bench import parts as dissect
from jaxlm.config.check import check, require
from jaxlm.config.keys import COUNTED, ROLES
from jaxlm.config.recipe import load, override, resolve
from jaxlm.data.batches import Prefetch, describe, train_batches
from jaxlm.data.synthetic import random_tokens
from jaxlm.errors import ConfigError, DataError
from jaxlm.evaluate import pictures
from jaxlm.parallel import hosts
from jaxlm.parallel.chips import peak_flops
from jaxlm.parallel.mesh import make_mesh
from jaxlm.plan.measure import Times, begin, peak_memory, time_steps
from jaxlm.run.checkpoint import VERSIONS, versions
from jaxlm.run.process import manage_memory, quick_random_numbers
from jaxlm.run.warm_start import inherit
from jaxlm.step import costs
from jaxlm.step.state import (
    abstract_inputs,
    abstract_state,
    check_sharding,
    init_state,
    jit_train_step,
)

VOCABULARY = 256  # of random tokens, where the config names no other
RANDOM_TOKENS = 4_000_000
WARM_UP = 5
SIZES = {  # what a sweep varies -> the keys that grow with it
    "batch": ("train.batch_size",),
    "sequence": ("data.seq_len",),
    "depth": ("model.num_layers",),
    "width": ("model.embed_dim", "model.num_heads", "model.num_kv_heads", "model.mlp_dim"),
}
FACTORS = (0.5, 1, 2, 4)
TURNS = 5  # of the sizes of a sweep


class Running:
    """The compiled step of a resolved config, its state and its batches: to be timed, again and again."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.mesh = make_mesh(config)
        self.at = 0
        check_sharding(config, self.mesh)
        self.batches = train_batches(config, hosts.local_rows(self.mesh, config.train.batch_size))
        with jax.set_mesh(self.mesh):
            began = time.perf_counter()
            self.step = (
                jit_train_step(config, self.mesh)
                .lower(*abstract_inputs(config, self.mesh))
                .compile()
            )
            self.compile_s = time.perf_counter() - began
            self.state = None

    def place(self, rows: dict) -> dict:
        return hosts.to_global(rows, self.mesh, self.config.train.batch_size)

    def time(self, steps: int, warm_up: int = WARM_UP) -> tuple[Times, list[float]]:
        """(times, losses) of so many steps, after a warm-up."""
        start = self.at
        self.at = self.at + warm_up + steps + 1
        with jax.set_mesh(self.mesh):
            if self.state is None:
                self.state = init_state(self.config, self.mesh)
            else:
                self.state = self.state
            ready = Prefetch(self.batches, start, self.at, self.config.data.prefetch, self.place)
            times, self.state, losses = time_steps(self.step, self.state, ready, steps, warm_up)
            ready.close()
        return times, losses


def bench(config: ConfigDict, steps: int) -> dict:
    """The figures of a resolved config, as --json has them: seconds a step and what they are made of."""
    run = Running(config)
    mesh = run.mesh
    with jax.set_mesh(mesh):
        run.state, before = begin(config, mesh, run.step, run.place(run.batches[0]))
    times, losses = run.time(steps)
    peak = peak_memory(mesh, before)
    seconds = float(np.median(times.step))
    tokens = config.train.batch_size * config.data.seq_len
    chip = peak_flops(mesh.local_devices[0].device_kind)
    flops = costs.flops_per_token(config, abstract_state(config)[0].params)
    return {
        "step_ms": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": flops * tokens / seconds / (chip * mesh.size) if chip else None,
        "data_wait_ms": 1e3 * float(np.mean(times.data)),
        "host_ms": 1e3 * float(np.median(times.host)),
        "compile_s": run.compile_s,
        "peak_bytes": peak,
        "step_ms_spread": spread(times),
        "steps": steps,
        "loss": losses[-1],
        "flops_per_token": flops,
        "parameters": costs.num_parameters(run.state.params),
        "tokens_per_step": tokens,
        "attention": dict(costs.attention_lines(config, mesh)).get("attention"),
    }


def spread(times: Times) -> dict[str, float]:
    names = {"min": 0, "p10": 10, "p90": 90, "max": 100}
    return {
        name: 1e3 * float(np.percentile(times.step, percent)) for name, percent in names.items()
    }


def lines(figures: dict) -> list[str]:
    f = figures
    low = figures["step_ms_spread"]
    share = f["data_wait_ms"] / f["step_ms"]
    if f["mfu"] is None:
        mfu = "no peak is known for this chip"
    else:
        mfu = f"{f['mfu']:.1%}"
    if f["peak_bytes"] is None:
        peak = "not told here"
    else:
        peak = costs.human(f["peak_bytes"])
    return [
        f"step            {f['step_ms']:10.2f} ms, the median of {f['steps']} (min {low['min']:.2f}, "
        f"10-90%: {low['p10']:.2f}-{low['p90']:.2f}, max {low['max']:.2f})",
        f"tokens/s        {f['tokens_per_second']:10,.0f}",
        f"MFU             {mfu:>10}  (6 per parameter + 12 x width x length a layer, as PaLM counts)",
        f"waits for data  {f['data_wait_ms']:10.3f} ms a step, {share:.2%}",
        f"host            {f['host_ms']:10.3f} ms a step, in Python",
        f"compile         {f['compile_s']:10.2f} s",
        f"peak memory     {peak:>10}",
    ]


# ---------------------------------------------------------------- data


def with_data(config: ConfigDict, folder: Path) -> tuple[ConfigDict, str, list[str]]:
    """(the config with data that is there, where from, flags that say so): its own, or random tokens in `folder`."""
    config = config.copy_and_resolve_references()
    flags = []
    try:
        vocab_size, config.data.labels, _ = describe(config)
        where = config.data.mixture or config.data.path or config.data.train
    except DataError as error:
        if config.task.name in ROLES or config.data.mixture:
            raise
        vocab_size = config.model.vocab_size or VOCABULARY
        random_tokens(folder, vocab_size, RANDOM_TOKENS, config.seed)
        where = f"random tokens of {vocab_size:,} kinds (config.model.vocab_size), because {str(error).splitlines()[0]}"
        config.data.path = str(folder)
        config.task.name = "lm"
        flags = [f"--config.data.path={folder}", "--config.task.name=lm"]
    config.model.vocab_size = config.model.vocab_size or vocab_size
    return config, where, flags


def machine() -> dict:
    device = jax.devices()[0]
    return {
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions((*VERSIONS, "jaxlib")) | {"python": platform.python_version()},
    }


# ---------------------------------------------------------------- sweep


def sweep(config: ConfigDict, steps: int, folder: Path) -> dict[str, list[dict]]:
    """{what varies: rows of its size, step_ms and FLOPs}, printed and drawn. config: unresolved.

    The sizes of one kind take turns, so that a slow minute of the machine is one of them all.
    """
    found = {}
    for name, keys in SIZES.items():
        runs = []
        rows = []
        for factor in FACTORS:
            scaled = config.copy_and_resolve_references()
            for key in keys:
                section, leaf = key.split(".")
                scaled[section][leaf] = int(scaled[section][leaf] * factor)
            section, leaf = keys[0].split(".")
            if scaled[section][leaf] and not check(
                scaled, jax.device_count()
            ):  # half of one layer is none
                runs.append(Running(resolve(scaled)))
        if not runs:
            continue  # a model without layers
        print(
            f"{name:9} {len(runs)} sizes in {TURNS} turns of {-(-steps // TURNS)} steps", flush=True
        )
        turns = []
        for turn in range(TURNS):
            turns.append(
                [run.time(-(-steps // TURNS), 1 if turn else WARM_UP)[0].step for run in runs]
            )
        for run, seconds in zip(runs, zip(*turns)):
            c, (section, leaf) = run.config, keys[0].split(".")
            flops = costs.flops_per_token(c, run.state.params) * c.train.batch_size * c.data.seq_len
            rows.append(
                {
                    "size": c[section][leaf],
                    "step_ms": 1e3 * float(np.median(seconds)),
                    "flops": flops,
                }
            )
            print(line_of(name, rows), flush=True)
        found[name] = rows
        path = folder / f"{name}.png"
        pictures.growth(
            path,
            f"{name} ({keys[0]})",
            *([row[key] for row in rows] for key in ("size", "step_ms", "flops")),
        )
        print(f"{name}: {path}")
    return found


def line_of(name: str, rows: list[dict]) -> str:
    row = rows[-1]
    text = f"{name:9} {row['size']:>8,}  {row['step_ms']:10.2f} ms"
    if len(rows) > 1:
        time, flops = (row[key] / rows[-2][key] for key in ("step_ms", "flops"))
        text += f"  x {time:.2f}; FLOPs x {flops:.2f}: {time / flops - 1:+.0%}"
    return text


# ---------------------------------------------------------------- the program


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="jaxlm.bench", description=__doc__)
    parser.add_config()
    parser.add_argument(
        "--steps", type=int, default=50, help="timed steps, after a warm-up (default: 50)"
    )
    parser.add_argument(
        "--parts", action="store_true", help="also the parts of a step and of a run, each alone"
    )
    parser.add_argument(
        "--sweep", metavar="DIR", help="also other sizes, at most 20 steps each; pictures go there"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse(argv)
    if args.steps < 1:
        parser.error(f"--steps={args.steps}: must be at least 1")
    cli.require_writable("--json", args.json)
    if args.sweep:
        try:
            Path(args.sweep).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--sweep={args.sweep}: {error.strerror}") from None
    manage_memory()
    quick_random_numbers()
    config = load(args.config)
    problems = override(config, args.overrides) + inherit(config)
    with tempfile.TemporaryDirectory() as folder:
        require(problems)
        if config.model.name in COUNTED:
            raise ConfigError(
                f"config.model.name={config.model.name}: is counted, not trained: it has no step to time"
            )
        config, where, flags = with_data(config, Path(folder) / "tokens")
        print(f"data: {where}", flush=True)
        started = None
        if args.parts:
            require(check(config, vocab_size=config.model.vocab_size))
            given = [f"--config.{key}={text}" for key, text in args.overrides]
            silent = "--config.eval.every=0", "--config.eval.patience=0"
            started = dissect.start([f"--config={args.config}", *given, *flags, *silent])
        require(check(config, jax.device_count(), config.model.vocab_size))
        resolved = resolve(config)
        figures = bench(resolved, args.steps) | machine() | {"config": args.config, "data": where}
        if figures["attention"]:
            attention = f", attention: {figures['attention']}"
        else:
            attention = ""
        tokens = f"{figures['tokens_per_step']:,} tokens a step" + ", padding too" * (
            config.task.name in ROLES
        )
        print(f"{figures['parameters']:,} parameters on {figures['devices']}, {tokens}{attention}")
        print("\n".join(lines(figures)), flush=True)

        def write():
            if args.json:
                return Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
            return None

        write()
        if args.parts:
            figures["parts"] = dissect.parts(resolved, figures["step_ms"]) | {"start": started}
            write()
        if args.sweep:
            figures["sweep"] = sweep(config, min(args.steps, 20), Path(args.sweep))
            write()
    return 0


if __name__ == "__main__":
    cli.run(main)
