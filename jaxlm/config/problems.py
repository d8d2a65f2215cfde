"""What is wrong with a config: one record a problem, and the one sentence that is made of it. No jax."""

from collections.abc import Sequence

from jaxlm.errors import ConfigError


class Problem(str):
    """The sentence `config.KEY=VALUE: RULE HINT`, and its parts as attributes.

    key: without "config.", such as model.num_heads. value: None where the sentence shows none.
    rule: what must hold, and what to type. hint: "", or "; did you mean X?".
    """

    def __new__(cls, key: str, value, rule: str, hint: str = ""):
        if value is None:
            given = f"config.{key}"
        else:
            given = f"config.{key}={value}"
        problem = super().__new__(cls, f"{given}: {rule}{hint}")
        problem.key = key
        problem.value = value
        problem.rule = rule
        problem.hint = hint
        return problem


def require(problems: Sequence[str]) -> None:
    """Raises one ConfigError that lists all problems, if there are any."""
    if not problems:
        return
    count = "1 problem"
    if len(problems) > 1:
        count = f"{len(problems)} problems"
    lines = [f"  - {problem}" for problem in problems]
    raise ConfigError("\n".join([f"{count} in the config:", *lines]))
