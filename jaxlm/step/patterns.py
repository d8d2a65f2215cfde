"""Ordered (regex, value) lists that say what applies to which parameter: weight decay, rates, and what is frozen.

The first regex that is found in a parameter's name, such as 'layers/block_0/mlp/up/kernel', gives its value.
"""

import re

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.config.keys import COUNTED
from jaxlm.errors import ConfigError

# A parameter of a layer: its stack, and its block in the stack's pattern.
STACK = re.compile(r"(|.*/)layers/block_(\d+)/")
EMBEDDING = re.compile(r"(|.*/)embed/")


def name_of(path) -> str:
    """A parameter's name: 'layers/block_0/mlp/up/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def first_match(patterns, path) -> object:
    """Value of the first regex found in a parameter's name. Raises KeyError where none is."""
    name = name_of(path)
    for pattern, value in patterns:
        if re.search(pattern, name):
            return value
    raise KeyError(name)


def require_cover(patterns, params, key: str) -> None:
    """Raises ConfigError naming the patterns that match no parameter and the parameters that none matches."""
    names = [name_of(path) for path, _ in jax.tree.leaves_with_path(params)]
    covered = set()
    problems = []
    for pattern, _ in patterns:
        found = {name for name in names if re.search(pattern, name)}
        covered |= found
        if not found:
            problems.append(f"{pattern!r} matches no parameter")
    for name in names:
        if name not in covered:
            problems.append(f"{name} is matched by none")
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"the patterns of {key}:\n{lines}")


# ---------------------------------------------------------------- trained and frozen


def require_trained(params, config: ConfigDict) -> None:
    """Raises ConfigError where config.optim.rates and decay miss a parameter, or leave nothing to train."""
    require_cover(config.optim.decay, params, "config.optim.decay")
    require_cover(config.optim.rates, params, "config.optim.rates")
    trained, _ = partition(params, config)
    if config.model.name not in COUNTED and not jax.tree.leaves(trained):
        raise ConfigError(
            "config.optim.rates: freezes every parameter; give some pattern a factor above 0"
        )


def partition(tree, config: ConfigDict) -> tuple:
    """(trained, frozen): a tree of parameters twice, each with None where the other has a leaf.

    Frozen is what config.optim.rates gives the factor 0. To jax None is a tree without leaves, so a function that is
    mapped over one of the two trees skips the places of the other.
    """

    def trained(path, x):
        if first_match(config.optim.rates, path) != 0:
            return x
        return None

    def frozen(path, x):
        if first_match(config.optim.rates, path) == 0:
            return x
        return None

    with_path = jax.tree_util.tree_map_with_path
    return with_path(trained, tree), with_path(frozen, tree)


def combine(one, other):
    """The tree of the two that `partition` made; of any two that have None where the other has a leaf."""

    def choose(a, b):
        if a is None:
            return b
        return a

    return jax.tree.map(choose, one, other, is_leaf=lambda x: x is None)


def restore_frozen(new, old, config: ConfigDict):
    """The trained parameters of `new` and the frozen ones of `old`."""
    trained, _ = partition(new, config)
    _, frozen = partition(old, config)
    return combine(trained, frozen)


# ---------------------------------------------------------------- factors of the learning rate


def rate_factors(params, config: ConfigDict):
    """The tree of factors of the learning rate: optim.rates times what optim.layer_decay makes of the depth.

    Of L layers the last has layer_decay, the first layer_decay^L, the embeddings before it layer_decay^(L + 1) and
    everything else (final norm, head) 1: BEiT's convention (Bao et al. 2022); ELECTRA (Clark et al. 2020), where it
    began, takes one power more of each. Every stack (`layers`, `encoder/layers`, ...) has its own L; embeddings of
    no stack have the deepest's. A leaf that stacks layers gets an array that broadcasts over its other dimensions.
    """
    decay = config.optim.layer_decay
    blocks, rounds = stack_sizes(params, config)
    depths = {stack: blocks[stack] * rounds[stack] for stack in blocks}
    deepest = max(depths.values(), default=0)

    def factor(path, leaf):
        name = name_of(path)
        rate = first_match(config.optim.rates, path)
        if decay == 1:
            return rate
        if match := STACK.match(name):
            stack = match[1]
            layers = np.arange(rounds[stack]) * blocks[stack] + int(match[2])
            factors = rate * decay ** (depths[stack] - layers)
            if config.model.scan:
                return factors.reshape(-1, *[1] * (leaf.ndim - 1))
            return factors[0]
        if match := EMBEDDING.match(name):
            return rate * decay ** (depths.get(match[1], deepest) + 1)
        return rate

    return jax.tree_util.tree_map_with_path(factor, params)


def stack_sizes(params, config: ConfigDict) -> tuple[dict[str, int], dict[str, int]]:
    """(blocks of the pattern, how often it repeats) of each stack of layers. Only a scan repeats a pattern."""
    blocks = {}
    rounds = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        if match := STACK.match(name_of(path)):
            stack = match[1]
            block = int(match[2])
            blocks[stack] = max(blocks.get(stack, 0), block + 1)
            rounds[stack] = 1
            if config.model.scan:
                rounds[stack] = leaf.shape[0]
    return blocks, rounds
