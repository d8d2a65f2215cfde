"""jaxlm PROGRAM [FLAGS]: one command for every program; `python -m jaxlm.PROGRAM` is the same."""

import runpy
import sys

from jaxlm.cli import did_you_mean

PROGRAMS = {  # in the order of a model's life: name -> (module, what it does)
    "prepare": ("jaxlm.data.prepare", "turns raw text into shards of tokens"),
    "plan": (
        "jaxlm.plan",
        "compiles a run for a pod that is not here: its memory, time and traffic",
    ),
    "verify": ("jaxlm.verify", "shows that a config computes the same on every mesh"),
    "train": ("jaxlm.train", "trains a model, or goes on with a run"),
    "evaluate": ("jaxlm.evaluate", "measures trained models"),
    "generate": ("jaxlm.generate", "writes and answers with a trained model"),
    "tune": ("jaxlm.tune", "searches a config for better values"),
    "fitting": ("jaxlm.fitting", "says which of several runs underfits, and which overfits"),
    "lora": ("jaxlm.lora", "folds a run's adapters into its weights"),
    "bench": ("jaxlm.bench", "measures how fast a config trains on the devices here"),
}
HELP = ("-h", "--help", "help")


def usage() -> str:
    lines = [
        "usage: jaxlm PROGRAM [FLAGS]",
        "",
        "programs (jaxlm PROGRAM --help lists the flags of each):",
    ]
    lines += [f"  {name:<10}{what}" for name, (_, what) in PROGRAMS.items()]
    return "\n".join(lines)


def main() -> None:
    """Runs the program that the first word names, as `python -m` would. Exits with 2 where there is none."""
    words = sys.argv[1:]
    if not words or words[0] in HELP:
        print(usage())
        sys.exit(0)
    name = words[0].removeprefix("data.")
    if name not in PROGRAMS:
        hint = did_you_mean(name, PROGRAMS)
        print(f"error: there is no program {words[0]}{hint} (see jaxlm --help)", file=sys.stderr)
        sys.exit(2)
    module, _ = PROGRAMS[name]
    sys.argv = [f"jaxlm {name}", *words[1:]]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
