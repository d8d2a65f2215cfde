"""Every task once: its columns, transform, loss and metrics, and what it needs of a model. No jax.

A record names its transform, its loss and its kind of answer. The layers keep a table for each of these:
TOKENS and EXAMPLES in data/transforms.py, LOSSES in step/losses.py, MEASURES in evaluate/score.py. To add a task, add a
record here, and a function to a table only where none of those there fits.
"""

import re
from dataclasses import dataclass

from ml_collections import ConfigDict

GROUP = "group"  # a column beside those of a task; evaluate reports each of its values apart

CAUSAL = ("decoder", "lstm")
BIDIRECTIONAL = ("encoder", "bilstm")
READERS = (*BIDIRECTIONAL, *CAUSAL)  # of a text that is known whole
SOURCE_TO_TARGET = ("encoder_decoder", "lstm_seq2seq")

# Config keys that only some tasks use: of those from examples, of those that write, of those with a softmax.
EXAMPLE_KEYS = (
    "data.columns", "data.tokenizer", "data.vocab_size", "data.min_count", "data.lowercase", "data.pack",
    "data.examples_per_row", "data.word_dropout",
)  # fmt: skip
WRITING_KEYS = (
    "eval.generate",
    "eval.beams",
    "eval.max_tokens",
    "eval.length_penalty",
    "eval.bleu_tokenize",
)
DISTRIBUTION_KEYS = ("task.label_smoothing", "task.distill", "task.temperature")

TOKEN_METRICS = ("loss", "perplexity", "tokens", "divergence")
TEXT_METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum")  # need eval.generate

# Which way a metric is better, by a word in its name.
DIRECTIONS = {
    "minimize": r"loss|perplexity|bits|mse|mae|error|brier|divergence|seconds",
    "maximize": r"accuracy|precision|recall|f1|auc|exact_match|bleu|chrf|rouge|pearson|spearman|margin"
    r"|tokens_per_second|mfu",
}


@dataclass(frozen=True)
class Column:
    """A column of a task's examples."""

    name: str
    is_text: bool = True  # one text a cell, which a number may stand for
    required: bool = True
    asked: bool = False  # whether lm.answer needs it; a text alone is taken as the first of these


