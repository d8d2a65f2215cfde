"""python -m jaxlm.verify --config=FILE.py[:ARG] [--meshes="fsdp=8; fsdp=4 tensor=2"] [--json=FILE]: prove a config.

Shrinks the config to a tiny one of the same structure (norms, ratio of heads, experts, windows, scan, remat, optimizer)
and shows on 8 fake CPU devices, in float32 and with documents packed into rows, that it computes the same thing:

  on every mesh as on one device: losses over 20 steps, and every parameter's gradient
  resumed as uninterrupted, packed as alone, on 2 hosts as on 1

For every task: the data are random documents or examples of its kind, a teacher is a random model of the same shape.
Exit code 1 where one of these breaks, with the mesh, the parameter and the first place in the model that differs.
"""

import contextlib
import functools
import json
import logging
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.attention_kernels import capabilities
from jaxlm.config.check import check, forget, require
from jaxlm.config.keys import COUNTED, LABELLED, MESH_AXES, ROLES
from jaxlm.config.recipe import flatten, load, override, resolve
from jaxlm.data.batches import train_batches
from jaxlm.data.prepare import prepare
from jaxlm.data.tokenization.tokenizer import Bytes
from jaxlm.data.transforms import Vocabulary
from jaxlm.errors import ConfigError, UserError
from jaxlm.parallel.mesh import make_mesh
from jaxlm.run.warm_start import inherit
from jaxlm.step.costs import human
from jaxlm.verify.laws import (
    DEVICES,
    STEPS,
    Result,
    on_mesh,
    packed_as_alone,
    same_as_one_device,
    train_on,
)

MESHES = (
    "data=8", "data=8 zero1", "fsdp=8", "tensor=8", "fsdp=4 tensor=2", "data=2 fsdp=2 tensor=2", "sequence=8 ring",
    "sequence=4 tensor=2 all_gather", "fsdp=2 sequence=2 tensor=2", "stage=4 fsdp=2", "stage=2 fsdp=2 tensor=2",
    "expert=4 data=2", "expert=2 fsdp=2 tensor=2",
)  # fmt: skip
LABELS = ("first", "second", "third")  # of examples
HOSTS_TOLERANCE = 1e-6  # relative, of the losses


def few(count: int) -> int:
    """At most 8, divided by the same powers of 2 up to 8: what no axis divides stays so."""
    if count <= 8:
        return count
    return max(math.gcd(count, 8), 3 if count % 2 else 2)


