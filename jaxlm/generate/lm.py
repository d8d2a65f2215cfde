"""A trained model in Python: `lm = jaxlm.load(PATH)`, then lm.logits, lm.loss and lm.generate, on any mesh."""

import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.cli import did_you_mean
from jaxlm.config.keys import MESH_AXES
from jaxlm.config.mesh_rules import fits
from jaxlm.config.recipe import mesh_sizes
from jaxlm.config.tasks import TASKS
from jaxlm.data.batches import eval_rows
from jaxlm.data.bits_per_byte import why_dropped, why_none
from jaxlm.data.examples import Encoder
from jaxlm.data.tokenization.base import replace_surrogates
from jaxlm.data.transforms import Vocabulary, join
from jaxlm.errors import ConfigError, UserError
from jaxlm.generate.answer import label, write
from jaxlm.generate.arguments import Arguments, examples_of, options_of, sampling_of
from jaxlm.generate.decode import generate_tokens, pad_prompts, size_for
from jaxlm.generate.neighbors import SPELLED, Neighbors
from jaxlm.models import build, next_logits
from jaxlm.models.vectors import word_vectors
from jaxlm.parallel.hosts import fetch, to_global
from jaxlm.parallel.mesh import make_mesh
from jaxlm.run.checkpoint import Checkpoints, config_of, tokenizer_of
from jaxlm.step.forward import mesh_order
from jaxlm.step.losses import token_losses
from jaxlm.step.state import abstract_state, state_shardings

HEADS = {  # Task.answer -> what a model with a head is
    "class": "a classifier: it has scores of classes",
    "labels": "a classifier: it has scores of labels",
    "number": "a regressor: it has one number a text",
    "tags": "a tagger: it has scores of tags",
    "span": "a reader: it has scores of where an answer begins and ends",
}


class TextLoss(NamedTuple):
    nats_per_token: float
    bits_per_byte: float
    tokens: int  # counted


