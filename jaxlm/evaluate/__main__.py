"""python -m jaxlm.evaluate --workdir=DIR [--workdir=DIR ...]: measures a model, or several in one table.

By itself what its task is measured by, over the whole validation set, every token and every example once; --tasks
chooses. Bits per byte compares models with different tokenizers: total nats / ln 2 / bytes of the text that was
predicted (all of it, but for the first character of each document with --tokenizer=chars).
"""

import gzip
import json
import math
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.keys import BLEU_TOKENIZERS
from jaxlm.config.tasks import task_of
from jaxlm.data.batches import open_stores
from jaxlm.data.bits_per_byte import why_none_of
from jaxlm.data.store import Store
from jaxlm.errors import ConfigError, DataError
from jaxlm.evaluate.report import REPORTS, comparison, report, table
from jaxlm.generate.lm import load
from jaxlm.parallel import hosts
from jaxlm.run.warm_start import read_teacher
from jaxlm.step.costs import num_parameters


def gzip_bits_per_byte(stores: list[Store], tokenizer) -> float:
    """Of `gzip -9` on the text of these splits, decoded from the tokens: a baseline that everybody has."""
    size = 0
    num_bytes = 0
    for store in stores:
        ids = store.read(0, store.num_tokens)
        if store.eos_id is not None:
            ids = ids[ids != store.eos_id]
        text = tokenizer.decode(ids).encode()
        size += len(gzip.compress(text, 9))
        num_bytes += len(text)
    return 8 * size / num_bytes


def parser_of_flags() -> cli.Parser:
    parser = cli.Parser(prog="jaxlm.evaluate", description=__doc__)
    add = parser.add_argument
    add(
        "--workdir",
        action="append",
        required=True,
        help="run directory of jaxlm.train; may be given again",
    )
    add("--data", help="a prepared directory, or files of examples (default: those of the run)")
    add("--columns", help='of these files: "text=0 label=1" (default: as in training)')
    add("--step", default="latest", help="latest, best or a number (default: latest)")
    add(
        "--tasks",
        help=f"of {', '.join(REPORTS)}, with commas between (default: what the model is for)",
    )
    add("--beams", type=int, help="hypotheses of a beam search, for texts (default: the run's)")
    add("--length_penalty", type=float, help="of a beam search (default: the run's)")
    add("--max_tokens", type=int, help="tokens of an answer, at most (default: the run's)")
    add(
        "--bleu_tokenize",
        choices=BLEU_TOKENIZERS,
        help="sacrebleu's tokenizer for BLEU (default: the run's)",
    )
    add(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="resamplings for intervals; 0: none",
    )
    add("--pictures", metavar="DIR", help="write pictures there, .png")
    add("--answers", metavar="FILE", help="write every example with what the model says, .jsonl")
    add("--gzip", action="store_true", help="also bits per byte of gzip -9 on the same text")
    add("--json", metavar="FILE", help="also write the figures there")
    hosts.add_flags(parser)
    return parser


def reports_of(tasks: str | None) -> list[str] | None:
    """The reports that --tasks names; None where it is not given. Raises ConfigError of a word that is none."""
    if tasks is None:
        return None
    words = list(map(str.strip, tasks.split(",")))
    for word in words:
        if word not in REPORTS:
            hint = cli.did_you_mean(word, REPORTS)
            raise ConfigError(f"--tasks={tasks}: no {word!r}{hint} ({', '.join(REPORTS)})")
    return words


def main(argv: list[str]) -> None:
    args = parser_of_flags().parse(argv)
    cli.require_writable("--json", args.json)
    cli.require_writable("--answers", args.answers)
    asked = reports_of(args.tasks)
    several = len(args.workdir) > 1
    if several and (args.pictures or args.answers or args.gzip):
        raise ConfigError("--pictures, --answers and --gzip are of one run: give one --workdir")

    hosts.connect(args)
    results = {workdir: evaluate(workdir, asked, args) for workdir in args.workdir}
    if jax.process_index():
        return  # the first process prints
    if several:
        result = results
        lines = comparison(results)
    else:
        result = results[args.workdir[0]]
        lines = table(result)
    print("\n".join(lines))
    if args.json:
        Path(args.json).write_text(json.dumps(finite(result), indent=1, allow_nan=False) + "\n")


def finite(value):
    """The same, with a text for each number that JSON has none for (nan, inf), as metrics.jsonl has it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def evaluate(workdir: str, asked: list[str] | None, args) -> dict:
    """The figures of a run. asked: reports; None: the usual ones of its task. args: those of the command line.

    Raises ConfigError of a flag that means nothing to the run's task, DataError of data of another tokenizer.
    """
    lm = load(workdir, step=args.step)
    config = lm.config.copy_and_resolve_references()
    config.eval.batches = config.eval.generate = 0
    apply_flags(config, args)
    if not task_of(config).from_examples:
        require_tokenizer(config, lm.tokenizer)
    if args.gzip and lm.tokenizer.name == "words":
        raise ConfigError("--gzip: a tokenizer of words does not give the text back whole")
    with jax.set_mesh(lm.mesh):
        if config.task.teacher_model:
            lm.teacher = read_teacher(config, lm.mesh)
        if task_of(config).from_examples:
            data = config.data.val
        else:
            data = config.data.mixture or config.data.path
        result = {"data": data, "step": lm.step, **report(lm, config, asked, workdir, args)}
    if args.gzip and not jax.process_index():
        stores = open_stores(config, "val")
        if not why_none_of(stores, lm.tokenizer):
            result["gzip_bits_per_byte"] = gzip_bits_per_byte(stores, lm.tokenizer)
    about = {"model": config.model.name, "task": config.task.name}
    return about | {"parameters": num_parameters(lm.params)} | result


def apply_flags(config: ConfigDict, args) -> None:
    """Sets the config's keys that flags replace. Raises ConfigError of a flag that means nothing to the task."""
    for key in ("beams", "length_penalty", "max_tokens", "bleu_tokenize"):
        if getattr(args, key) is not None:
            config.eval[key] = getattr(args, key)
            if not task_of(config).writes_text and len(args.workdir) == 1:
                raise ConfigError(
                    f"--{key}: not for a model of task {config.task.name}, which writes no answers"
                )
    if args.answers and not task_of(config).from_examples:
        raise ConfigError(
            f"--answers={args.answers}: task {config.task.name} has no examples to answer"
        )
    if args.columns and not task_of(config).from_examples:
        raise ConfigError(
            f"--columns={args.columns}: task {config.task.name} has no files of examples"
        )
    if args.columns is not None:
        config.data.columns = args.columns
    if args.data and task_of(config).from_examples:
        config.data.val = args.data
    elif args.data:
        config.data.path = args.data
        config.data.mixture = ""


def require_tokenizer(config: ConfigDict, tokenizer) -> None:
    """Raises DataError where the data were prepared with another tokenizer."""
    stores = open_stores(config, "val")
    if stores[0].manifest["tokenizer"]["sha256"] != tokenizer.fingerprint:
        raise DataError(
            f"{config.data.path} was prepared with another tokenizer than the model's; prepare it with "
            f"--tokenizer=DIR, DIR being the data that the model was trained on"
        )


if __name__ == "__main__":
    cli.run(main)
