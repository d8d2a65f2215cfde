"""A model measured over a validation split on its mesh, every example once: in training, and by jaxlm.evaluate."""

import importlib.util
import logging
import math
from collections import defaultdict
from functools import cache, partial

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxlm.config.check import mixture
from jaxlm.config.tasks import task_of
from jaxlm.data.batches import Prefetch, eval_rows, open_sources, open_stores, validation_batches
from jaxlm.data.bits_per_byte import predicted_bytes, why_none_of
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.errors import DataError
from jaxlm.evaluate.metrics import bleu_scorer
from jaxlm.evaluate.score import (
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
    """Compiles once; `evaluator(params)` runs over config.data's validation split, or its first eval.batches.

    Raises ConfigError where texts are to be scored, and what sacrebleu needs is not installed.
    """

    def __init__(self, config: ConfigDict, mesh, tokenizer=None):
        """tokenizer: the model's, where that is not config.data's own."""
        if task_of(config).writes_text and config.eval.generate:
            bleu_scorer(**bleu_options(config))  # what is missing is reported before step 1
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
        self.num_bytes = None
        if "bits_per_byte" in task_of(config).metrics:
            self.num_bytes = self.bytes_of_text()

    def bytes_of_text(self) -> int | None:
        """UTF-8 bytes of all that is predicted; None, with a warning, where the tokenizer doesn't know all of it."""
        paths, _ = zip(*mixture(self.config))
        stores = open_stores(self.config, "val")
        if why := why_none_of(stores, tokenizers.load(paths[0])):
            warn_once(why)
            return None
        return sum(map(predicted_bytes, stores, paths))

    def leaves_out(self) -> str:
        """In words, what an evaluation leaves out of the split; empty where nothing."""
        e = self.config.eval
        parts = []
        whole = len(self.batches)
        if 0 < e.batches < whole:
            parts.append(f"the first {e.batches:,} of {whole:,} batches (eval.batches)")
        if task_of(self.config).writes_text and e.generate:
            total = len(self.sources[0].examples)
            if e.generate < total:
                parts.append(
                    f"texts for the first {e.generate:,} of {total:,} examples (eval.generate)"
                )
        return ", and ".join(parts)

    def __call__(self, params, teacher=None) -> dict:
        """The figures of a task: loss (nats), and what jaxlm/evaluate/score.py makes of its examples' scores or texts.

        A figure that can't be computed is left out, with a warning. Raises what `run` raises, and score.FAULTS.
        """
        config = self.config
        sums, scores, complete = self.run(params, teacher)
        result = self.figures(sums, complete)
        if scores is not None and installed():
            result |= self.scored(scores)
        if task_of(config).writes_text and config.eval.generate:
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
        """The task's figures, floats only, with a warning for each without meaning; {} where scores are NaN."""
        source = self.sources[0]
        only = "this evaluation gives only the loss"  # train.max_skipped ends runs whose scores stay NaN
        figures = attempt(only, partial(score, self.config, source, scores))
        if not figures:
            return {}
        for line in left_out(self.config, source, scores, figures):
            warn_once(line)
        return {name: x for name, x in figures.items() if isinstance(x, float)}

    def figures(self, sums: dict, complete: bool) -> dict:
        """Means of the sums. Of text also perplexity and tokens, and of a whole split bits_per_byte and bytes.

        sums: float64, with the sum of weights under "weight"; complete: whether they are of the whole split.
        """
        result = {}
        for name, value in sums.items():
            if name != "weight":
                result[name] = value / sums["weight"]
        reported = task_of(self.config).metrics
        if "pairs" in reported:
            result["pairs"] = int(sums["weight"])
        if "tokens" not in reported:
            return result
        if not self.config.task.negatives:  # whose nats are of no distribution over the vocabulary
            result["perplexity"] = math.exp(min(result["loss"], 700.0))
        result["tokens"] = int(sums["weight"])
        if complete and self.num_bytes:
            result["bits_per_byte"] = sums["loss"] / math.log(2) / self.num_bytes
            result["bytes"] = self.num_bytes
        return result

    def run(self, params, teacher=None) -> tuple[dict, dict | None, bool]:
        """(float64 sums over the batches, {example: its scores} where the task has them, whether that was all).

        Raises DataError where no token or label counts.
        """
        whole = len(self.batches)
        B = eval_rows(self.config)
        stop = min(self.config.eval.batches or whole, whole)

        def place(rows):
            return hosts.to_global(rows, self.mesh, B)

        sums = defaultdict(float)
        rows = []
        for batch in Prefetch(self.batches, 0, stop, self.config.data.prefetch, place):
            part, scores = self.step(params, batch, teacher)
            for key, value in jax.device_get(part).items():
                sums[key] += float(value)
            if task_of(self.config).has_head:
                rows += list(hosts.fetch(scores))
        if not sums["weight"]:
            raise DataError(
                "the validation split has nothing that counts: prepare the data with a larger --val_fraction"
            )
        scores = of_examples(self.sources[0], rows) if rows else None
        return dict(sums), scores, stop == whole


@cache
def installed() -> bool:
    """Whether the library of the labelled tasks' figures is here; training goes on without it, with a warning."""
    if importlib.util.find_spec("sklearn") is not None:
        return True
    logging.getLogger("jaxlm").warning(
        'F1, AUC and other figures in training need: pip install -e ".[eval]"'
    )
    return False