class LM:
    """config: resolved. params: tree of arrays on `mesh`, from step `step`. tokenizer: encode and decode."""

    def __init__(self, config: ConfigDict, params, tokenizer, mesh, step: int):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.step = step
        self.model = build(config)
        self.teacher = None

    def __repr__(self):
        return (
            f"<jaxlm.LM {self.config.model.name}, step {self.step}, {self.tokenizer.name} tokens>"
        )

    def logits(self, tokens, segments=None, positions=None) -> np.ndarray:
        """Logits of what follows each token. tokens, segments, positions: int [B, T]; returns float32 [B, T, V].

        segments: tokens see only their own number; None: each row is one document. positions: None: 0, 1, ...
        """
        self._require_next()
        tokens, segments, positions = arrays_of(tokens, segments, positions)
        self._require_range(tokens)
        self._require_length(tokens.shape[1] if positions is None else int(np.max(positions)) + 1)
        with jax.set_mesh(self.mesh):
            return fetch(forward_logits(self.model, self.params, tokens, segments, positions))

    def loss(self, texts: list[str]) -> list[TextLoss]:
        """How surprising each text is, read in windows of data.seq_len as evaluation does.

        Where the tokenizer has no beginning-of-text token (chars), the first token of a text cannot be predicted and
        does not count. A text without a counted token has nan. So have the bits per byte of a text with unknown
        tokens, and that is told. Raises ConfigError of what is no text.
        """
        self._require_text("loss")
        read = Arguments("lm.loss")
        texts = read.texts("texts", texts)
        read.refuse()
        T = self.config.data.seq_len
        rows = []
        owners = []
        num_bytes = self._predicted_bytes(texts)
        for owner, text in enumerate(texts):
            ids = self.tokenizer.encode(text)
            for start in range(0, len(ids), T):
                rows.append(self._row(ids, start, T))
                owners.append(owner)
        sums = np.zeros((len(texts), 2))
        B = min(eval_rows(self.config), 1 << max(len(rows) - 1, 0).bit_length())
        with jax.set_mesh(self.mesh):
            for start in range(0, len(rows), B):
                chunk = rows[start : start + B]
                chunk = chunk + [chunk[0]] * (B - len(chunk))
                batch = {}
                for key in chunk[0]:
                    batch[key] = np.stack([row[key] for row in chunk])
                losses = fetch(
                    row_losses(
                        self.model,
                        self.params,
                        to_global(batch, self.mesh, B),
                        FrozenConfigDict(self.config),
                    )
                )
                for owner, row, nats in zip(owners[start : start + B], chunk, losses):
                    sums[owner] += nats, row["weights"].sum()
        nan = float("nan")
        return [
            TextLoss(
                float(nats / n) if n else nan,
                float(nats / math.log(2) / size) if n else nan,
                int(n),
            )
            for size, (nats, n) in zip(num_bytes, sums)
        ]

    def generate(
        self,
        prompts,
        *,
        max_tokens=200,
        temperature=0.8,
        top_k=0,
        top_p=0.0,
        num_samples=1,
        seed=0,
        stop=(),
    ) -> list[str]:
        """Continuations, without the prompts: num_samples for each of `prompts` (str or list of str), in their order.

        temperature 0: greedy. top_k, top_p: 0 is off. stop: a text ends before the first of these strings; None: none.
        Raises ConfigError that names each argument that is not what it should be.
        """
        self._require_text("generate")
        task = self.config.task.name
        if TASKS[task].writes_text:  # a plain continuation would not be what it was tuned to write
            raise UserError(
                f"lm.generate: a model of task {task} answers prompts and dialogues; use lm.answer"
            )
        given = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        given |= {"num_samples": num_samples, "seed": seed}
        prompts, stop, numbers = sampling_of(prompts, stop, given)
        num_samples = numbers.pop("num_samples")
        seed = numbers.pop("seed")
        ids = []
        for prompt in prompts:
            for _ in range(num_samples):
                ids.append(self._prompt(prompt))
        if not ids:
            return []
        padded, lengths = pad_prompts(ids)
        self._require_length(int(lengths.max()), numbers["max_tokens"])
        # A text depends on its seed and prompt alone: sample i of every prompt has seed + i.
        seeds = (np.tile(np.arange(num_samples), len(prompts)) + seed % 2**32) % 2**32
        with jax.set_mesh(self.mesh):
            out = generate_tokens(
                self.model, self.params, padded, lengths, seeds.astype(np.uint32), eos_id=self.tokenizer.eos_id,
                vocab_size=Vocabulary(self.tokenizer, task).size, **numbers,
            )  # fmt: skip
        return [self._text(prompt, row, stop) for prompt, row in zip(ids, out)]

    def answer(self, examples, **options) -> list:
        """What a fine-tuned model says to examples: dicts of the columns of its task, or strings of the first of them.

        sft, dpo: also a dialogue, a list of {"role": ..., "content": ...}, or a list of dialogues. Raises ConfigError
        of columns that the task does not have, and of those that it lacks.

        classify, multilabel: {label: probability} each; regress: a number; tag: the tag of each word; qa: text of the
        context; seq2seq, sft, dpo: the text that it writes. options, of these three alone: beams, length_penalty,
        max_tokens (eval.max_tokens), temperature (0: greedy), top_k, top_p, seed, stop: as those of `generate`.
        mlm, of strings: for each [MASK], a hidden token, the five likeliest as (token, probability).
        """
        task = self.config.task.name
        if not TASKS[task].answers_examples:
            use = "; use lm.generate, lm.loss or lm.logits" * (not TASKS[task].answers_nothing)
            use = use or "; use lm.neighbors or lm.analogy" * TASKS[task].learns_vectors
            raise UserError(f"lm.answer: task {task} has no examples to answer{use}")
        stop, options = options_of(task, options)
        if TASKS[task].answer == "hidden":
            read = Arguments("lm.answer")
            texts = read.texts("examples", examples)
            read.refuse()
            return [self._fill(text) for text in texts]
        examples = examples_of(task, TASKS[task].column_names, examples)
        with jax.set_mesh(self.mesh):
            if not TASKS[task].writes_text:
                return label(self.config, self.params, self.tokenizer, examples)
            encode = Encoder(self.tokenizer, self.config.data.lowercase)
            vocab = Vocabulary(self.tokenizer, task)
            texts = write(self.config, self.params, vocab, encode, examples, **options)
        return [cut_before(text, stop) for text in texts]

    def neighbors(self, word: str, count: int = 10) -> list[tuple[str, float]]:
        """The tokens whose vectors have the largest cosine similarity with the word's, and that.

        Of a text of several tokens the mean direction is meant. Raises UserError of a word that is not known.
        """
        (word,), count = words_of("lm.neighbors", {"word": word}, count)
        near = self._vectors("lm.neighbors")
        ids = near.ids_of(word)
        return near.nearest(near.vector(ids), ids, count)

    def analogy(self, a: str, b: str, c: str, count: int = 10) -> list[tuple[str, float]]:
        """What is to c as b is to a: the tokens most similar to b - a + c, and how much, without these three.

        All vectors have length 1 (3CosAdd: Levy and Goldberg 2014). Raises UserError of a word that is not known.
        """
        words, count = words_of("lm.analogy", {"a": a, "b": b, "c": c}, count)
        near = self._vectors("lm.analogy")
        ids = [near.ids_of(word) for word in words]
        from_a, to_b, from_c = map(near.vector, ids)
        return near.nearest(to_b - from_a + from_c, np.concatenate(ids), count)

    def _vectors(self, where: str) -> Neighbors:
        name = self.config.model.name
        if "embed" not in self.params or "tokens" not in self.params["embed"] or name == "bag":
            raise UserError(f"{where}: model.name={name} has no embeddings of tokens")
        return Neighbors(fetch(word_vectors(self.params)), self.tokenizer, where)

    def _fill(self, text: str) -> list[list[tuple[str, float]]]:
        vocab = Vocabulary(self.tokenizer, self.config.task.name)
        parts = text.split("[MASK]")
        if self.tokenizer.name not in SPELLED:  # the space before a hidden token is of that token
            parts[:-1] = [part.rstrip(" ") for part in parts[:-1]]
        if len(parts) < 2:
            raise ConfigError(
                f"lm.answer: a model of task mlm foretells hidden tokens: {text!r} has no [MASK] in it"
            )
        first, *rest = parts
        ids = [self.tokenizer.encode(first)]
        for part in rest:
            ids += [vocab.mask, self.tokenizer.encode(part, after="[MASK]")]
        ids = join(*ids)
        logits = self._logits_of(ids)[ids == vocab.mask, : self.tokenizer.vocab_size]
        chances = np.asarray(jax.nn.softmax(logits))
        best = np.argsort(-chances)[:, :5]
        return [
            [(self.tokenizer.decode([i]), round(float(p[i]), 6)) for i in five]
            for five, p in zip(best, chances)
        ]

    def _logits_of(self, ids: np.ndarray) -> np.ndarray:
        """float32 [len(ids), V]: `logits` of one text, padded to a size so that few lengths are compiled."""
        length = len(ids)
        size = size_for(length, 16)
        tokens, segments, positions = np.zeros((3, 1, size), np.int32)
        tokens[0, :length] = ids
        segments[0, :length] = 1
        positions[0, :length] = np.arange(length)
        return self.logits(tokens, segments, positions)[0, :length]

    def _require_text(self, what: str) -> None:
        task = self.config.task.name
        if TASKS[task].answer == "hidden":
            raise UserError(
                f"lm.{what}: a model of task mlm foretells hidden tokens, none that follow; use lm.answer with [MASK] "
                'in the text, as in lm.answer("to [MASK] or not to be")'
            )
        if TASKS[task].has_head:
            raise UserError(
                f"lm.{what}: a model of task {task} foretells no tokens that follow; use lm.answer"
            )
        if TASKS[task].reads_source:
            use = "; use lm.answer" * TASKS[task].from_examples
            raise UserError(f"lm.{what}: a model of task {task} reads a source first{use}")
        if TASKS[task].learns_vectors:
            raise UserError(
                f"lm.{what}: a model of task {task} has vectors of words; use lm.neighbors or lm.analogy"
            )

    def _prompt(self, prompt: str) -> np.ndarray:
        ids = self.tokenizer.encode(prompt)
        bos = self.tokenizer.bos_id
        if bos is not None:
            return np.concatenate([[bos], ids]).astype(np.int32)
        if not len(ids):
            raise ConfigError(
                f"the {self.tokenizer.name} tokenizer has no beginning of text: "
                "a prompt (--prompt, or a line of --input) must not be empty"
            )
        return ids

    def _text(self, prompt: np.ndarray, ids: np.ndarray, stop) -> str:
        eos = self.tokenizer.eos_id
        ends = np.flatnonzero(ids == eos) if eos is not None else []
        ids = ids[: ends[0]] if len(ends) else ids
        # Decoded together: some tokenizers drop a space at the beginning of a text.
        text = self.tokenizer.decode(np.concatenate([prompt, ids]))[
            len(self.tokenizer.decode(prompt)) :
        ]
        return cut_before(text, stop)

    def _require_next(self) -> None:
        """Raises UserError where there are no logits of tokens, or none without a source."""
        task = self.config.task.name
        if TASKS[task].has_head:
            raise UserError(
                f"lm.logits: a model of task {task} is {HEADS[TASKS[task].answer]}, not of tokens; use lm.answer"
            )
        if TASKS[task].learns_vectors:
            raise UserError(
                f"lm.logits: a model of task {task} has embeddings, no logits; use lm.neighbors"
            )
        if self.config.model.name in ("encoder_decoder", "lstm_seq2seq"):
            use = "; use lm.answer" * TASKS[task].from_examples
            raise UserError(f"lm.logits: a model of task {task} reads a source first{use}")

    def _predicted_bytes(self, texts: list[str]) -> list[float]:
        """UTF-8 bytes of what is foretold of each text; nan, and that is told, where it has unknown tokens."""
        sizes = []
        flawed = 0
        unknown = 0
        total = 0
        dropped = 0
        for text in texts:
            ids = self.tokenizer.encode(text)
            size = len(replace_surrogates(text)[0].encode())
            if self.tokenizer.bos_id is None:
                size -= len(self.tokenizer.decode(ids[:1]).encode())
            if here := int(np.sum(ids == self.tokenizer.unknown_id)):
                flawed = flawed + 1
                unknown = unknown + here
                total = total + len(ids)
                size = math.nan
            elif self.tokenizer.may_lose(ids) and (lost := self.tokenizer.lost(text)):
                dropped += len("".join(lost))
                size = math.nan
            sizes.append(size)
        if why := why_none(unknown, total, f"{flawed:,} of the {len(texts):,} texts"):
            logging.getLogger("jaxlm").warning(why)
        if why := why_dropped(dropped, "these texts"):
            logging.getLogger("jaxlm").warning(why)
        return sizes

    def _row(self, ids: np.ndarray, start: int, T: int) -> dict[str, np.ndarray]:
        """The batch row whose targets are ids[start : start + T]."""
        targets = ids[start : start + T]
        bos = self.tokenizer.bos_id
        if start:
            first = ids[start - 1]
        else:
            first = targets[0] if bos is None else bos
        tokens = np.concatenate([[first], targets[:-1]])
        padding = (0, T - len(targets))
        weights = np.ones(len(targets), np.float32)
        segments = np.ones(len(targets), np.int32)
        if bos is None and not start:
            weights[0] = segments[0] = 0
        row = {"tokens": tokens, "targets": targets, "segments": segments, "weights": weights}
        row = {key: np.pad(value, padding) for key, value in row.items()} | {
            "positions": np.arange(T, dtype=np.int32)
        }
        return {
            key: value.astype(np.float32 if key == "weights" else np.int32)
            for key, value in row.items()
        }

    def _require_range(self, tokens: np.ndarray) -> None:
        vocab = self.config.model.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise ConfigError(
                f"lm.logits: tokens must be in [0, {vocab}), not {tokens.min()} ... {tokens.max()}"
            )

    def _require_length(self, length: int, more: int = 0) -> None:
        """Raises ConfigError where there are no positions for `length` tokens, and `more` that are to be written."""
        limit = self.config.model.context_length
        if self.config.model.positions != "learned" or length + more <= limit:
            return
        said = f"learned positions end at {limit:,}: "
        if not more:
            raise ConfigError(f"{said}{length:,} tokens are too many")
        if length >= limit:
            raise ConfigError(
                f"{said}a prompt of {length:,} tokens leaves none to write; shorten it"
            )
        room = limit - length
        said += f"a prompt of {length:,} tokens and max_tokens={more:,} are too many"
        raise ConfigError(
            f"{said}; say max_tokens={room} (on the command line: --max_tokens={room}), or fewer"
        )


