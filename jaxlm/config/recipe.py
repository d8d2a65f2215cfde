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
from types import ModuleType

from ml_collections import ConfigDict

from jaxlm.cli import did_you_mean, nearest
from jaxlm.config.keys import COUNTED, GATED, MESH_AXES, STRATEGIES, base
from jaxlm.config.problems import Problem
from jaxlm.config.shipped import find
from jaxlm.config.tasks import task_of
from jaxlm.errors import ConfigError, UserError

RATIO_RATE = (r"^embed/ratio$", 0.0)  # of optim.rates: model.ngram_weights are not trained
EVERYTHING = ((r".*", 1.0),)  # the default of optim.rates
TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# A message of ml_collections.
WRONG_TYPE = r"field '(\w+)'.*?\. (.*) is of original type .* to type <class '(.*)'>"
SHORT_EXAMPLE = 8  # tokens; so many in a row decide how many examples it may hold


# ---------------------------------------------------------------- recipes


def load(spec: str) -> ConfigDict:
    """The config of a recipe: `FILE.py` or `NAME`, also with `:ARG`. Raises ConfigError where there is none such."""
    name, _, arg = spec.partition(":")
    path = find(name)
    module = import_file(path, spec)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={spec}: {name} does not define get_config()")
    parameters = inspect.signature(module.get_config).parameters.values()
    if arg and not parameters:
        raise ConfigError(f"--config={spec}: this recipe has no variants; give {name}")
    if not arg and any(each.default is each.empty for each in parameters):
        raise ConfigError(f"--config={spec}: this recipe needs a variant; give {name}:VARIANT")
    arguments = [arg] if arg else []
    try:
        config = module.get_config(*arguments)
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


def import_file(path: Path, spec: str) -> ModuleType:
    """Raises ConfigError of a file that is no recipe, with its line."""
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None:
        raise ConfigError(f"--config={spec}: a recipe is a .py file that defines get_config()")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise recipe_error(path, error) from error
    return module


def recipe_error(path: Path, error: Exception) -> UserError:
    """What went wrong inside of a recipe, with the recipe's own line, which is all that its writer can change."""
    if isinstance(error, UserError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    line = 0
    source = ""
    for frame in frames:
        if frame.filename == str(path):
            line = frame.lineno
            source = frame.line
    if isinstance(error, SyntaxError):
        line = error.lineno
    what = in_words(error, "ml_collections" in frames[-1].filename, source)
    where = f"{path}, line {line}" if line else str(path)
    return ConfigError(f"{where}: {what}")


def in_words(error: Exception, by_config: bool, source: str) -> str:
    """by_config: whether a config raised it, not an object of the recipe's. source: the recipe's line."""
    message = str(error).partition("\n")[0]
    if by_config and isinstance(error, AttributeError | KeyError):
        word = re.search(r"\w+", message.replace("Key ", ""))[0]
        return unknown_key(word, source)
    wrong = re.search(WRONG_TYPE, message)
    if by_config and wrong:
        key, value, kind = wrong.groups()
        return f"{key} = {value}: not a value of type {kind.rpartition('.')[2]}"
    return f"{type(error).__name__}: {message}"


def unknown_key(word: str, source: str) -> Problem:
    """A key that a recipe's line sets or reads, and that no config has."""
    known = flatten(base())
    sections = dict.fromkeys(key.partition(".")[0] for key in known if "." in key)
    section = re.search(rf"(\w+)\W+{word}\b", source)
    if section and section[1] in sections:
        key = f"{section[1]}.{word}"
        return Problem(key, None, "no such key", nearest_key(key, known))
    hint = did_you_mean(word, sections) or nearest_key(word, known)
    return Problem(word, None, "no such key", hint)


def variant(arg: str, variants: dict) -> dict:
    """`variants[arg]` for a recipe. Raises ConfigError that lists them."""
    if arg not in variants:
        raise ConfigError(
            f"this recipe has no variant {arg!r}{did_you_mean(arg, variants)} (it has: {', '.join(variants)})"
        )
    return variants[arg]


# ---------------------------------------------------------------- keys and their values


def flatten(c: ConfigDict, prefix: str = "") -> dict:
    """{'model.num_layers': 6, ...} in the order of `base`."""
    flat = {}
    for key, value in c.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: dict) -> ConfigDict:
    """The inverse of `flatten`, also after JSON has made lists of tuples."""
    c = base()
    for key, value in flat.items():
        set_key(c, key, as_tuples(value))
    return c


def as_tuples(value):
    """Lists within lists as tuples within tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(map(as_tuples, value))
    return value


def set_key(c: ConfigDict, key: str, value) -> None:
    section, _, name = key.rpartition(".")
    setattr(c[section] if section else c, name, value)


def override(c: ConfigDict, pairs: list[tuple[str, str]]) -> list[Problem]:
    """Sets keys from (key, text) pairs, in place. Returns one problem for each that has no such key or type."""
    problems = []
    known = flatten(c)
    for key, text in pairs:
        if key not in known:
            problems.append(Problem(key, None, "no such key", nearest_key(key, known)))
            continue
        try:
            set_key(c, key, parse(text, known[key]))
        except (ValueError, SyntaxError, OverflowError):
            kind = type(known[key]).__name__
            rule = f"not a value of type {kind} (the default is {known[key]!r})"
            problems.append(Problem(key, text, rule))
    return problems


def parse(text: str, default):
    """Text as a value of the default's type. Integers may be written 1e6 or 1_000_000. Raises ValueError."""
    if isinstance(default, bool):
        if text.lower() not in TRUTHS:
            raise ValueError(text)
        return TRUTHS[text.lower()]
    if isinstance(default, int):
        return parse_int(text)
    if isinstance(default, float):
        return float(text)
    if isinstance(default, tuple):
        value = ast.literal_eval(text)
        if not isinstance(value, (tuple, list)):
            raise ValueError(text)
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    return text


