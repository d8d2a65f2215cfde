"""A trained model in Python: `lm = jaxlm.load(PATH)`, then lm.logits, lm.loss and lm.generate, on any mesh."""

import logging
import math
from functools import partial
from pathlib import PurePath
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.arguments import Arguments, examples_of
from jaxlm.bits import why_none
from jaxlm.checkpoint import Checkpoints, config_of, tokenizer_of
from jaxlm.cli import did_you_mean
from jaxlm.config import mesh_sizes
from jaxlm.data.examples import encoder_of
from jaxlm.data.pipeline import eval_rows
from jaxlm.data.tokenizer import Words, replace_surrogates
from jaxlm.data.transforms import Vocabulary, join
from jaxlm.decode import generate_tokens, pad_prompts
from jaxlm.errors import ConfigError, UserError
from jaxlm.keys import HEADED, MESH_AXES, ROLES, SILENT, TWO_SIDED, WRITTEN
from jaxlm.losses import mesh_order, token_losses
from jaxlm.meshes import fits
from jaxlm.models import build, next_logits
from jaxlm.parallel.hosts import fetch, to_global
from jaxlm.parallel.mesh import make_mesh
from jaxlm.respond import label, write
from jaxlm.state import abstract_state, state_shardings

SPELLED = ("bytes", "chars")  # tokenizers whose tokens are not words, nor parts of words, with the space before them


class TextLoss(NamedTuple):
    nats_per_token: float
    bits_per_byte: float
    tokens: int  # counted


