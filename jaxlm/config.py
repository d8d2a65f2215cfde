"""Every key of the config once, with its default and the reason it exists; loading and overriding. No jax.

A recipe (configs/NAME.py) defines `get_config(arg)`, starts from `base()` and only overrides. The command line
overrides again with `--config.KEY=VALUE`. jaxlm/check.py lists every problem at once; `resolve` then replaces the
zeros (and one -1) that mean "derive it" by numbers.
"""

import ast
import importlib.util
import inspect
import math
import re
from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.cli import did_you_mean
from jaxlm.errors import ConfigError

MESH_AXES = ("data", "fsdp", "stage", "expert", "sequence", "tensor")
STRATEGIES = {  # mesh.strategy -> the axis that takes the devices left over
    "data": "data",
    "zero1": "data",  # and the optimizer's state is sharded over it
    "fsdp": "fsdp",
    "tensor": "tensor",
    "sequence": "sequence",
    "expert": "expert",
}
CHOICES = {
    "model.name": ("decoder",),
    "model.norm": ("rms", "layer"),
    "model.mlp": ("swiglu", "gelu", "relu2"),
    "model.positions": ("rope", "learned", "sinusoidal", "none"),
    "model.remat": ("none", "full", "dots", "attention"),
    "model.attention": ("auto", "reference", "blockwise", "splash", "xla", "cudnn", "tokamax"),
    "model.context_parallel": ("ring", "all_gather"),
    "model.router": ("softmax", "sigmoid"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "mesh.strategy": tuple(STRATEGIES),
    "mesh.across": ("data", "fsdp", "stage"),
    "optim.name": ("adamw", "muon"),
    "optim.schedule": ("constant", "linear", "cosine", "wsd", "inverse_sqrt"),
}


def base() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # parameters, dropout and the order of data all follow from it

    c.model = m = ConfigDict()
    m.name = "decoder"  # which builder in jaxlm.models.MODELS
    m.num_layers = 6  # blocks of attention and MLP
    m.embed_dim = 384  # width of the residual stream
    m.num_heads = 6  # query heads
    m.num_kv_heads = 0  # key and value heads (grouped-query attention); 0: as num_heads
    m.head_dim = 0  # 0: embed_dim / num_heads
    m.mlp_dim = 0  # hidden width of the MLP; 0: 4 x embed_dim, or 8/3 x embed_dim to a multiple of 64 for swiglu
    m.vocab_size = 0  # 0: as the tokenizer; larger is allowed (padding for even shards)
    m.context_length = 0  # furthest a token looks back, and the table length of learned positions; 0: data.seq_len
    m.norm = "rms"  # rms | layer
    m.norm_eps = 1e-6  # added to the variance (Llama and GPT-2: 1e-5)
    m.mlp = "swiglu"  # swiglu | gelu | relu2
    m.num_experts = 0  # experts of each MLP (mixture of experts); 0: dense
    m.experts_per_token = 2  # that a token is sent to
    m.expert_dim = 0  # hidden width of each; 0: as mlp_dim
    m.shared_experts = 0  # and these always, as one MLP of their summed width
    m.capacity_factor = 0.0  # an expert takes this x its even share of a row's tokens and drops others; 0: drops none
    m.router = "softmax"  # softmax | sigmoid (scores one by one, choice by score + bias: DeepSeek-V3)
    m.balance_loss = 0.01  # weight of the loss that spreads each row's tokens over the experts
    m.router_z_loss = 0.0  # weight of log(Z)^2 of the router (ST-MoE: 1e-3)
    m.balance_rate = 0.0  # step of the routers' bias towards an even load (DeepSeek-V3: 1e-3); 0: no bias
    m.positions = "rope"  # rope | learned | sinusoidal | none
    m.rope_theta = 10_000.0  # base of the rotary wavelengths
    m.layers = "L"  # pattern repeated over the layers: L looks at the whole context, S at `window` tokens
    m.window = 256  # tokens that an S layer sees, itself included
    m.qk_norm = False  # RMS norm of queries and keys, steadies large learning rates
    m.bias = False  # biases in linear layers (GPT-2 has them, most later models do not)
    m.tie_embeddings = True  # one table for input and output
    m.logit_softcap = 0.0  # c * tanh(logits / c); 0: off
    m.attention_softcap = 0.0  # the same on attention logits; 0: off
    m.dropout = 0.0  # on embeddings and on each block's output
    m.embed_std = 0.02  # standard deviation of the initial embeddings; matrices start at 1 / sqrt(inputs)
    m.scan = True  # one compiled layer for all: fast compiles; False unrolls, faster on CPU
    m.remat = "none"  # what the backward pass recomputes: none | full | dots (all but products) | attention
    m.attention = "auto"  # kernel: auto | reference | blockwise | splash (TPU) | xla | cudnn | tokamax (GPUs)
    m.context_parallel = "ring"  # how attention meets the keys of other devices (mesh.sequence): ring | all_gather
    m.pipeline_microbatches = 0  # parts of a microbatch in flight over mesh.stage; 0: up to 4 a stage
    m.pipeline_rounds = 1  # times that each goes round all stages; more: less bubble, more transfers (circular)
    m.dtype = "bfloat16"  # of the computation
    m.param_dtype = "float32"  # of the stored parameters

    c.data = d = ConfigDict()
    d.path = ""  # a directory made by jaxlm.data.prepare
    d.mixture = ""  # instead of path: "DIR=0.7,DIR=0.3", sampled with these weights
    d.seq_len = 256  # tokens in one row of a batch
    d.shuffle = True  # rows in a fresh random order each epoch
    d.isolate = True  # documents packed into one row do not see each other (segments)
    d.prefetch = 2  # batches made ahead, in the background

    c.train = t = ConfigDict()
    t.steps = 1000  # length of the run and of the schedule
    t.batch_size = 32  # rows in one optimizer step, over all devices
    t.grad_accumulation = 1  # microbatches a step: less memory, the same result
    t.stop_at = 0  # end cleanly after this step, leaving the schedule as it is; 0: at steps
    t.loss_chunk = 0  # positions whose logits exist at one time; 0: 64 MiB of them on a CPU, else 512
    t.z_loss = 0.0  # weight of log(Z)^2, keeps logits from drifting (PaLM: 1e-4)
    t.ema = 0.0  # decay of an average of the parameters, used for evaluation and generation; 0: off
    t.max_skipped = 20  # stop after this many steps in a row whose gradients were not finite

    c.optim = o = ConfigDict()
    o.name = "adamw"  # adamw | muon (matrices by Muon, the rest by AdamW)
    o.learning_rate = 3e-4  # peak
    o.schedule = "cosine"  # constant | linear | cosine | wsd | inverse_sqrt, each after a linear warm-up
    o.warmup_steps = -1  # steps from peak / warmup_steps up to the peak; -1: 5% of train.steps
    o.end_factor = 0.1  # final learning rate / peak (linear, cosine, wsd)
    o.cooldown_fraction = 0.2  # part of the run in which wsd decays
    o.weight_decay = 0.1  # decoupled, times the learning rate
    # Ordered (regex, factor of weight_decay); the first that is found in a parameter's name counts.
    o.decay = ((r"norm|bias|positions", 0.0), (r".*", 1.0))
    o.b1 = 0.9  # Adam: decay of the mean of gradients
    o.b2 = 0.95  # and of their squares (0.999 for small batches, 0.95 is steadier at large ones)
    o.eps = 1e-8  # added to the root of the squares
    o.clip = 1.0  # largest global norm of the gradients; 0: off
    o.adam_learning_rate = 0.0  # muon: peak for embeddings, norms and biases; 0: as learning_rate
    o.momentum = 0.95  # muon

    c.mesh = ConfigDict()  # devices along each axis; 0: 1, or for the strategy's axis (then data) the devices left
    c.mesh.strategy = "data"  # which axis takes them: data | zero1 | fsdp | tensor | sequence | expert
    c.mesh.data = 0  # copies of the parameters, each with its own rows (zero1: optimizer state split over them)
    c.mesh.fsdp = 0  # rows and parameters both sharded
    c.mesh.stage = 0  # pipeline stages: layers
    c.mesh.expert = 0  # experts; outside of them as fsdp
    c.mesh.sequence = 0  # positions (context parallel)
    c.mesh.tensor = 0  # heads, MLP and vocabulary; positions between the layers' products
    c.mesh.slices = 1  # groups of devices joined by a slower network; where devices know their slice, that counts
    c.mesh.across = "data"  # the axis that spans the slices: data | fsdp | stage

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 1000  # steps; the last step is always saved
    c.checkpoint.keep = 2  # newest checkpoints kept
    c.checkpoint.keep_best = True  # and the one with the lowest validation loss

    c.eval = ConfigDict()
    c.eval.every = 250  # steps; 0: only by jaxlm.evaluate
    c.eval.batches = 0  # batches an evaluation; 0: the whole validation split
    c.eval.patience = 0  # stop after this many evaluations without a new lowest loss; 0: never

    c.log = ConfigDict()
    c.log.every = 10  # steps between rows of metrics.jsonl
    c.log.tensorboard = True  # when tensorboardX is installed
    return c.lock()


def load(spec: str) -> ConfigDict:
    """Config of a recipe, `FILE.py` or `FILE.py:ARG`. Raises ConfigError where there is none, or no such ARG."""
    name, _, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        known = sorted(str(p) for p in (path.parent if path.parent.is_dir() else Path("configs")).glob("*.py"))
        raise ConfigError(
            f"--config={spec}: there is no file {name}{did_you_mean(name, known)} (found: {' '.join(known) or 'none'})"
        )
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None:
        raise ConfigError(f"--config={spec}: a recipe is a .py file that defines get_config()")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={spec}: {name} does not define get_config()")
    if arg and not inspect.signature(module.get_config).parameters:
        raise ConfigError(f"--config={spec}: this recipe has no variants; give {name}")
    return module.get_config(arg) if arg else module.get_config()


def variant(arg: str, variants: dict) -> dict:
    """`variants[arg]` for a recipe. Raises ConfigError that lists them."""
    if arg not in variants:
        raise ConfigError(
            f"this recipe has no variant {arg!r}{did_you_mean(arg, variants)} (it has: {', '.join(variants)})"
        )
    return variants[arg]


def flatten(c: ConfigDict, prefix: str = "") -> dict:
    """{'model.num_layers': 6, ...} in the order of `base`."""
    flat = {}
    for key, value in c.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return flat


def override(c: ConfigDict, pairs: list[tuple[str, str]]) -> list[str]:
    """Sets keys from (key, text) pairs, in place. Returns one problem for each that has no such key or type."""
    problems, known = [], flatten(c)
    for key, text in pairs:
        if key not in known:
            problems.append(f"config.{key}: no such key{nearest_key(key, known)}")
            continue
        try:
            value = parse(text, known[key])
        except (ValueError, SyntaxError, OverflowError):
            kind = type(known[key]).__name__
            problems.append(f"config.{key}={text}: not a value of type {kind} (the default is {known[key]!r})")
            continue
        set_key(c, key, value)
    return problems


def set_key(c: ConfigDict, key: str, value) -> None:
    section, _, name = key.rpartition(".")
    setattr(c[section] if section else c, name, value)


def unflatten(flat: dict) -> ConfigDict:
    """The inverse of `flatten`, also after JSON has made lists of tuples."""
    c = base()
    for key, value in flat.items():
        tuples = tuple(tuple(item) for item in value) if isinstance(value, list) else value
        set_key(c, key, tuples)
    return c


def nearest_key(key: str, known: dict) -> str:
    """The nearest full key, or the nearest last word in any section."""
    hint = did_you_mean(key, known)
    if not hint:
        last = {k.rpartition(".")[2]: k for k in known}
        word = did_you_mean(key.rpartition(".")[2], last).removeprefix("; did you mean ").rstrip("?")
        hint = f"; did you mean {last[word]}?" if word else ""
    return hint


def parse(text: str, default):
    """Text as a value of the default's type. Integers may be written 1e6 or 1_000_000. Raises ValueError."""
    if isinstance(default, bool):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    if isinstance(default, int):
        number = float(text) if re.search(r"[.eE]", text) else int(text)
        if number != int(number):
            raise ValueError(text)
        return int(number)
    if isinstance(default, float):
        return float(text)
    if isinstance(default, tuple):
        value = ast.literal_eval(text)
        if not isinstance(value, (tuple, list)):
            raise ValueError(text)
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    return text


def mesh_sizes(c: ConfigDict) -> dict[str, int]:
    """{axis: size}, where at most one size, that of the axis that takes the devices left over, is -1."""
    sizes, strategy = {axis: c.mesh[axis] for axis in MESH_AXES}, STRATEGIES.get(c.mesh.strategy)
    if c.mesh.slices > 1 and sizes.get(c.mesh.across) == 0 and c.mesh.across != strategy:
        sizes[c.mesh.across] = c.mesh.slices
    free = [axis for axis in (strategy, "data") if axis and sizes[axis] == 0]
    if free and -1 not in sizes.values():
        sizes[free[0]] = -1
    return {axis: size or 1 for axis, size in sizes.items()}


def pipeline_microbatches(m: ConfigDict, rows: int, stages: int) -> int:
    """Parts that the pipeline makes of a microbatch of which a device has `rows` rows. m: the model section."""
    return m.pipeline_microbatches or max(n for n in range(1, 4 * stages + 1) if rows % n == 0)


def resolve(c: ConfigDict, vocab_size: int = 0) -> ConfigDict:
    """A copy of a checked config in which every "derive it" is a number. vocab_size: the tokenizer's."""
    c = c.copy_and_resolve_references()
    m = c.model
    m.num_kv_heads = m.num_kv_heads or m.num_heads
    m.head_dim = m.head_dim or m.embed_dim // m.num_heads
    m.mlp_dim = m.mlp_dim or (64 * math.ceil(m.embed_dim * 8 / 3 / 64) if m.mlp == "swiglu" else 4 * m.embed_dim)
    m.expert_dim = m.expert_dim or m.mlp_dim
    m.vocab_size = m.vocab_size or vocab_size
    m.context_length = m.context_length or c.data.seq_len
    c.train.stop_at = c.train.stop_at or c.train.steps
    c.optim.warmup_steps = c.train.steps // 20 if c.optim.warmup_steps == -1 else c.optim.warmup_steps
    c.optim.adam_learning_rate = c.optim.adam_learning_rate or c.optim.learning_rate
    return c
