"""python -m jaxlm.verify --config=RECIPE [--meshes="fsdp=8; fsdp=4 tensor=2"] [--json=FILE]: prove a config.

Shrinks the config to a tiny one of the same structure (norms, ratio of heads, experts, windows, scan, remat, optimizer)
and shows on 8 fake CPU devices, in float32 and with documents packed into rows, that it computes the same thing:

  on every mesh as on one device: losses over 20 steps, and every parameter's gradient
  resumed as uninterrupted, packed as alone, on 2 hosts as on 1

For every task: the data are random documents or examples of its kind, a teacher is a random model of the same shape.
Exit code 1 where one of these breaks, with the mesh, the parameter and the first place in the model that differs.
"""

import functools
import json
import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.check import check
from jaxlm.config.keys import COUNTED, base
from jaxlm.config.problems import require
from jaxlm.config.recipe import flatten, resolve
from jaxlm.config.sources import from_command_line
from jaxlm.data.batches import train_batches
from jaxlm.errors import ConfigError
from jaxlm.parallel.mesh import make_mesh
from jaxlm.run.inherit import inherit
from jaxlm.step.costs import human
from jaxlm.verify.laws import DEVICES, Result, on_mesh, same_as_one_device, train_on
from jaxlm.verify.packing import packed_as_alone
from jaxlm.verify.runs import runs_agree, xla_flags
from jaxlm.verify.tiny import STEPS, make_data, shrink

MESHES = (
    "data=8", "data=8 zero1", "fsdp=8", "tensor=8", "fsdp=4 tensor=2", "data=2 fsdp=2 tensor=2", "sequence=8 ring",
    "sequence=4 tensor=2 all_gather", "fsdp=2 sequence=2 tensor=2", "stage=4 fsdp=2", "stage=2 fsdp=2 tensor=2",
    "expert=4 data=2", "expert=2 fsdp=2 tensor=2",
)  # fmt: skip


def verify(config: ConfigDict, meshes: list[str] | None = None) -> list[Result]:
    """Every law for this (unresolved) config, each printed as soon as it is known. meshes: instead of MESHES."""
    results = []
    tiny = shrink(config)

    def report(result: Result) -> None:
        results.append(result)
        print(line(result), flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        folder = Path(folder)
        make_data(folder, tiny)
        runs = pool.submit(runs_agree, tiny, folder)  # in processes of their own
        batches = train_batches(resolve(tiny))
        single = resolve(on_mesh(tiny, ""))
        one_device = make_mesh(single, jax.devices()[:1])
        alone = functools.cache(partial(train_on, single, one_device, batches))
        losses = alone(0).losses
        print(
            f"a tiny model of this structure, in float32, without dropout: loss {losses[0]:.4f} -> "
            f"{losses[-1]:.4f} in {STEPS} steps on one device; differences from it:"
        )
        for words in meshes or meshes_of(tiny):
            report(same_as_one_device(tiny, words, alone, batches))
        report(packed_as_alone(tiny, batches))
        for result in runs.result():
            report(result)
    return results


def meshes_of(tiny: ConfigDict) -> list[str]:
    """MESHES, without those along experts where the model has none."""
    return [words for words in MESHES if tiny.model.num_experts or "expert" not in words]


def line(result: Result) -> str:
    """One law as it is printed: verdict, name, figures, and where it broke."""
    figures = result.figures
    if "refused" in figures:
        reason = " ".join(figures["refused"].split())
        return f"{'-':4}  {result.name:30}  not for this model:  {reason}"
    if "gradient_difference" in figures:
        cells = mesh_cells(figures)
    else:
        cells = []
        for key, value in figures.items():
            if key != "place":
                cells.append(f"{key.replace('_', ' ')} {value:.3g}")
    verdict = "ok" if result.ok else "FAIL"
    text = f"{verdict:4}  {result.name:30}  {'  '.join(cells)}"
    if "place" in figures:
        text += f"\n      first difference: {figures['place']}"
    return text


def mesh_cells(figures: dict) -> list[str]:
    cells = [
        f"loss {figures['loss_difference']:.1e}",
        f"gradient {figures['gradient_difference']:.1e} {figures['parameter']:44}",
        f"{human(figures['bytes_per_device']):>10} a device",
        f"{figures['replicated']:6.1%} replicated",
    ]
    if figures["ties"]:
        cells.append(f"after {figures['ties']} ties between experts")
    return cells


# ---------------------------------------------------------------- the program


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="jaxlm.verify", description=__doc__)
    parser.add_config(flatten(base()))
    parser.add_argument(
        "--meshes",
        metavar="MESH; ...",
        help='instead of all that fit the model: "fsdp=8; sequence=4 tensor=2 ring"',
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse(argv)
    cli.require_writable("--json", args.json)
    began = time.perf_counter()
    config, problems = from_command_line(args)
    # Problems are ignored: without those runs, the recipe's own model section is what is verified.
    inherit(config)
    require(problems + check(config))
    if config.model.name in COUNTED:
        raise ConfigError(
            f"config.model.name={config.model.name}: is counted, not trained: there is no step whose gradients could "
            "differ; train it, and evaluate it on any mesh"
        )
    use_fake_devices()
    meshes = None
    if args.meshes is not None:
        meshes = read_meshes(args.meshes, config)
    results = verify(config, meshes)
    failed = [result.name for result in results if not result.ok]
    print(summary(results, failed, time.perf_counter() - began))
    if args.json:
        laws = [{"name": result.name, "ok": result.ok} | result.figures for result in results]
        written = {"config": args.config, "ok": not failed, "laws": laws}
        Path(args.json).write_text(json.dumps(written, indent=1) + "\n")
    return 1 if failed else 0


def use_fake_devices() -> None:
    """DEVICES CPU devices, set up before jax is asked for the first one."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(DEVICES)}"
    cli.spare_threads()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # as in a run on several CPU devices
    # What a tiny model leaves unsharded means nothing for the real one.
    logging.getLogger("jaxlm").setLevel(logging.ERROR)


def read_meshes(text: str, config: ConfigDict) -> list[str]:
    """The meshes of --meshes, in words. Raises ConfigError where one is not valid for the config, or none is given."""
    meshes = [words.strip() for words in text.split(";") if words.strip()]
    if not meshes:
        raise ConfigError('--meshes: empty; give some, such as --meshes="fsdp=8; fsdp=4 tensor=2"')
    tiny = shrink(config)
    problems = []
    for words in meshes:
        problems += check(on_mesh(tiny, words), DEVICES)
    require(problems)
    return meshes


def summary(results: list[Result], failed: list[str], seconds: float) -> str:
    refused = sum("refused" in result.figures for result in results)
    text = f"{len(results) - len(failed) - refused} hold"
    if refused:
        text += f", {refused} not for this model"
    text += f" ({seconds:.0f} s)"
    if failed:
        text += f"; FAILED: {', '.join(failed)}"
    return text


if __name__ == "__main__":
    cli.run(main)