@dataclass(frozen=True)
class Task:
    """What is learned, from what, and what a trained model answers.

    answer is one of
        continuation            what follows a text
        hidden                  the tokens that are masked
        vectors                 of words
        class, labels, number   of an example: one class, several that hold together, a number
        tags                    a class for each word
        span                    a part of the context
        text                    one that the model writes
        ""                      nothing: it is for other models to start from
    """

    name: str  # task.name
    models: tuple[str, ...]  # the values of model.name that can learn it
    answer: str
    columns: tuple[Column, ...] = ()  # of an example, in order; (): it learns from prepared tokens
    transform: str = ""  # in data/transforms.py; "": none
    loss: str = "token"  # in step/losses.py
    metrics: tuple[str, ...] = TOKEN_METRICS  # what an evaluation may report: for eval.metric
    intervals: tuple[str, ...] = ()  # of these, what jaxlm.evaluate gives an interval
    own_keys: tuple[str, ...] = ()  # config keys that it uses and not all tasks do; see `keys`
    special_tokens: str = "roles"  # ids after the tokenizer's: none | roles | sentinels (roles too)
    reads_source: bool = False  # a source is read, a target written
    reads_prefix: bool = False  # the beginning of a text is read in both directions

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys that it uses and not all tasks do."""
        keys = self.own_keys
        if self.from_examples:
            keys += EXAMPLE_KEYS
        if self.labels_examples:
            keys += ("model.pooling",)
        if self.has_label_names:
            keys += ("data.labels",)
        if self.reads_source:
            keys += ("data.enc_len",)
        if self.writes_text:
            keys += WRITING_KEYS
        return keys

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def required_columns(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if column.required)

    @property
    def asked_columns(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns if column.asked)

    @property
    def from_examples(self) -> bool:
        """Whether it learns from files of examples, not from prepared tokens."""
        return bool(self.columns)

    @property
    def is_plain_lm(self) -> bool:
        """Whether each token of a text is predicted from those before it, and the text is left as it is."""
        return not self.transform

    @property
    def labels_examples(self) -> bool:
        """Whether there is one label for each example, not one for each token."""
        return self.answer in ("class", "labels", "number")

    @property
    def has_classes(self) -> bool:
        """Whether a label is one of several that exclude each other."""
        return self.answer in ("class", "tags")

    @property
    def has_label_names(self) -> bool:
        return self.answer in ("class", "labels", "tags")

    @property
    def has_head(self) -> bool:
        """Whether a head of model.num_labels outputs answers, not the vocabulary."""
        return self.answer in ("class", "labels", "number", "tags", "span")

    @property
    def writes_text(self) -> bool:
        return self.answer == "text"

    @property
    def answers_examples(self) -> bool:
        return self.from_examples or self.answer == "hidden"

    @property
    def answers_nothing(self) -> bool:
        """Whether a model of it is only for others to start from, or for its embeddings."""
        return self.answer in ("", "vectors")

    @property
    def learns_vectors(self) -> bool:
        """Whether what is wanted of a model is the vectors of words."""
        return self.answer == "vectors"

    @property
    def is_chat(self) -> bool:
        """Whether the examples are dialogues."""
        return self.writes_text and not self.reads_source

    @property
    def is_preference(self) -> bool:
        """Whether an example is two texts, of which one is preferred: both are in a row of a batch."""
        return self.loss == "preference"


TEXT = Column("text", asked=True)
LABEL = Column("label", is_text=False)
SECOND_TEXT = Column("text2", required=False)

ALL = (
    Task(
        "lm",
        models=(*CAUSAL, "ngram"),
        answer="continuation",
        metrics=(*TOKEN_METRICS, "bits_per_byte", "bytes"),
        own_keys=DISTRIBUTION_KEYS,
        special_tokens="none",
    ),
    Task(
        "mlm",
        models=BIDIRECTIONAL,
        answer="hidden",
        transform="mlm",
        own_keys=("task.mask_rate", "task.whole_words", *DISTRIBUTION_KEYS),
    ),
    Task(
        "prefix_lm",
        models=("decoder",),
        answer="continuation",
        transform="prefix_lm",
        own_keys=DISTRIBUTION_KEYS,
        special_tokens="none",
        reads_prefix=True,
    ),
    Task(
        "fim",
        models=CAUSAL,
        answer="continuation",
        transform="fim",
        own_keys=("task.fim_rate", *DISTRIBUTION_KEYS),
    ),
    Task(
        "span_corruption",
        models=SOURCE_TO_TARGET,
        answer="",
        transform="span_corruption",
        own_keys=("task.mask_rate", "task.span_length", *DISTRIBUTION_KEYS),
        special_tokens="sentinels",
        reads_source=True,
    ),
    Task(
        "ul2",
        models=SOURCE_TO_TARGET,
        answer="",
        transform="ul2",
        own_keys=("task.mask_rate", "task.span_length", *DISTRIBUTION_KEYS),
        special_tokens="sentinels",
        reads_source=True,
    ),
    Task(
        "skipgram",
        models=("vectors", "decoder"),
        answer="vectors",
        transform="skipgram",
        own_keys=("task.window", "task.negatives", "task.subsample", *DISTRIBUTION_KEYS),
        special_tokens="none",
    ),
    Task(
        "glove",
        models=("vectors",),
        answer="vectors",
        transform="pairs",  # of words, counted by data/pairs.py
        loss="glove",
        metrics=("loss", "pairs"),
        own_keys=("task.window", "task.x_max"),
        special_tokens="none",
    ),
    Task(
        "classify",
        models=(*READERS, "bag"),
        answer="class",
        columns=(TEXT, LABEL, SECOND_TEXT),
        transform="classify",
        loss="cross_entropy",
        metrics=(
            "loss",
            "accuracy",
            "precision",
            "recall",
            "f1",
            "f1_micro",
            "f1_positive",
            "auc",
            "log_loss",
            "divergence",
        ),
        intervals=("accuracy", "f1", "auc"),
        own_keys=(*DISTRIBUTION_KEYS, "task.class_weights", "task.balanced_sampling", "task.focal"),
    ),
    Task(
        "multilabel",
        models=(*READERS, "bag"),
        answer="labels",
        columns=(TEXT, LABEL, SECOND_TEXT),
        transform="multilabel",
        loss="binary_cross_entropy",
        metrics=("loss", "f1", "f1_micro", "exact_match", "auc", "divergence"),
        intervals=("f1", "f1_micro"),
        own_keys=("task.focal",),
    ),
    Task(
        "regress",
        models=(*READERS, "bag"),
        answer="number",
        columns=(TEXT, LABEL, SECOND_TEXT),
        transform="regress",
        loss="squared_error",
        metrics=("loss", "mse", "mae", "pearson", "spearman", "divergence"),
        intervals=("mse", "pearson"),
    ),
    Task(
        "tag",
        models=READERS,
        answer="tags",
        columns=(Column("words", is_text=False, asked=True), Column("tags", is_text=False)),
        transform="tag",
        loss="cross_entropy",
        metrics=(
            "loss",
            "accuracy",
            "f1",
            "f1_micro",
            "entity_precision",
            "entity_recall",
            "entity_f1",
            "divergence",
        ),
        own_keys=(*DISTRIBUTION_KEYS, "task.class_weights", "task.focal"),
    ),
    Task(
        "qa",
        models=READERS,
        answer="span",
        columns=(
            Column("question", asked=True),
            Column("context", asked=True),
            Column("answer", is_text=False),
            Column("start", is_text=False, required=False),
        ),
        transform="qa",
        loss="span",
        metrics=("loss", "exact_match", "f1", "divergence"),
        intervals=("exact_match", "f1"),
    ),
    Task(
        "seq2seq",
        models=SOURCE_TO_TARGET,
        answer="text",
        columns=(Column("source", asked=True), Column("target")),
        transform="seq2seq",
        metrics=(*TOKEN_METRICS, *TEXT_METRICS),
        own_keys=DISTRIBUTION_KEYS,
        reads_source=True,
    ),
    Task(
        "sft",
        models=CAUSAL,
        answer="text",
        columns=(
            Column("messages", is_text=False, required=False),
            Column("prompt", required=False, asked=True),
            Column("response", required=False),
        ),
        transform="sft",
        metrics=(*TOKEN_METRICS, *TEXT_METRICS),
        own_keys=DISTRIBUTION_KEYS,
    ),
    Task(
        "dpo",
        models=CAUSAL,
        answer="text",
        columns=(Column("prompt", asked=True), Column("chosen"), Column("rejected")),
        transform="dpo",
        loss="preference",
        metrics=("loss", "accuracy", "margin", "pairs", *TEXT_METRICS),
        own_keys=("task.label_smoothing", "task.beta"),
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in ALL}
UNKNOWN = Task("", models=(), answer="")


def task_of(config: ConfigDict) -> Task:
    """The record of config.task.name; UNKNOWN for a name that `check` has yet to refuse."""
    return TASKS.get(config.task.name, UNKNOWN)


def text_columns() -> tuple[str, ...]:
    """The columns that hold text, of all tasks."""
    names = []
    for task in ALL:
        names += [column.name for column in task.columns if column.is_text]
    return tuple(dict.fromkeys(names))


def tasks_using(key: str) -> tuple[str, ...]:
    """The names of the tasks that use a config key; () where all of them do."""
    return tuple(task.name for task in ALL if key in task.keys)


TEXT_COLUMNS = text_columns()


def less_is_better(metric: str) -> bool:
    return re.search(DIRECTIONS["minimize"], metric) is not None
