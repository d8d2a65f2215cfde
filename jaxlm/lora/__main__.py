"""python -m jaxlm.lora --workdir=RUN --output=DIR: a run whose adapters (LoRA) are folded into its weights.

DIR is a run directory as jaxlm.load, jaxlm.evaluate, jaxlm.generate and train.init_from expect: of a model without
adapters that computes the same as RUN's. Training goes on from it in another run, with train.init_from=DIR.
"""

import json
from pathlib import PurePath

import jax
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.keys import base
from jaxlm.config.recipe import flatten, resolve
from jaxlm.data.tokenization.specials import write_tokenizer
from jaxlm.errors import ConfigError
from jaxlm.parallel import hosts
from jaxlm.run.adapters import fold_adapters
from jaxlm.run.checkpoint import Checkpoints, describe_tokenizer
from jaxlm.run.next_command import next_command
from jaxlm.run.workdir import Hold, run_directory, write_whole


def merged_config(config: ConfigDict, section: ConfigDict) -> ConfigDict:
    """The config of a merged run. Its parameters are what evaluation used, so it keeps no average of them."""
    config = config.copy_and_resolve_references()
    config.model = section
    config.train.ema = 0.0
    config.optim = base().optim  # the run's own patterns may name adapters
    return resolve(config)


def write_run(
    workdir: PurePath, step: int, params: dict, meta: dict, config: ConfigDict, tokenizer
) -> None:
    """Writes a run directory of these parameters alone: config.json, the tokenizer and checkpoints/STEP."""
    hold = Hold(workdir)
    checkpoints = Checkpoints(workdir, config)
    own = {"config": flatten(config), "tokenizer": describe_tokenizer(tokenizer)}
    checkpoints.save_params(step, params, meta | own)
    checkpoints.close()
    if jax.process_index() == 0:
        write_tokenizer(workdir, tokenizer)
        write_whole(workdir / "config.json", json.dumps(flatten(config), indent=1) + "\n")
    hold.close()


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="jaxlm.lora", description=__doc__)
    parser.add_argument(
        "--workdir", required=True, help="run directory of a training with model.lora_rank"
    )
    parser.add_argument("--output", required=True, help="run directory to make")
    parser.add_argument(
        "--step", default="latest", help="checkpoint: latest, best or a number (default: latest)"
    )
    hosts.add_flags(parser)
    args = parser.parse(argv)
    hosts.connect(args)

    import jaxlm

    output = run_directory(args.output)
    if (output / "config.json").exists():
        raise ConfigError(f"--output={args.output}: there is a run already; give another directory")
    lm = jaxlm.load(args.workdir, step=args.step)
    if not lm.config.model.lora_rank:
        raise ConfigError(
            f"--workdir={args.workdir}: this model has no adapters (model.lora_rank=0); use it as it is"
        )
    with jax.set_mesh(lm.mesh):
        params, section = fold_adapters(lm.params, lm.config.model)
        # An average is float32: what takes the parameters' place has their dtype.
        params = jax.tree.map(lambda x: x.astype(section.param_dtype), params)
    source = Checkpoints(args.workdir)
    meta = source.meta(lm.step)
    source.close()
    config = merged_config(lm.config, section)
    write_run(output, lm.step, params, meta, config, lm.tokenizer)
    then = next_command(config, output, lm.tokenizer)
    print(f"step {lm.step} without adapters is in {output}; {then}")


if __name__ == "__main__":
    cli.run(main)