def words_of(where: str, words: dict, count) -> tuple[list[str], int]:
    """(the words, count) of what was given to lm.neighbors and lm.analogy. Raises ConfigError of all faults."""
    read = Arguments(where)
    for name, word in words.items():
        text = read.text(name, word)
        if text is not None and not text.strip():
            read.must(name, text, "a text that is not empty")
    count = read.whole("count", count, 1, "at least 1")
    read.refuse()
    return list(words.values()), count


def arrays_of(tokens, segments, positions) -> tuple:
    """The three as int32 [batch, length], the last two also None, of what was given to lm.logits."""
    read = Arguments("lm.logits")
    rule = "ids, whole numbers of shape [batch, length], rows of equal lengths"
    tokens = read.integers("tokens", tokens, rule)
    if segments is not None:
        segments = read.integers("segments", segments, "whole numbers in the shape of tokens")
    if positions is not None:
        positions = read.integers("positions", positions, "whole numbers in the shape of tokens")
    read.refuse()
    if tokens.ndim != 2 or not tokens.size:
        raise ConfigError(f"lm.logits: tokens must be [batch, length], not of shape {tokens.shape}")
    for name, value in (("segments", segments), ("positions", positions)):
        if value is not None and value.shape != tokens.shape:
            raise ConfigError(
                f"lm.logits: {name} must have the shape of tokens {tokens.shape}, not {value.shape}"
            )
    if positions is not None and positions.min() < 0:
        raise ConfigError(f"lm.logits: positions must be 0 or more, not {positions.min()}")
    return tokens, segments, positions


