"""A tiny config of the same structure as a real one, and random data for its task."""

import contextlib
import json
import math
import os
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxlm.config.attention_kernels import capabilities
from jaxlm.config.check import reset_unused
from jaxlm.config.keys import MESH_AXES
from jaxlm.config.recipe import resolve
from jaxlm.config.tasks import TASKS, task_of
from jaxlm.data.prepare import prepare
from jaxlm.data.tokenization.tokenizer import Bytes
from jaxlm.data.transforms import Vocabulary

STEPS = 20  # of every run
LABELS = ("first", "second", "third")  # of examples
EXAMPLES = 400
DOCUMENTS = 600
EMBED_DIM = 64
SEQ_LEN = 64


def shrink(config: ConfigDict) -> ConfigDict:
    """A tiny config of the same structure: the compiled code is the same, only smaller. config: unresolved."""
    c = config.copy_and_resolve_references()
    shrink_layers(c.model)
    shrink_sizes(c)
    exclude_rounding(c)
    shrink_data(c)
    shrink_training(c)
    give_teacher(c)
    reset_unused(c)
    return c


def shrink_layers(m: ConfigDict) -> None:
    """As few layers as their pattern, the scan and the pipeline need. An encoder of its own depth keeps another one."""
    kinds = len(m.layers)
    if m.encoder_layers in (0, m.num_layers):
        m.encoder_layers = 0
    else:
        m.encoder_layers = 3 * kinds
    if m.scan:
        m.num_layers = kinds * scanned_rounds(m)
    else:
        m.num_layers = kinds * max(1, 2 // kinds)


def scanned_rounds(m: ConfigDict) -> int:
    """How often a scan repeats the pattern of layers: 4 or 2 times a pipeline round where the real number allows it."""
    repeats = m.num_layers // len(m.layers)
    for count in (4, 2):
        if repeats % (count * m.pipeline_rounds) == 0:
            return count * m.pipeline_rounds
    return m.pipeline_rounds


def small_count(count: int) -> int:
    """At most 8, and divisible by the same powers of 2 up to 8: what no mesh axis divides stays so."""
    if count <= 8:
        return count
    if count % 2:
        return 3
    return math.gcd(count, 8)


def shrink_sizes(c: ConfigDict) -> None:
    m = c.model
    kv_heads = m.num_kv_heads or m.num_heads
    m.num_kv_heads = small_count(kv_heads)
    m.num_heads = small_count(m.num_heads // kv_heads) * m.num_kv_heads
    m.head_dim = 8
    if m.hidden_dim == m.embed_dim:
        m.hidden_dim = 0
    elif m.hidden_dim:
        m.hidden_dim = 2 * EMBED_DIM
    m.embed_dim = EMBED_DIM
    m.mlp_dim = 2 * EMBED_DIM
    if m.expert_dim:
        m.expert_dim = EMBED_DIM
    if m.num_experts:
        m.num_experts = next(n for n in (8, 4, m.num_experts) if m.num_experts % n == 0)
        m.experts_per_token = min(m.experts_per_token, max(m.num_experts // 2, 1))
    # A vocabulary that no mesh axis divides stays so.
    m.vocab_size = 8 * math.ceil(Vocabulary(Bytes(), c.task.name).size / 8) + m.vocab_size % 8
    if m.context_length in (0, c.data.seq_len):
        m.context_length = 0
    elif m.context_length > c.data.seq_len:
        m.context_length = 2 * SEQ_LEN
    else:
        m.context_length = SEQ_LEN // 2
    m.window = 24
    m.buckets = min(m.buckets, 1024)
    m.lora_rank = min(m.lora_rank, 4)
    m.num_labels = 0
    m.pipeline_microbatches = 0


def exclude_rounding(c: ConfigDict) -> None:
    """Whatever makes results depend on the mesh by design: low precision, random numbers, kernels of one chip."""
    m = c.model
    m.dropout = 0.0
    m.embed_dropout = -1.0
    m.dtype = "float32"
    m.param_dtype = "float32"
    m.quantize = "none"  # scales are those of a device's part of a tensor
    c.optim.rounding = "nearest"  # float32 knows no other
    if not capabilities(m.attention).auto_on_cpu:
        m.attention = "reference"
    largest_is_chosen = task_of(c).labels_examples and m.pooling == "max"
    if m.num_experts or largest_is_chosen:
        # Adam with a small eps turns rounding errors into steps, which would change what is chosen.
        c.optim.eps = max(c.optim.eps, 1e-3)


def shrink_data(c: ConfigDict) -> None:
    d = c.data
    d.seq_len = SEQ_LEN
    if d.enc_len:
        d.enc_len = SEQ_LEN + d.enc_len % 8
    for key in ("path", "mixture", "train", "val", "columns"):
        d[key] = ""
    d.tokenizer = "bytes"
    d.min_count = 1
    d.examples_per_row = min(d.examples_per_row or 4, 4)
    if task_of(c).has_label_names:
        d.labels = LABELS
    else:
        d.labels = ()


def shrink_training(c: ConfigDict) -> None:
    t = c.train
    t.grad_accumulation = min(t.grad_accumulation, 2)
    t.batch_size = 16 * t.grad_accumulation
    t.steps = STEPS
    t.stop_at = 0
    if t.loss_chunk:
        t.loss_chunk = 16
    t.init_from = ""
    c.optim.warmup_steps = min(c.optim.warmup_steps, 5)  # -1 stays
    c.eval.every = 0
    c.eval.patience = 0
    c.eval.generate = 0
    c.log.every = 1
    c.log.tensorboard = False
    c.log.trackers = ""
    c.checkpoint.every = 1000
    c.mesh.update(dict.fromkeys(MESH_AXES, 0) | {"slices": 1, "strategy": "data"})


def needs_teacher(c: ConfigDict) -> bool:
    return task_of(c).is_preference or c.task.distill > 0


def give_teacher(c: ConfigDict) -> None:
    """A teacher of the model's own shape, where the task needs one; its parameters are those of seed 0."""
    c.task.teacher = ""
    c.task.teacher_model = ()
    if needs_teacher(c):
        c.task.teacher = "teacher"
        c.seed = c.seed or 1  # another than the teacher's
        c.task.teacher_model = tuple(resolve(c).model.items())


# ---------------------------------------------------------------- data


def make_data(path: Path, tiny: ConfigDict) -> None:
    """Writes data for a tiny config, examples of its task or token shards, and names them in its section `data`."""
    if task_of(tiny).from_examples:
        tiny.data.train = str(path / "examples.jsonl")
        make_examples(Path(tiny.data.train), tiny.task.name)
    else:
        tiny.data.path = str(path / "tokens")
        make_tokens(path)


def make_examples(file: Path, task: str) -> None:
    """Writes a few hundred examples of random letters, several of which fit into a row."""
    rng = np.random.default_rng(0)
    answer = TASKS[task].answer
    rows = []
    for i in range(EXAMPLES):
        text = random_text(rng)
        number = float(rng.normal())
        word = str(rng.choice(text.split()))
        label = LABELS[i % 3]
        if answer == "number":
            label = number
        elif answer == "labels":
            label = list(LABELS[: i % 4])
        values = example(text, word, label)
        row = {}
        for column in TASKS[task].columns:
            if column.name in values or column.required:
                row[column.name] = values.get(column.name, text)
        rows.append(row)
    write_lines(file, rows)


def random_text(rng: np.random.Generator) -> str:
    """Two to four words of random letters."""
    lengths = rng.integers(1, 6, rng.integers(2, 5))
    letters = list("abcdefgh")
    return " ".join("".join(rng.choice(letters, n)) for n in lengths)


def example(text: str, word: str, label) -> dict:
    """The value of each column that some task has."""
    words = text.split()
    return {
        "text": text,
        "text2": word,
        "label": label,
        "words": words,
        "tags": [label] * len(words),
        "question": word[::-1],
        "context": text,
        "answer": word,
        "source": text,
        "target": text[::-1],
        "prompt": text,
        "response": word,
        "chosen": word,
        "rejected": text[:3],
    }


def make_tokens(path: Path) -> None:
    """Writes documents of random letters, most of them shorter than a row, as token shards of bytes in path/tokens."""
    rng = np.random.default_rng(0)
    letters = list("abcdefgh ,.\n")
    rows = []
    for _ in range(DOCUMENTS):
        rows.append({"text": "".join(rng.choice(letters, rng.integers(2, 100)))})
    file = path / "text.jsonl"
    write_lines(file, rows)
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as quiet:
        quiet.enter_context(contextlib.redirect_stdout(nowhere))
        quiet.enter_context(contextlib.redirect_stderr(nowhere))
        prepare([str(file)], path / "tokens", tokenizer="bytes", workers=1)


def write_lines(file: Path, rows: list[dict]) -> None:
    with open(file, "w") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
