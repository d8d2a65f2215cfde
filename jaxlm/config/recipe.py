"""A config from a recipe and the command line, and its keys that mean "derive it" made numbers. No jax.

keys.py has every key. A recipe (configs/NAME.py) defines `get_config(arg)`, starts from `base()` and only overrides.
The command line overrides again with `--config.KEY=VALUE`. check.py lists every problem at once; `resolve` then
replaces the zeros (and one -1) that mean "derive it" by numbers.
"""

import ast
import importlib.util
import inspect
import math
import re
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.cli import did_you_mean
from jaxlm.config.keys import COUNTED, GATED, MESH_AXES, ROLES, STRATEGIES, base
from jaxlm.errors import ConfigError, UserError

RATIO_RATE = (r"^embed/ratio$", 0.0)  # of optim.rates: model.ngram_weights are not trained
WRONG_TYPE = r"field '(\w+)'.*?\. (.*) is of original type .* to type <class '(.*)'>"  # as ml_collections says it


def load(spec: str) -> ConfigDict:
    """Config of a recipe, `FILE.py` or `FILE.py:ARG`. Raises ConfigError where there is none, or no such ARG."""
    name, _, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        known = sorted(
            str(p) for p in (path.parent if path.parent.is_dir() else Path("configs")).glob("*.py")
        )
        raise ConfigError(
            f"--config={spec}: there is no file {name}{did_you_mean(name, known)} (found: {' '.join(known) or 'none'})"
        )
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None:
        raise ConfigError(f"--config={spec}: a recipe is a .py file that defines get_config()")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise recipe_error(path, error) from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={spec}: {name} does not define get_config()")
    parameters = inspect.signature(module.get_config).parameters
    if arg and not parameters:
        raise ConfigError(f"--config={spec}: this recipe has no variants; give {name}")
    if not arg and any(each.default is each.empty for each in parameters.values()):
        raise ConfigError(f"--config={spec}: this recipe needs a variant; give {name}:VARIANT")
    try:
        config = module.get_config(arg) if arg else module.get_config()
    except Exception as error:
        raise recipe_error(path, error) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"--config={spec}: get_config() gave {config!r}, no config: "
            "it starts with c = base(), sets keys of c, and ends with return c"
        )
    if nothing := [f"config.{key}" for key, value in flatten(config).items() if value is None]:
        raise ConfigError(
            f"{path} sets to None: {', '.join(nothing)}; leave a key out, and it has its default"
        )
    return config


def recipe_error(path: Path, error: Exception) -> UserError:
    """What went wrong inside of a recipe, with the recipe's own line, which is all that its writer can change."""
    if isinstance(error, UserError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(path)]
    line, source = (own[-1].lineno, own[-1].line) if own else (0, "")
    if isinstance(error, SyntaxError):
        line = error.lineno
    by_config = "ml_collections" in frames[-1].filename  # else it is of the recipe's own objects
    said = str(error).partition("\n")[0]
    what = f"{type(error).__name__}: {said}"
    if by_config and isinstance(error, AttributeError | KeyError):
        word = re.search(r"\w+", said.replace("Key ", ""))[0]
        what = unknown_key(word, source)
    elif by_config and (wrong := re.search(WRONG_TYPE, said)):
        key, value, kind = wrong.groups()
        what = f"{key} = {value}: not a value of type {kind.rpartition('.')[2]}"
    return ConfigError(f"{path}, line {line}: {what}" if line else f"{path}: {what}")


def unknown_key(word: str, source: str) -> str:
    """The message of a key that a recipe's line sets or reads, and that no config has."""
    known = flatten(base())
    sections = [key.partition(".")[0] for key in known if "." in key]
    section = re.search(rf"(\w+)\W+{word}\b", source)
    if section and section[1] in sections:
        key = f"{section[1]}.{word}"
        return f"config.{key}: no such key{nearest_key(key, known)}"
    hint = did_you_mean(word, dict.fromkeys(sections)) or nearest_key(word, known)
    return f"config.{word}: no such key{hint}"


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
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, ConfigDict)
            else {prefix + key: value}
        )
    return flat


def override(c: ConfigDict, pairs: list[tuple[str, str]]) -> list[str]:
    """Sets keys from (key, text) pairs, in place. Returns one problem for each that has no such key or type."""
    problems = []
    known = flatten(c)
    for key, text in pairs:
        if key not in known:
            problems.append(f"config.{key}: no such key{nearest_key(key, known)}")
            continue
        try:
            value = parse(text, known[key])
        except (ValueError, SyntaxError, OverflowError):
            kind = type(known[key]).__name__
            problems.append(
                f"config.{key}={text}: not a value of type {kind} (the default is {known[key]!r})"
            )
            continue
        set_key(c, key, value)
    return problems


def set_key(c: ConfigDict, key: str, value) -> None:
    section, _, name = key.rpartition(".")
    setattr(c[section] if section else c, name, value)