def cut_before(text: str, stop: list[str]) -> str:
    """The text up to the first of these strings."""
    places = [text.find(string) for string in stop if string and string in text]
    return text[: min(places, default=len(text))]


@partial(jax.jit, static_argnames="model")
def forward_logits(model, params, tokens, segments, positions):
    x_BTD, _ = model.apply({"params": params}, tokens, segments, positions)
    return next_logits(model, params, x_BTD)


@partial(jax.jit, static_argnames=("model", "config"))
def row_losses(model, params, batch, config):
    """float32 [B]: weighted nats of each row."""
    batch, places = mesh_order(batch)
    return (token_losses(model, params, batch, places, config)[0] * batch["weights"]).sum(axis=1)


def require_loadable(path, step, mesh) -> int | str:
    """The step, where these can be arguments of `load`. Raises ConfigError."""
    read = Arguments("jaxlm.load")
    if not isinstance(path, (str, PurePath)) or not str(path).strip():
        read.must("path", path, "the run directory of jaxlm.train (its --workdir)")
    if not isinstance(step, str):
        step = read.whole("step", step, 0, "or latest or best")
    if mesh is not None and not isinstance(mesh, Mapping):
        read.must("mesh", mesh, 'sizes of axes, such as {"tensor": 4}, or None')
    elif mesh is not None and not all(map(is_axis_size, mesh.values())):
        read.must(
            "mesh",
            mesh,
            "of sizes that are whole numbers from 1 on, or -1 for the devices that are left",
        )
    read.refuse()
    return step