class LM:
    """config: resolved. params: tree of arrays on `mesh`, from step `step`. tokenizer: encode and decode."""

    def __init__(self, config: ConfigDict, params, tokenizer, mesh, step: int):
        self.config, self.params, self.tokenizer, self.mesh, self.step = config, params, tokenizer, mesh, step
        self.model, self.teacher = build(config), None

    def __repr__(self):
        return f"<jaxlm.LM {self.config.model.name}, step {self.step}, {self.tokenizer.name} tokens>"

    def logits(self, tokens, segments=None, positions=None) -> np.ndarray:
        """Logits of what follows each token. tokens, segments, positions: int [B, T]; returns float32 [B, T, V].

        segments: tokens see only their own number; None: each row is one document. positions: None: 0, 1, ...
        """
        tokens = np.asarray(tokens, np.int32)
        if tokens.ndim != 2:
            raise ConfigError(f"lm.logits: tokens must be [batch, length], not of shape {tokens.shape}")
        self._require_range(tokens)
        for name, value in (("segments", segments), ("positions", positions)):
            if value is not None and np.shape(value) != tokens.shape:
                raise UserError(
                    f"lm.logits: {name} must have the shape of tokens {tokens.shape}, not {np.shape(value)}"
                )
        segments, positions = (None if x is None else np.asarray(x, np.int32) for x in (segments, positions))
        self._require_length(tokens.shape[1] if positions is None else int(np.max(positions)) + 1)
        with jax.set_mesh(self.mesh):
            return fetch(forward_logits(self.model, self.params, tokens, segments, positions))

    def loss(self, texts: list[str]) -> list[TextLoss]:
        """How surprising each text is, read in windows of data.seq_len as evaluation does.

        Where the tokenizer has no beginning-of-text token (chars), the first token of a text cannot be predicted and
        does not count. A text without a counted token has nan. So have the bits per byte of a text with unknown
        tokens, and that is told.
        """
        self._require_text("loss")
        texts = [texts] if isinstance(texts, str) else texts
        T = self.config.data.seq_len
        rows, owners = [], []
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
                batch = {key: np.stack([row[key] for row in chunk]) for key in chunk[0]}
                losses = fetch(
                    row_losses(self.model, self.params, to_global(batch, self.mesh, B), FrozenConfigDict(self.config))
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
        self, prompts, *, max_tokens=200, temperature=0.8, top_k=0, top_p=0.0, num_samples=1, seed=0, stop=()
    ) -> list[str]:
        """Continuations, without the prompts: num_samples for each of `prompts` (str or list of str), in their order.

        temperature 0: greedy. top_k, top_p: 0 is off. stop: a text ends before the first of these strings; None: none.
        Raises ConfigError that names each argument that is not what it should be.
        """
        self._require_text("generate")
        task = self.config.task.name
        if task in WRITTEN:  # a plain continuation would not be what it was tuned to write
            raise UserError(f"lm.generate: a model of task {task} answers prompts and dialogues; use lm.answer")
        given = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        given |= {"num_samples": num_samples, "seed": seed}
        prompts, stop, numbers = sampling_of(prompts, stop, given)
        num_samples, seed = numbers.pop("num_samples"), numbers.pop("seed")
        ids = [self._prompt(prompt) for prompt in prompts for _ in range(num_samples)]
        if not ids:
            return []
        padded, lengths = pad_prompts(ids)
        self._require_length(int(lengths.max()) + numbers["max_tokens"])
        # A text depends on its seed and prompt alone: sample i of every prompt has seed + i.
        seeds = (np.tile(np.arange(num_samples), len(prompts)) + seed % 2**32) % 2**32
        with jax.set_mesh(self.mesh):
            out = generate_tokens(
                self.model, self.params, padded, lengths, seeds.astype(np.uint32), eos_id=self.tokenizer.eos_id,
                **numbers,
            )  # fmt: skip
        return [self._text(prompt, row, stop) for prompt, row in zip(ids, fetch(out))]

    def answer(self, examples, **options) -> list:
        """What a fine-tuned model says to examples: dicts of the columns of its task, or strings of the first of them.

        sft, dpo: also a dialogue, a list of {"role": ..., "content": ...}, or a list of dialogues. Raises ConfigError
        of columns that the task does not have, and of those that it lacks.

        classify, multilabel: {label: probability} each; regress: a number; tag: the tag of each word; qa: text of the
        context; seq2seq, sft, dpo: the text that it writes. options: see jaxlm.respond.write; beams=4, say.
        mlm, of strings: for each [MASK], a hidden token, the five likeliest as (token, probability).
        """
        task, d = self.config.task.name, self.config.data
        if task == "mlm":
            return [self._fill(text) for text in ([examples] if isinstance(examples, str) else examples)]
        if task not in ROLES:
            use = "; use lm.generate, lm.loss or lm.logits" * (task not in SILENT)
            raise UserError(f"lm.answer: task {task} has no examples to answer{use}")
        columns = tuple(role.removesuffix("?") for role in ROLES[task])
        examples = examples_of(task, columns, examples)
        with jax.set_mesh(self.mesh):
            if task in WRITTEN:
                encode = encoder_of(self.tokenizer, d.lowercase)
                return write(self.config, self.params, Vocabulary(self.tokenizer, task), encode, examples, **options)
            return label(self.config, self.params, self.tokenizer, examples)

    def neighbors(self, word: str, count: int = 10) -> list[tuple[str, float]]:
        """The tokens whose embeddings have the largest cosine similarity with the mean of the word's, and that.

        Where a word after a space is fewer tokens, as most are to sentencepiece, these are meant.
        """
        if "embed" not in self.params or "tokens" not in self.params["embed"] or self.config.model.name == "bag":
            raise UserError(f"lm.neighbors: model.name={self.config.model.name} has no embeddings of tokens")
        texts = (word,) if self.tokenizer.name in SPELLED else (word, f" {word}")
        ids = min(map(self.tokenizer.encode, texts), key=len)
        said = self.tokenizer.decode(ids)
        if not said.strip() or (Words.UNKNOWN in said and Words.UNKNOWN not in word):
            raise UserError(f"lm.neighbors: {word!r} is not in the vocabulary")
        table_VD = fetch(self.params["embed"]["tokens"])[: self.tokenizer.vocab_size].astype(np.float32)
        table_VD /= np.maximum(np.linalg.norm(table_VD, axis=1, keepdims=True), 1e-9)
        mean_D = table_VD[ids].mean(axis=0)
        similar = table_VD @ (mean_D / max(np.linalg.norm(mean_D), 1e-9))
        similar[ids] = -np.inf
        best = np.argsort(-similar)[:count]
        return [(self.tokenizer.decode([i]), float(similar[i])) for i in best if np.isfinite(similar[i])]

    def _fill(self, text: str) -> list[list[tuple[str, float]]]:
        vocab, parts = Vocabulary(self.tokenizer, "mlm"), text.split("[MASK]")
        if self.tokenizer.name not in SPELLED:  # the space before a hidden token is of that token
            parts[:-1] = [part.rstrip(" ") for part in parts[:-1]]
        if len(parts) < 2:
            raise ConfigError(f"a model of task mlm foretells hidden tokens: {text!r} has no [MASK] in it")
        first, *rest = map(self.tokenizer.encode, parts)
        ids = join(first, *(piece for part in rest for piece in (vocab.mask, part)))
        logits = self.logits(ids[None])[0, ids == vocab.mask, : self.tokenizer.vocab_size]
        chances = np.asarray(jax.nn.softmax(logits))
        best = np.argsort(-chances)[:, :5]
        return [[(self.tokenizer.decode([i]), round(float(p[i]), 6)) for i in five] for five, p in zip(best, chances)]

    def _require_text(self, what: str) -> None:
        task = self.config.task.name
        if task in HEADED or task == "mlm":
            raise UserError(f"lm.{what}: a model of task {task} foretells no tokens that follow; use lm.answer")
        if task in TWO_SIDED:
            use = "; use lm.answer" * (task in ROLES)
            raise UserError(f"lm.{what}: a model of task {task} reads a source first{use}")
        if task == "skipgram":
            raise UserError(f"lm.{what}: a model of task skipgram foretells words nearby; use lm.neighbors")

    def _prompt(self, prompt: str) -> np.ndarray:
        ids, bos = self.tokenizer.encode(prompt), self.tokenizer.bos_id
        if bos is not None:
            return np.concatenate([[bos], ids]).astype(np.int32)
        if not len(ids):
            raise ConfigError(
                f"the {self.tokenizer.name} tokenizer has no beginning of text: the prompt (--prompt) must not be empty"
            )
        return ids

    def _text(self, prompt: np.ndarray, ids: np.ndarray, stop) -> str:
        eos = self.tokenizer.eos_id
        ends = np.flatnonzero(ids == eos) if eos is not None else []
        ids = ids[: ends[0]] if len(ends) else ids
        # Decoded together: some tokenizers drop a space at the beginning of a text.
        text = self.tokenizer.decode(np.concatenate([prompt, ids]))[len(self.tokenizer.decode(prompt)) :]
        return text[: min((text.find(s) for s in stop if s and s in text), default=len(text))]

    def _predicted_bytes(self, texts: list[str]) -> list[float]:
        """UTF-8 bytes of what is foretold of each text; nan, and that is told, where it has unknown tokens."""
        sizes, flawed, unknown, total = [], 0, 0, 0
        for text in texts:
            ids = self.tokenizer.encode(text)
            size = len(replace_surrogates(text)[0].encode())
            if self.tokenizer.bos_id is None:
                size -= len(self.tokenizer.decode(ids[:1]).encode())
            if here := int(np.sum(ids == self.tokenizer.unknown_id)):
                flawed, unknown, total = flawed + 1, unknown + here, total + len(ids)
                size = math.nan
            sizes.append(size)
        if why := why_none(unknown, total, f"{flawed:,} of the {len(texts):,} texts"):
            logging.getLogger("jaxlm").warning(why)
        return sizes

    def _row(self, ids: np.ndarray, start: int, T: int) -> dict[str, np.ndarray]:
        """The batch row whose targets are ids[start : start + T]."""
        targets = ids[start : start + T]
        bos = self.tokenizer.bos_id
        first = ids[start - 1] if start else targets[0] if bos is None else bos
        tokens, padding = np.concatenate([[first], targets[:-1]]), (0, T - len(targets))
        weights = np.ones(len(targets), np.float32)
        segments = np.ones(len(targets), np.int32)
        if bos is None and not start:
            weights[0] = segments[0] = 0
        row = {"tokens": tokens, "targets": targets, "segments": segments, "weights": weights}
        row = {key: np.pad(value, padding) for key, value in row.items()} | {"positions": np.arange(T, dtype=np.int32)}
        return {key: value.astype(np.float32 if key == "weights" else np.int32) for key, value in row.items()}

    def _require_range(self, tokens: np.ndarray) -> None:
        vocab = self.config.model.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise ConfigError(f"token ids must be in [0, {vocab}), not {tokens.min()} ... {tokens.max()}")

    def _require_length(self, length: int) -> None:
        limit = self.config.model.context_length
        if self.config.model.positions == "learned" and length > limit:
            raise ConfigError(f"learned positions end at {limit}: {length} tokens (prompt and max_tokens) are too many")


