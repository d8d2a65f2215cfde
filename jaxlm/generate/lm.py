"""A trained model in Python: `lm = jaxlm.load(PATH)`, then lm.logits, lm.loss and lm.generate, on any mesh."""

from collections.abc import Mapping
from functools import partial
from pathlib import PurePath

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.cli import did_you_mean
from jaxlm.config.keys import MESH_AXES
from jaxlm.config.mesh_rules import fits
from jaxlm.config.recipe import mesh_sizes
from jaxlm.config.tasks import TASKS
from jaxlm.data.examples import Encoder
from jaxlm.data.transforms import Vocabulary, join
from jaxlm.errors import ConfigError, UserError
from jaxlm.generate.answer import label, longest_prompt, write
from jaxlm.generate.arguments import Arguments, examples_of, options_of, sampling_of
from jaxlm.generate.decode import before_end, fill_rows, generate_tokens, pad_prompts, size_for
from jaxlm.generate.neighbors import SPELLED, Neighbors
from jaxlm.generate.text_loss import TextLoss, text_losses
from jaxlm.models import build, next_logits
from jaxlm.models.vectors import word_vectors
from jaxlm.parallel.hosts import fetch
from jaxlm.parallel.mesh import make_mesh
from jaxlm.run.checkpoint import Checkpoints, config_of, tokenizer_of
from jaxlm.step.state import abstract_state, state_shardings

HEADS = {  # Task.answer -> what a model with a head is
    "class": "a classifier: it has scores of classes",
    "labels": "a classifier: it has scores of labels",
    "number": "a regressor: it has one number a text",
    "tags": "a tagger: it has scores of tags",
    "span": "a reader: it has scores of where an answer begins and ends",
}