def is_axis_size(size) -> bool:
    return type(size) is int and (size > 0 or size == -1)


def load(
    path: str | PurePath, *, step: str | int = "latest", mesh: dict[str, int] | None = None
) -> LM:
    """The model of a run directory. step: latest, best or a number. mesh: sizes of axes, such as {"tensor": 4}.

    Without `mesh`: the run's own where it fits the devices, else the parameters sharded over all of them. Raises
    CheckpointError where there is none, ConfigError of arguments of another kind.
    """
    step = require_loadable(path, step, mesh)
    checkpoints = Checkpoints(path)
    step = checkpoints.choose(step)
    meta = checkpoints.meta(step)
    config = config_of(meta)
    # What a pipeline and slices ask of a batch is not for inference: rows come in any number.
    config.mesh.slices = 1
    config.model.pipeline_rounds = 1
    config.model.pipeline_microbatches = 0
    if config.task.distill:  # a pupil can do without its teacher, which may be gone
        config.task.distill = 0.0
        config.task.teacher = ""
        config.task.teacher_model = ()
    if mesh is None:
        sizes = mesh_sizes(config)
    else:
        sizes = dict.fromkeys(MESH_AXES, 1) | mesh
    for axis in set(sizes) - set(MESH_AXES):
        hint = did_you_mean(axis, MESH_AXES)
        raise ConfigError(f"mesh: there is no axis {axis}{hint} (they are {', '.join(MESH_AXES)})")
    if mesh is None and (sizes["stage"] != 1 or not fits(sizes, jax.device_count())):
        sizes = dict.fromkeys(MESH_AXES, 1) | {
            "fsdp": -1
        }  # a pipeline has nothing to gain from single tokens
        config.mesh.across = "fsdp"
    elif not fits(sizes, jax.device_count()):
        raise ConfigError(
            f"mesh={mesh} does not fit the {jax.device_count()} devices: its sizes must multiply to that"
        )
    config.mesh.update(sizes)
    mesh = make_mesh(config)
    params = checkpoints.restore_params(
        step, abstract_state(config)[0], state_shardings(config, mesh)
    )
    checkpoints.close()
    return LM(config, params, tokenizer_of(meta), mesh, step)