def sampling_of(prompts, stop, given: dict) -> tuple[list[str], list[str], dict]:
    """(prompts, stop strings, the numbers by name) of what was given to lm.generate. Raises ConfigError."""
    read = Arguments("lm.generate")
    prompts = read.texts("prompts", prompts)
    stop = [] if stop is None else read.texts("stop", stop)
    numbers = {
        "max_tokens": read.whole("max_tokens", given["max_tokens"], 1, "from 1 to 1,000,000", 1_000_000),
        "temperature": read.real("temperature", given["temperature"], 0, math.inf, "0 (greedy) or positive"),
        "top_k": read.whole("top_k", given["top_k"], 0, "0 (off) or positive", 2**31 - 1),
        "top_p": read.real("top_p", given["top_p"], 0, 1, "0 (off) or a probability"),
        "num_samples": read.whole("num_samples", given["num_samples"], 1, "at least 1"),
        "seed": read.whole("seed", given["seed"], None, "of any size"),
    }
    read.refuse()
    return prompts, stop, numbers


@partial(jax.jit, static_argnames="model")
def forward_logits(model, params, tokens, segments, positions):
    x_BTD, _ = model.apply({"params": params}, tokens, segments, positions)
    return next_logits(model, params, x_BTD)


@partial(jax.jit, static_argnames=("model", "config"))
def row_losses(model, params, batch, config):
    """float32 [B]: weighted nats of each row."""
    batch, places = mesh_order(batch)
    return (token_losses(model, params, batch, places, config)[0] * batch["weights"]).sum(axis=1)