def unflatten(flat: dict) -> ConfigDict:
    """The inverse of `flatten`, also after JSON has made lists of tuples."""
    c = base()

    def tuples(x):
        if isinstance(x, (list, tuple)):
            return tuple(map(tuples, x))
        return x

    for key, value in flat.items():
        set_key(c, key, tuples(value))
    return c


def nearest_key(key: str, known: dict) -> str:
    """The key of that last word in another section or of these initials, else the nearest full key or last word."""
    last = {k.rpartition(".")[2]: k for k in known}
    if same := last.get(key.rpartition(".")[2]) or of_initials(key, known):
        return f"; did you mean {same}?"
    hint = did_you_mean(key, known)
    if not hint:
        word = (
            did_you_mean(key.rpartition(".")[2], last).removeprefix("; did you mean ").rstrip("?")
        )
        hint = f"; did you mean {last[word]}?" if word else ""
    return hint


def of_initials(key: str, known: dict) -> str:
    """The keys whose last word has these initials, as lr is short for learning_rate: of that section, or of any."""
    section, _, short = key.rpartition(".")
    found = []
    for name in known:
        words = name.rpartition(".")[2].split("_")
        if len(words) > 1 and "".join(word[:1] for word in words) == short:
            found.append(name)
    near = [name for name in found if name.startswith(f"{section}.")]
    return " or ".join(near or found)


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
    sizes = {axis: c.mesh[axis] for axis in MESH_AXES}
    strategy = STRATEGIES.get(c.mesh.strategy)
    if c.mesh.slices > 1 and sizes.get(c.mesh.across) == 0 and c.mesh.across != strategy:
        sizes[c.mesh.across] = c.mesh.slices
    free = [axis for axis in (strategy, "data") if axis and sizes[axis] == 0]
    if free and -1 not in sizes.values():
        sizes[free[0]] = -1
    return {axis: size or 1 for axis, size in sizes.items()}


def pipeline_microbatches(m: ConfigDict, rows: int, stages: int) -> int:
    """Parts that the pipeline makes of a microbatch of which a device has `rows` rows. m: the model section."""
    return m.pipeline_microbatches or max(n for n in range(1, 4 * stages + 1) if rows % n == 0)


def num_labels(c: ConfigDict) -> int:
    """Outputs of the head that a task needs, 0: none."""
    return {"qa": 2, "regress": 1}.get(c.task.name, len(c.data.labels))


def resolve(c: ConfigDict, vocab_size: int = 0) -> ConfigDict:
    """A copy of a checked config in which every "derive it" is a number. vocab_size: the data's, see `data.open`."""
    c = c.copy_and_resolve_references()
    m = c.model
    m.num_kv_heads = m.num_kv_heads or m.num_heads
    m.head_dim = m.head_dim or m.embed_dim // m.num_heads
    m.mlp_dim = m.mlp_dim or (
        64 * math.ceil(m.embed_dim * 8 / 3 / 64) if m.mlp in GATED else 4 * m.embed_dim
    )
    m.expert_dim = m.expert_dim or m.mlp_dim
    m.vocab_size = m.vocab_size or vocab_size
    m.encoder_layers = m.encoder_layers or m.num_layers
    m.hidden_dim = m.hidden_dim or m.embed_dim
    m.num_labels = m.num_labels or num_labels(c)
    c.data.enc_len = c.data.enc_len or c.data.seq_len
    m.context_length = m.context_length or max(c.data.seq_len, c.data.enc_len)
    if (
        c.task.name in ROLES and not c.data.examples_per_row
    ):  # an example of 8 tokens is a short one
        c.data.examples_per_row = max(c.data.seq_len // 8, 1) if c.data.pack else 1
    m.bias = m.bias or c.task.name == "glove"
    if m.name in COUNTED:
        m.ngrams = m.ngrams or (m.vocab_size,) * m.order  # until it is
        c.optim.decay = c.optim.rates = ((r".*", 0.0),)
        c.train.steps = c.train.stop_at = 1
    elif m.name == "vectors" and not m.bias and c.optim.decay == base().optim.decay:
        c.optim.decay = (
            (r".*", 1.0),
        )  # there is no norm and no bias, which a pattern would be for
    elif m.ngram_weights != "none" and c.optim.rates[0] != RATIO_RATE:
        c.optim.rates = (RATIO_RATE, *c.optim.rates)
    elif m.lora_rank and c.optim.rates == ((r".*", 1.0),):  # adapters, and a head that is new
        c.optim.rates = ((r"lora_|^head/", 1.0), (r".*", 0.0))
    c.train.stop_at = c.train.stop_at or c.train.steps
    c.eval.max_tokens = c.eval.max_tokens or c.data.seq_len
    if c.optim.warmup_steps == -1:
        c.optim.warmup_steps = c.train.steps // 20
    else:
        c.optim.warmup_steps = c.optim.warmup_steps
    c.optim.adam_learning_rate = c.optim.adam_learning_rate or c.optim.learning_rate
    return c