def shrink(c: ConfigDict) -> ConfigDict:
    """A tiny config of the same structure: what is compiled is the same code, only smaller. c: unresolved."""
    c = c.copy_and_resolve_references()
    m = c.model
    d = c.data
    t = c.train
    group = few(m.num_heads // (m.num_kv_heads or m.num_heads))
    kv_heads = few(m.num_kv_heads or m.num_heads)
    rounds_of_layers = m.num_layers // len(m.layers)
    scanned = (
        next((n for n in (4, 2) if rounds_of_layers % (n * m.pipeline_rounds) == 0), 1)
        * m.pipeline_rounds
    )
    vocab = (
        8 * math.ceil(Vocabulary(Bytes(), c.task.name).size / 8) + m.vocab_size % 8
    )  # what no axis divides stays so
    layers = m.num_layers
    m.num_layers = len(m.layers) * (scanned if m.scan else max(1, 2 // len(m.layers)))
    m.num_heads = group * kv_heads
    m.num_kv_heads = kv_heads
    m.head_dim = 8
    m.hidden_dim = 0 if m.hidden_dim in (0, m.embed_dim) else 128
    m.embed_dim = 64
    m.mlp_dim = 128
    m.expert_dim = 64 if m.expert_dim else 0
    m.vocab_size = vocab
    if m.context_length in (0, d.seq_len):
        m.context_length = 0
    else:
        m.context_length = 128 if m.context_length > d.seq_len else 32
    m.window = 24
    if m.num_experts:
        m.num_experts = next(n for n in (8, 4, m.num_experts) if m.num_experts % n == 0)
        m.experts_per_token = min(m.experts_per_token, max(m.num_experts // 2, 1))
    if m.num_experts or (
        c.task.name in LABELLED and m.pooling == "max"
    ):  # something is chosen, by being the largest
        c.optim.eps = max(
            c.optim.eps, 1e-3
        )  # so that Adam makes no steps of mere rounding, which change the choice
    m.dropout = 0.0
    m.embed_dropout = -1.0
    m.dtype = "float32"
    m.param_dtype = "float32"
    m.pipeline_microbatches = 0
    c.optim.rounding = "nearest"  # of float32 there is no other
    if m.encoder_layers not in (0, layers):
        m.encoder_layers = 3 * len(m.layers)
    else:
        m.encoder_layers = 0
    m.buckets = min(m.buckets, 1024)
    m.lora_rank = min(m.lora_rank, 4)
    m.num_labels = 0
    m.quantize = "none"  # its rounding is that of a device: of another mesh, another
    if not capabilities(m.attention).auto_on_cpu:
        m.attention = "reference"
    d.seq_len = 64
    d.path = ""
    d.mixture = ""
    d.train = ""
    d.val = ""
    d.columns = ""
    d.enc_len = 64 + d.enc_len % 8 if d.enc_len else 0
    d.tokenizer, d.min_count, d.examples_per_row = "bytes", 1, min(d.examples_per_row or 4, 4)
    if c.task.name in ("classify", "multilabel", "tag"):
        d.labels = LABELS
    else:
        d.labels = ()
    t.grad_accumulation = min(t.grad_accumulation, 2)
    t.batch_size = 16 * t.grad_accumulation
    t.steps = STEPS
    t.stop_at = 0
    t.loss_chunk = 16 if t.loss_chunk else 0
    if c.optim.warmup_steps == -1:
        c.optim.warmup_steps = -1
    else:
        c.optim.warmup_steps = min(c.optim.warmup_steps, 5)
    c.eval.every = c.eval.patience = c.eval.generate = 0
    c.log.every = 1
    c.log.tensorboard = False
    c.checkpoint.every = 1000
    c.mesh.update(dict.fromkeys(MESH_AXES, 0) | {"slices": 1, "strategy": "data"})
    t.init_from = ""
    c.task.teacher = ""
    c.task.teacher_model = ()
    if needs_teacher(c):  # of the same shape, and another seed than its own, 0
        c.task.teacher = "teacher"
        c.seed = c.seed or 1
        c.task.teacher_model = tuple(resolve(c).model.items())
    forget(c)
    return c


def needs_teacher(c: ConfigDict) -> bool:
    return c.task.name == "dpo" or c.task.distill > 0


EXAMPLES = {  # column -> (a random text of so many letters, a word of it, a label) -> its value
    "text": lambda text, word, label: text,
    "text2": lambda text, word, label: word,
    "label": lambda text, word, label: label,
    "words": lambda text, word, label: text.split(),
    "tags": lambda text, word, label: [label for _ in text.split()],
    "question": lambda text, word, label: word[::-1],
    "context": lambda text, word, label: text,
    "answer": lambda text, word, label: word,
    "source": lambda text, word, label: text,
    "target": lambda text, word, label: text[::-1],
    "prompt": lambda text, word, label: text,
    "response": lambda text, word, label: word,
    "chosen": lambda text, word, label: word,
    "rejected": lambda text, word, label: text[:3],
}


def make_examples(file: Path, task: str) -> None:
    """A few hundred examples of random letters, several of which fit into a row."""
    rng = np.random.default_rng(0)
    columns = [role.rstrip("?") for role in ROLES[task]]
    rows = []
    for i in range(400):
        text = " ".join(
            "".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(1, 6, rng.integers(2, 5))
        )
        label = {"regress": float(rng.normal()), "multilabel": list(LABELS[: i % 4])}.get(
            task, LABELS[i % 3]
        )
        given = text, str(rng.choice(text.split())), label
        rows.append({name: EXAMPLES[name](*given) for name in columns if name in EXAMPLES})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(path: Path, tiny: ConfigDict) -> None:
    """Data for a tiny config: examples of its task, or token shards, named in its section `data`."""
    if tiny.task.name in ROLES:
        tiny.data.train = str(path / "examples.jsonl")
        make_examples(Path(tiny.data.train), tiny.task.name)
    else:
        tiny.data.path = str(path / "tokens")
        make_tokens(path)


def make_tokens(path: Path) -> None:
    """A few hundred documents of random letters, most of them shorter than a row, as token shards of bytes."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(600):
        texts.append("".join(rng.choice(list("abcdefgh ,.\n"), rng.integers(2, 100))))
    (path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        prepare([str(path / "text.jsonl")], path / "tokens", tokenizer="bytes", workers=1)


class Trainer:
    """Runs `python -m jaxlm.train` of a tiny config in processes of their own."""

    def __init__(self, config: ConfigDict, folder: Path):
        self.folder = folder
        self.recipe = folder / "recipe.py"
        self.recipe.write_text(RECIPE.format(flat=repr(flatten(config))))

    def __call__(self, name: str, *flags: str, hosts: int = 1) -> dict[int, float]:
        """{step: loss} of workdir `name`. Raises UserError with what the run said where it failed."""
        command = [
            sys.executable,
            "-m",
            "jaxlm.train",
            f"--config={self.recipe}",
            f"--workdir={self.folder / name}",
        ]
        env = os.environ | {"XLA_FLAGS": xla_flags(DEVICES // hosts), "JAX_PLATFORMS": "cpu"}
        with socket.socket() as free:
            free.bind(("localhost", 0))
            peers = [f"--coordinator=localhost:{free.getsockname()[1]}", f"--num_processes={hosts}"]
        runs = []
        for host in range(hosts):
            extra = [*peers, f"--process_id={host}"] if hosts > 1 else []
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            runs.append(subprocess.Popen([*command, *flags, *extra], env=env, **pipes))
        try:
            said = [run.communicate(timeout=900)[0] for run in runs]
        finally:
            for run in runs:
                run.kill()
        for run, text in zip(runs, said):
            if run.returncode:
                raise UserError(
                    f"jaxlm.train ended with exit code {run.returncode}: {text[-2000:]}"
                )
        rows = []
        for line in (self.folder / name / "metrics.jsonl").read_text().splitlines():
            rows.append(json.loads(line))
        if [row["step"] for row in rows] != list(range(1, rows[-1]["step"] + 1)):
            raise UserError(
                f"metrics.jsonl of {name} does not have each step once: {[row['step'] for row in rows]}"
            )
        return {row["step"]: row["loss"] for row in rows}


RECIPE = """from jaxlm.config.recipe import unflatten


def get_config():
    return unflatten({flat})
"""


def make_teacher(config: ConfigDict, folder: Path) -> Path:
    """The workdir of a short run of this task without a teacher, or, where it cannot be without, of plain text."""
    folder = folder / "teacher"
    plain = config.copy_and_resolve_references()
    folder.mkdir()
    plain.task.distill = 0.0
    plain.task.temperature = 1.0
    plain.task.teacher = ""
    plain.task.teacher_model = ()
    if plain.task.name == "dpo":
        plain.task.name = "lm"
        plain.data.train = ""
        forget(plain)
        make_data(folder, plain)
    Trainer(plain, folder)("run", "--config.train.stop_at=2")
    return folder / "run"


def runs_agree(tiny: ConfigDict, folder: Path) -> list[Result]:
    """Resumed = uninterrupted to the last digit, and two processes of four devices = one of eight, with real runs."""
    meshes = ("data=2 fsdp=2 tensor=2", "fsdp=8", "data=8")
    config = next(
        (c for words in meshes if not check(c := on_mesh(tiny, words), DEVICES)),
        on_mesh(tiny, "data=8"),
    )
    results = []
    try:
        if needs_teacher(config):
            config.task.teacher = str(make_teacher(config, folder))
        train = Trainer(config, folder)
        whole = train("whole")
        half = f"--config.train.stop_at={STEPS // 2}"
        train("parts", half)
        parts = train("parts")
        unlike = [step for step in whole if whole[step] != parts.get(step)]
        figures = {"equal_losses": len(whole) - len(unlike), "of": len(whole)}
        place = {"place": f"the loss of step {unlike[0]}"} if unlike else {}
        results.append(Result("resumed = uninterrupted", not unlike, figures | place))
        for seed in range(
            3 if tiny.model.num_experts else 1
        ):  # others where it may have been a tie between experts
            flag = f"--config.seed={tiny.seed + seed}"
            one = train(f"alone{seed}", flag) if seed else whole
            two = train(f"hosts{seed}", flag, hosts=2)
            difference = max(abs(two[step] - one[step]) / abs(one[step]) for step in one)
            if difference <= HOSTS_TOLERANCE:
                break
        results.append(
            Result("hosts 1 = 2", difference <= HOSTS_TOLERANCE, {"loss_difference": difference})
        )
    except UserError as error:
        name = "hosts 1 = 2" if results else "resumed = uninterrupted"
        results.append(Result(name, False, {"place": str(error)}))
    return results


# ---------------------------------------------------------------- the program


def xla_flags(devices: int) -> str:
    """Fake devices, and compiles twice as fast: what runs is tiny."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


def line(result: Result) -> str:
    f = result.figures
    if "refused" in f:
        cells = ["not for this model:", " ".join(f["refused"].split())]
    elif "gradient_difference" in f:
        cells = [
            f"loss {f['loss_difference']:.1e}",
            f"gradient {f['gradient_difference']:.1e} {f['parameter']:44}",
            f"{human(f['bytes_per_device']):>10} a device",
            f"{f['replicated']:6.1%} replicated",
        ] + [f"after {f['ties']} ties between experts"] * bool(f["ties"])
    else:
        cells = []
        for key, value in f.items():
            if key != "place":
                cells.append(f"{key.replace('_', ' ')} {value:.3g}")
    if "refused" in f:
        verdict = "-"
    else:
        verdict = "ok" if result.ok else "FAIL"
    if "place" in f:
        where = f"\n      first difference: {f['place']}"
    else:
        where = ""
    return f"{verdict:4}  {result.name:30}  {'  '.join(cells)}{where}"


def verify(config: ConfigDict, meshes: list[str] | None = None) -> list[Result]:
    """Every law for this (unresolved) config, each printed as it is known. meshes: instead of the sensible ones."""
    results = []
    tiny = shrink(config)

    def say(result: Result) -> None:
        results.append(result)
        print(line(result), flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as beside:
        folder = Path(folder)
        make_data(folder, tiny)
        runs = beside.submit(runs_agree, tiny, folder)  # in processes of their own
        batches = train_batches(resolve(tiny))
        single = resolve(on_mesh(tiny, ""))
        alone = functools.cache(
            partial(train_on, single, make_mesh(single, jax.devices()[:1]), batches)
        )
        one = alone(0)
        print(
            f"a tiny model of this structure, in float32, without dropout: loss {one.losses[0]:.4f} -> "
            f"{one.losses[-1]:.4f} in {STEPS} steps on one device; differences from it:"
        )
        for words in meshes or [
            words for words in MESHES if "expert" not in words or tiny.model.num_experts
        ]:
            say(same_as_one_device(tiny, words, alone, batches))
        say(packed_as_alone(tiny, batches))
        for result in runs.result():
            say(result)
    return results


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="jaxlm.verify", description=__doc__)
    parser.add_config()
    parser.add_argument(
        "--meshes", help='instead of all that are sensible: "fsdp=8; sequence=4 tensor=2 ring"'
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse(argv)
    cli.require_writable("--json", args.json)
    config = load(args.config)
    began = time.perf_counter()
    problems = override(config, args.overrides)
    inherit(
        config
    )  # where those runs are not here, the recipe's own model section is what is verified
    require(problems + check(config))
    if config.model.name in COUNTED:
        raise ConfigError(
            f"config.model.name={config.model.name}: is counted, not trained: there is no step whose gradients could "
            "differ; train it, and evaluate it on any mesh"
        )
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(DEVICES)}"  # read when the first device is asked for
    )
    cli.spare_threads()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # as in a run on several CPU devices
    logging.getLogger("jaxlm").setLevel(
        logging.ERROR
    )  # what a tiny model leaves whole says nothing of the real one
    meshes = None
    if args.meshes is not None:
        meshes = [words.strip() for words in args.meshes.split(";") if words.strip()]
        tiny = shrink(config)
        require([problem for words in meshes for problem in check(on_mesh(tiny, words), DEVICES)])
        if not meshes:
            raise ConfigError(
                '--meshes: empty; give some, such as --meshes="fsdp=8; fsdp=4 tensor=2"'
            )
    results = verify(config, meshes)
    failed = [result.name for result in results if not result.ok]
    refused = sum("refused" in result.figures for result in results)
    held = len(results) - len(failed) - refused
    seconds = time.perf_counter() - began
    print(
        f"{held} hold{f', {refused} not for this model' if refused else ''} ({seconds:.0f} s)"
        + (f"; FAILED: {', '.join(failed)}" if failed else "")
    )
    if args.json:
        rows = [{"name": result.name, "ok": result.ok} | result.figures for result in results]
        Path(args.json).write_text(
            json.dumps({"config": args.config, "ok": not failed, "laws": rows}, indent=1) + "\n"
        )
    if failed:
        return 1
    return 0


if __name__ == "__main__":
    cli.run(main)
