"""python -m jaxlm.evaluate --workdir=DIR: loss, perplexity and bits per byte over the whole validation set.

Every token of the split counts once. Bits per byte compares models with different tokenizers: total nats / ln 2 / bytes
of the text that was predicted (all of it, but for the first character of each document with --tokenizer=chars).
"""

import gzip
import json
import math
from functools import partial
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.check import mixture
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.pipeline import eval_rows, open_sources, open_stores, prefetch, validation_batches
from jaxlm.data.store import Store
from jaxlm.errors import ConfigError, DataError
from jaxlm.parallel import hosts
from jaxlm.respond import of_examples
from jaxlm.score import SCORED, WRITTEN, score, score_texts
from jaxlm.state import eval_step


class Evaluator:
    """Compiles once; `evaluator(params)` runs over config.data's validation split, or its first eval.batches."""

    def __init__(self, config: ConfigDict, mesh, tokenizer=None):
        """tokenizer: the model's, where that is not config.data's own."""
        self.config, self.mesh = config, mesh
        self.sources = open_sources(config, "val", tokenizer)
        self.batches = validation_batches(config, hosts.local_rows(mesh, eval_rows(config)), self.sources)
        self.step = jax.jit(partial(eval_step, config=config), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self.num_bytes = None
        if config.task.name == "lm":
            paths = [path for path, _ in mixture(config)]
            self.num_bytes = sum(map(predicted_bytes, open_stores(config, "val"), paths))

    def __call__(self, params, teacher=None) -> dict:
        """The figures of a task: always loss (nats), and what jaxlm/score.py makes of the scores of its examples.

        For text also perplexity, tokens, and over the whole split bits_per_byte and bytes.
        """
        sums, scores, complete = self.run(params, teacher)
        means = {key: value / sums["weight"] for key, value in sums.items() if key != "weight"}
        if scores is not None:
            return means | {"examples": len(scores)} | score(self.config, self.sources[0], scores)
        unit = "pairs" if self.config.task.name == "dpo" else "tokens"
        result = means | {"perplexity": math.exp(min(means["loss"], 700.0)), unit: int(sums["weight"])}
        if unit == "pairs":
            del result["perplexity"]
        if complete and self.num_bytes:
            result |= {"bits_per_byte": sums["loss"] / math.log(2) / self.num_bytes, "bytes": self.num_bytes}
        if self.config.task.name in WRITTEN and self.config.eval.generate:
            result |= score_texts(self.config, self.sources[0], params, self.config.eval.generate)
        return result

    def run(self, params, teacher=None) -> tuple[dict, list | None, bool]:
        """(float64 sums over the batches, the scores of each example where the task has them, whether that was all)."""
        whole, B = len(self.batches), eval_rows(self.config)
        stop = min(self.config.eval.batches or whole, whole)
        place = lambda rows: hosts.to_global(rows, self.mesh, B)
        sums, rows = {}, []
        for batch in prefetch(self.batches, 0, stop, self.config.data.prefetch, place):
            part, scores = self.step(params, batch, teacher)
            sums = {key: sums.get(key, 0.0) + float(value) for key, value in jax.device_get(part).items()}
            if self.config.task.name in SCORED:
                rows += list(hosts.fetch(scores))
        if not sums["weight"]:
            raise DataError(
                "the validation split has nothing that counts: prepare the data with a larger --val_fraction"
            )
        scores = of_examples(self.sources[0], rows) if rows else None
        return sums, scores, stop == whole


def predicted_bytes(store: Store, path: str) -> int:
    """UTF-8 bytes of a split's text, without the first tokens of documents where nothing precedes them."""
    if store.bos_id is not None:
        return store.num_bytes
    first = store.rows(store.document_starts(0, store.num_tokens), 1)
    return store.num_bytes - len(tokenizers.load(path).decode(first).encode())


def gzip_bits_per_byte(stores: list[Store], tokenizer) -> float:
    """Of `gzip -9` on the text of these splits, decoded from the tokens: a baseline that everybody has."""
    size = num_bytes = 0
    for store in stores:
        ids = store.read(0, store.num_tokens)
        text = tokenizer.decode(ids[ids != store.eos_id] if store.eos_id is not None else ids).encode()
        size, num_bytes = size + len(gzip.compress(text, 9)), num_bytes + len(text)
    return 8 * size / num_bytes


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="jaxlm.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="run directory of jaxlm.train")
    parser.add_argument("--data", help="a prepared directory (default: the one of the run)")
    parser.add_argument("--step", default="latest", help="latest, best or a number (default: latest)")
    parser.add_argument("--gzip", action="store_true", help="also bits per byte of gzip -9 on the same text")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    hosts.add_flags(parser)
    args = parser.parse(argv)
    if args.json and not Path(args.json).parent.is_dir():
        raise ConfigError(f"--json={args.json}: there is no directory {Path(args.json).parent}")

    hosts.connect(args)

    import jaxlm

    lm = jaxlm.load(args.workdir, step=args.step)
    config = lm.config.copy_and_resolve_references()
    config.eval.batches = 0
    if args.data:
        config.data.path, config.data.mixture = args.data, ""
    stores = open_stores(config, "val")
    if stores[0].manifest["tokenizer"]["sha256"] != lm.tokenizer.fingerprint:
        raise DataError(
            f"{config.data.path} was prepared with another tokenizer than the model's; prepare it with "
            f"--tokenizer=DIR, DIR being the data that the model was trained on"
        )
    with jax.set_mesh(lm.mesh):
        result = {"step": lm.step, **Evaluator(config, lm.mesh)(lm.params)}
    if jax.process_index():
        return  # the first process tells
    if args.gzip:
        result["gzip_bits_per_byte"] = gzip_bits_per_byte(stores, lm.tokenizer)
    width = max(map(len, result))
    for key, value in result.items():
        print(f"{key:{width}}  {value:,}" if isinstance(value, int) else f"{key:{width}}  {value:.4f}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