def load(path: str | PurePath, *, step: str | int = "latest", mesh: dict[str, int] | None = None) -> LM:
    """The model of a run directory. step: latest, best or a number. mesh: sizes of axes, such as {"tensor": 4}.

    Without `mesh`: the run's own where it fits the devices, else the parameters sharded over all of them. Raises
    CheckpointError where there is none.
    """
    checkpoints = Checkpoints(path)
    step = checkpoints.choose(step)
    meta = checkpoints.meta(step)
    config = config_of(meta)
    # What a pipeline and slices ask of a batch is not for inference: rows come in any number.
    config.mesh.slices, config.model.pipeline_rounds, config.model.pipeline_microbatches = 1, 1, 0
    if config.task.distill:  # a pupil can do without its teacher, which may be gone
        config.task.distill, config.task.teacher, config.task.teacher_model = 0.0, "", ()
    sizes = mesh_sizes(config) if mesh is None else dict.fromkeys(MESH_AXES, 1) | mesh
    for axis in set(sizes) - set(MESH_AXES):
        hint = did_you_mean(axis, MESH_AXES)
        raise ConfigError(f"mesh: there is no axis {axis}{hint} (they are {', '.join(MESH_AXES)})")
    if not all(isinstance(size, int) and (size > 0 or size == -1) for size in sizes.values()):
        raise ConfigError(f"mesh={mesh}: sizes are whole numbers from 1 on, or -1 for the devices that are left")
    if mesh is None and (sizes["stage"] != 1 or not fits(sizes, jax.device_count())):
        sizes = dict.fromkeys(MESH_AXES, 1) | {"fsdp": -1}  # a pipeline has nothing to gain from single tokens
        config.mesh.across = "fsdp"
    elif not fits(sizes, jax.device_count()):
        raise ConfigError(f"mesh={mesh} does not fit the {jax.device_count()} devices: its sizes must multiply to that")
    config.mesh.update(sizes)
    mesh = make_mesh(config)
    params = checkpoints.restore_params(step, abstract_state(config)[0], state_shardings(config, mesh))
    checkpoints.close()
    return LM(config, params, tokenizer_of(meta), mesh, step)