def parse_int(text: str) -> int:
    """Raises ValueError of a number that is not whole."""
    if not re.search(r"[.eE]", text):
        return int(text)
    number = float(text)
    if number != int(number):
        raise ValueError(text)
    return int(number)


def nearest_key(key: str, known: dict) -> str:
    """A hint: the key of that last word in another section or of these initials, else the nearest key or last word."""
    word = key.rpartition(".")[2]
    by_word = {name.rpartition(".")[2]: name for name in known}
    meant = by_word.get(word) or of_initials(key, known) or nearest(key, known)
    if not meant:
        meant = by_word.get(nearest(word, by_word), "")
    if meant:
        return f"; did you mean {meant}?"
    return ""


def of_initials(key: str, known: dict) -> str:
    """The keys whose last word has these initials, as lr is short for learning_rate: of that section, or of any."""
    section, _, short = key.rpartition(".")
    found = []
    for name in known:
        words = name.rpartition(".")[2].split("_")
        initials = "".join(word[:1] for word in words)
        if len(words) > 1 and initials == short:
            found.append(name)
    near = [name for name in found if name.startswith(f"{section}.")]
    return " or ".join(near or found)


# ---------------------------------------------------------------- what is derived


def mesh_sizes(c: ConfigDict) -> dict[str, int]:
    """{axis: size}, where at most one size, that of the axis that takes the devices left over, is -1."""
    sizes = {axis: c.mesh[axis] for axis in MESH_AXES}
    strategy = STRATEGIES.get(c.mesh.strategy)
    if c.mesh.slices > 1 and sizes.get(c.mesh.across) == 0 and c.mesh.across != strategy:
        sizes[c.mesh.across] = c.mesh.slices
    if -1 not in sizes.values():
        for axis in (strategy, "data"):
            if axis and sizes[axis] == 0:
                sizes[axis] = -1
                break
    return {axis: size or 1 for axis, size in sizes.items()}


def pipeline_microbatches(m: ConfigDict, rows: int, stages: int) -> int:
    """Parts that the pipeline makes of a microbatch of which a device has `rows` rows. m: the model section."""
    if m.pipeline_microbatches:
        return m.pipeline_microbatches
    return max(n for n in range(1, 4 * stages + 1) if rows % n == 0)


def num_labels(c: ConfigDict) -> int:
    """Outputs of the head that a task needs, 0: none."""
    fixed = {"span": 2, "number": 1}
    return fixed.get(task_of(c).answer, len(c.data.labels))


def mlp_dim(m: ConfigDict) -> int:
    """The usual hidden width of an MLP. m: the model section."""
    if m.mlp in GATED:
        return 64 * math.ceil(m.embed_dim * 8 / 3 / 64)
    return 4 * m.embed_dim


def fill(section: ConfigDict, **derived) -> None:
    """Sets the keys of a section that are 0 or empty."""
    for key, value in derived.items():
        section[key] = section[key] or value


def resolve(c: ConfigDict, vocab_size: int = 0) -> ConfigDict:
    """A copy of a checked config in which every "derive it" is a number. vocab_size: see data.batches.describe."""
    c = c.copy_and_resolve_references()
    m = c.model
    d = c.data
    record = task_of(c)
    fill(
        m,
        num_kv_heads=m.num_heads,
        head_dim=m.embed_dim // m.num_heads,
        mlp_dim=mlp_dim(m),
        vocab_size=vocab_size,
        encoder_layers=m.num_layers,
        hidden_dim=m.embed_dim,
        num_labels=num_labels(c),
        bias=record.loss == "glove",
    )
    fill(m, expert_dim=m.mlp_dim)
    fill(d, enc_len=d.seq_len)
    fill(m, context_length=max(d.seq_len, d.enc_len))
    if record.from_examples:
        fill(d, examples_per_row=max(d.seq_len // SHORT_EXAMPLE, 1) if d.pack else 1)
    resolve_training(c)
    fill(c.train, stop_at=c.train.steps)
    fill(c.eval, max_tokens=d.seq_len)
    if c.optim.warmup_steps == -1:
        c.optim.warmup_steps = c.train.steps // 20
    fill(c.optim, adam_learning_rate=c.optim.learning_rate)
    return c


def resolve_training(c: ConfigDict) -> None:
    """Sets what is trained, and what decays, of models in which that is not everything."""
    m = c.model
    o = c.optim
    if m.name in COUNTED:
        fill(m, ngrams=(m.vocab_size,) * m.order)  # until it is counted
        o.decay = ((r".*", 0.0),)
        o.rates = ((r".*", 0.0),)
        c.train.steps = 1
        c.train.stop_at = 1
    elif m.name == "vectors" and not m.bias and o.decay == base().optim.decay:
        o.decay = EVERYTHING  # it has no norm and no bias, which a pattern would be for
    elif m.ngram_weights != "none" and o.rates[0] != RATIO_RATE:
        o.rates = (RATIO_RATE, *o.rates)
    elif m.lora_rank and o.rates == EVERYTHING:  # adapters, and a head that is new
        o.rates = ((r"lora_|^head/", 1.0), (r".*", 0.0))