class LM:
    """A model with its tokenizer. Made by `jaxlm.load`.

    config: resolved. params: tree of arrays on `mesh`, from step `step`. tokenizer: encode and decode.
    """

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
        """Logits of what follows each token, float32 [B, T, V]. tokens, segments, positions: int [B, T].

        segments: tokens see only their own number, 0 is padding; None: each row is one document. positions: None: 0,
        1, ... One program serves all shapes of a size (decode.size_for). Raises ConfigError of other shapes and of
        tokens that the model has not, UserError where the model gives no logits of tokens.
        """
        self._require_next()
        tokens, segments, positions = arrays_of(tokens, segments, positions)
        self._require_range(tokens)
        B, T = tokens.shape
        if segments is None:
            segments = np.ones_like(tokens)
        if positions is None:
            positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
        self._require_length(int(np.max(positions)) + 1)
        padding = ((0, 0), (0, size_for(T, 16) - T))
        rows = fill_rows(*(np.pad(x, padding) for x in (tokens, segments, positions)))
        with jax.set_mesh(self.mesh):
            return fetch(forward_logits(self.model, self.params, *rows))[:B, :T]

    def loss(self, texts: list[str]) -> list[TextLoss]:
        """How surprising each text is, in nats per token and bits per byte, read in windows of data.seq_len.

        Where the tokenizer has no beginning-of-text token (chars), the first token of a text cannot be predicted and
        does not count. A text without a counted token has nan. So have the bits per byte of a text with unknown
        tokens, with a warning. Raises ConfigError of what is no text, UserError where the task predicts none.
        """
        self._require_text("loss")
        read = Arguments("lm.loss")
        texts = read.texts("texts", texts)
        read.refuse()
        return text_losses(self, texts)

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

        max_tokens: of each. temperature 0: greedy. top_k, top_p: 0 is off (Holtzman et al. 2020). seed: the same gives
        the same texts. stop: a text ends before the first of these strings; None: none. Raises ConfigError that names
        each argument that is not what it should be, UserError where the task does not go on from a prompt.
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
            "num_samples": num_samples,
            "seed": seed,
        }
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
        """The answer of a fine-tuned model to each example: dicts of the columns of its task, or strings of the first.

        sft, dpo: also a dialogue, a list of {"role": ..., "content": ...}, or a list of dialogues.

        classify, multilabel: {label: probability} each; regress: a number; tag: the tag of each word; qa: text of the
        context; seq2seq, sft, dpo: the text that it writes. options, of these three alone: beams, length_penalty,
        max_tokens (eval.max_tokens), temperature (0: greedy), top_k, top_p, seed, stop: as those of `generate`.
        mlm, of strings: for each [MASK], a hidden token, the five likeliest as (token, probability).

        Raises ConfigError of columns that the task does not have, and of those that it lacks; of options that are not
        what they should be, or go against each other; and of more tokens than learned positions have room for.
        UserError where the task has no examples.
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
            longest = longest_prompt(self.config, vocab, encode, examples)
            self._require_length(longest, options.get("max_tokens") or self.config.eval.max_tokens)
            texts = write(self.config, self.params, vocab, encode, examples, **options)
        return [cut_before(text, stop) for text in texts]

    def neighbors(self, word: str, count: int = 10) -> list[tuple[str, float]]:
        """The `count` tokens whose vectors are nearest to the word's, each with its cosine similarity.

        A text of several tokens has the mean direction of their vectors. Raises UserError of a word that is not known,
        ConfigError of arguments of another kind.
        """
        (word,), count = words_of("lm.neighbors", {"word": word}, count)
        near = self._vectors("lm.neighbors")
        ids = near.ids_of(word)
        return near.nearest(near.vector(ids), ids, count)

    def analogy(self, a: str, b: str, c: str, count: int = 10) -> list[tuple[str, float]]:
        """What is to c as b is to a: the tokens most similar to b - a + c, with the cosine; none of the three words.

        All vectors have length 1 (3CosAdd: Levy and Goldberg 2014). Raises what `neighbors` raises.
        """
        words, count = words_of("lm.analogy", {"a": a, "b": b, "c": c}, count)
        near = self._vectors("lm.analogy")
        ids = [near.ids_of(word) for word in words]
        a_D, b_D, c_D = map(near.vector, ids)
        return near.nearest(b_D - a_D + c_D, np.concatenate(ids), count)

    def _vectors(self, where: str) -> Neighbors:
        name = self.config.model.name
        if "embed" not in self.params or "tokens" not in self.params["embed"] or name == "bag":
            raise UserError(f"{where}: model.name={name} has no embeddings of tokens")
        return Neighbors(fetch(word_vectors(self.params)), self.tokenizer, where)

    def _fill(self, text: str) -> list[list[tuple[str, float]]]:
        """For each [MASK] of a text the five likeliest tokens, with their probabilities. Raises ConfigError of none."""
        vocab = Vocabulary(self.tokenizer, self.config.task.name)
        parts = text.split("[MASK]")
        if self.tokenizer.name not in SPELLED:  # the space before a hidden token is of that token
            parts[:-1] = [part.rstrip(" ") for part in parts[:-1]]
        if len(parts) < 2:
            raise ConfigError(
                f"lm.answer: a model of task mlm predicts hidden tokens: {text!r} has no [MASK] in it"
            )
        first, *rest = parts
        ids = [self.tokenizer.encode(first)]
        for part in rest:
            ids += [vocab.mask, self.tokenizer.encode(part, after="[MASK]")]
        ids = join(*ids)
        logits = self.logits(ids[None])[0, ids == vocab.mask, : self.tokenizer.vocab_size]
        found = []
        for chances in np.asarray(jax.nn.softmax(logits)):
            best = np.argsort(-chances)[:5]
            found.append([(self.tokenizer.decode([i]), round(float(chances[i]), 6)) for i in best])
        return found

    def _require_text(self, what: str) -> None:
        task = self.config.task.name
        if TASKS[task].answer == "hidden":
            raise UserError(
                f"lm.{what}: a model of task mlm predicts hidden tokens, none that follow; use lm.answer with [MASK] "
                'in the text, as in lm.answer("to [MASK] or not to be")'
            )
        if TASKS[task].has_head:
            raise UserError(
                f"lm.{what}: a model of task {task} predicts no tokens that follow; use lm.answer"
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
        ids = before_end(ids, self.tokenizer.eos_id)
        # Decoded together: some tokenizers drop a space at the beginning of a text.
        whole = self.tokenizer.decode(np.concatenate([prompt, ids]))
        return cut_before(whole[len(self.tokenizer.decode(prompt)) :], stop)

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

    def _require_range(self, tokens: np.ndarray) -> None:
        vocab = self.config.model.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise ConfigError(
                f"lm.logits: tokens must be in [0, {vocab}), not {tokens.min()} ... {tokens.max()}"
            )

    def _require_length(self, length: int, more: int = 0) -> None:
        """Raises ConfigError where learned positions end before `length` tokens, and `more` that are to be written."""
        limit = self.config.model.context_length
        if self.config.model.positions != "learned" or length + more <= limit:
            return
        end = f"learned positions end at {limit:,}"
        if not more:
            raise ConfigError(f"{end}: {length:,} tokens are too many")
        if length >= limit:
            raise ConfigError(
                f"{end}: a prompt of {length:,} tokens leaves none to write; shorten it"
            )
        room = limit - length
        raise ConfigError(
            f"{end}: a prompt of {length:,} tokens and max_tokens={more:,} are too many; "
            f"say max_tokens={room} (on the command line: --max_tokens={room}), or fewer"
        )


def words_of(where: str, words: dict, count) -> tuple[list[str], int]:
    """(the words, count) as given to lm.neighbors and lm.analogy. Raises ConfigError of all faults."""
    read = Arguments(where)
    for name, word in words.items():
        text = read.text(name, word)
        if text is not None and not text.strip():
            read.must(name, text, "a text that is not empty")
    count = read.whole("count", count, 1, "at least 1")
    read.refuse()
    return list(words.values()), count


def arrays_of(tokens, segments, positions) -> tuple:
    """The three as int32 [batch, length], the last two or None, as given to lm.logits. Raises ConfigError."""
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
    """float32 [B, T, V]: see LM.logits; segments and positions may be None."""
    x_BTD, _ = model.apply({"params": params}, tokens, segments, positions)
    return next_logits(model, params, x_BTD)


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
    """The trained model of a run directory, which writes, answers and gives logits.

    step: latest, best or a number. mesh: sizes of axes, such as {"tensor": 4}; None: the run's own where it fits the
    devices, else the parameters sharded over all of them. Raises CheckpointError where there is no checkpoint,
    ConfigError of arguments of another kind, and of a mesh that does not fit the devices.
    """
    step = require_loadable(path, step, mesh)
    checkpoints = Checkpoints(path)
    step = checkpoints.choose(step)
    meta = checkpoints.meta(step)
    config = config_of(meta)
    # Pipelines and slices constrain the size of a batch; inference takes rows in any number.
    config.mesh.slices = 1
    config.model.pipeline_rounds = 1
    config.model.pipeline_microbatches = 0
    if config.task.distill:  # a pupil can do without its teacher, which may be gone
        config.task.distill = 0.0
        config.task.teacher = ""
        config.task.teacher_model = ()
    choose_mesh(config, mesh)
    mesh = make_mesh(config)
    params = checkpoints.restore_params(
        step, abstract_state(config)[0], state_shardings(config, mesh)
    )
    checkpoints.close()
    return LM(config, params, tokenizer_of(meta), mesh, step)


def choose_mesh(config: ConfigDict, mesh: dict[str, int] | None) -> None:
    """Sets config.mesh to the sizes given to `load`, or to what fits the devices. Raises ConfigError."""
    devices = jax.device_count()
    if mesh is None:
        sizes = mesh_sizes(config)
        if sizes["stage"] != 1 or not fits(sizes, devices):
            # A pipeline has nothing to gain from single tokens.
            sizes = dict.fromkeys(MESH_AXES, 1) | {"fsdp": -1}
            config.mesh.across = "fsdp"
        config.mesh.update(sizes)
        return
    for axis in set(mesh) - set(MESH_AXES):
        hint = did_you_mean(axis, MESH_AXES)
        raise ConfigError(f"mesh: there is no axis {axis}{hint} (they are {', '.join(MESH_AXES)})")
    sizes = dict.fromkeys(MESH_AXES, 1) | mesh
    if not fits(sizes, devices):
        raise ConfigError(
            f"mesh={mesh} does not fit the {devices} devices: its sizes must multiply to that"
        )
    config.mesh.update(sizes)
