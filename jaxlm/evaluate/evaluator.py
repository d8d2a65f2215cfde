"""A model measured over a validation split on its mesh, every example once: in training, and by jaxlm.evaluate."""

import importlib.util
import logging
import math
from functools import cache, partial

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxlm.config.check import mixture
from jaxlm.config.keys import WRITTEN
from jaxlm.data.batches import Prefetch, eval_rows, open_sources, open_stores, validation_batches
from jaxlm.data.bits_per_byte import predicted_bytes, why_none_of
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.errors import DataError
from jaxlm.evaluate.metrics import bleu_scorer
from jaxlm.evaluate.score import (
    SCORED,
    attempt,
    bleu_options,
    left_out,
    score,
    score_texts,
    warn_once,
)
from jaxlm.generate.answer import of_examples
from jaxlm.parallel import hosts
from jaxlm.step.state import eval_step


class Evaluator:
    """Compiles once; `evaluator(params)` runs over config.data's validation split, or its first eval.batches."""

    def __init__(self, config: ConfigDict, mesh, tokenizer=None):
        """tokenizer: the model's, where that is not config.data's own."""
        if config.task.name in WRITTEN and config.eval.generate:
            bleu_scorer(**bleu_options(config))  # so that what is missing is told before step 1
        self.config = config
        self.mesh = mesh
        self.sources = open_sources(config, "val", tokenizer)
        self.batches = validation_batches(
            config, hosts.local_rows(mesh, eval_rows(config)), self.sources
        )
        self.step = jax.jit(
            partial(eval_step, config=config), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self.samples = []  # of the last evaluation: examples, each with the model's answer
        self.num_bytes = self.bytes_of_text() if config.task.name == "lm" else None

    def bytes_of_text(self) -> int | None:
        """Of all that is foretold; None, and that is told, where the tokenizer doesn't know all of it."""
        paths = [path for path, _ in mixture(self.config)]
        stores = open_stores(self.config, "val")
        if why := why_none_of(stores, tokenizers.load(paths[0])):
            warn_once(why)
            return None
        return sum(map(predicted_bytes, stores, paths))

    def leaves_out(self) -> str:
        """In words, what an evaluation leaves out of the split; empty where nothing."""
        e = self.config.eval
        whole = len(self.batches)
        said = []
        if 0 < e.batches < whole:
            said.append(f"the first {e.batches:,} of {whole:,} batches (eval.batches)")
        if self.config.task.name in WRITTEN and 0 < e.generate < (
            total := len(self.sources[0].examples)
        ):
            said.append(f"texts for the first {e.generate:,} of {total:,} examples (eval.generate)")
        return ", and ".join(said)

    def __call__(self, params, teacher=None) -> dict:
        """The figures of a task: loss (nats), and what jaxlm/evaluate/score.py makes of its examples' scores or texts.

        What can't be made of these is left out, and that is told. Raises what `run` does, and score.FAULTS.
        """
        config = self.config
        sums, scores, complete = self.run(params, teacher)
        result = self.figures(sums, complete)
        if scores is not None and installed():
            result |= self.scored(scores)
        if config.task.name in WRITTEN and config.eval.generate:
            self.samples = []
            texts = partial(
                score_texts,
                config,
                self.sources[0],
                params,
                config.eval.generate,
                self.samples.extend,
            )
            result |= attempt("this evaluation gives no figures of texts", texts)
        return result

    def scored(self, scores: dict) -> dict:
        """The task's figures, with a line for each that has no meaning; none of scores that have none, such as NaN."""
        source = self.sources[0]
        only = "this evaluation gives only the loss"  # train.max_skipped ends runs whose scores stay NaN
        figures = attempt(only, partial(score, self.config, source, scores))
        for line in left_out(self.config, source, scores, figures) if figures else ():
            warn_once(line)
        return {name: x for name, x in figures.items() if isinstance(x, float)}

    def figures(self, sums: dict, complete: bool) -> dict:
        """Means of the sums; of text also perplexity and tokens, and of all of a text bits_per_byte and bytes."""
        result = {}
        for name, value in sums.items():
            if name != "weight":
                result[name] = value / sums["weight"]
        if self.config.task.name in (*SCORED, "dpo"):
            return result | (
                {"pairs": int(sums["weight"])} if self.config.task.name == "dpo" else {}
            )
        if self.config.task.name == "glove":
            return result | {"pairs": int(sums["weight"])}
        if not self.config.task.negatives:  # whose nats are of no distribution over the vocabulary
            result["perplexity"] = math.exp(min(result["loss"], 700.0))
        result["tokens"] = int(sums["weight"])
        if complete and self.num_bytes:
            result |= {
                "bits_per_byte": sums["loss"] / math.log(2) / self.num_bytes,
                "bytes": self.num_bytes,
            }
        return result

    def run(self, params, teacher=None) -> tuple[dict, dict | None, bool]:
        """(float64 sums over the batches, {example: its scores} where the task has them, whether that was all)."""
        whole = len(self.batches)
        B = eval_rows(self.config)
        stop = min(self.config.eval.batches or whole, whole)

        def place(rows):
            return hosts.to_global(rows, self.mesh, B)

        sums = {}
        rows = []
        for batch in Prefetch(self.batches, 0, stop, self.config.data.prefetch, place):
            part, scores = self.step(params, batch, teacher)
            sums = {
                key: sums.get(key, 0.0) + float(value)
                for key, value in jax.device_get(part).items()
            }
            if self.config.task.name in SCORED:
                rows += list(hosts.fetch(scores))
        if not sums["weight"]:
            raise DataError(
                "the validation split has nothing that counts: prepare the data with a larger --val_fraction"
            )
        scores = of_examples(self.sources[0], rows) if rows else None
        return sums, scores, stop == whole


@cache
def installed() -> bool:
    """Whether the libraries of jaxlm/evaluate/metrics.py are here; training goes on without."""
    here = importlib.util.find_spec("scipy") is not None
    if not here:
        logging.getLogger("jaxlm").warning(
            'F1, AUC and other figures in training need: pip install -e ".[eval]"'
        )
    return here
