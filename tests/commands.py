"""The commands that README.md, docs/, recipes, programs and launchers show, and what each becomes as a test.

A new command needs a line in RULES only where none there fits; `small` then makes its config tiny. As a program of its
own this module runs commands one after the other in one process: [[word, ...], ...] as JSON on its standard input.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

from jaxlm import cli
from jaxlm.config.check import check
from jaxlm.config.recipe import flatten, load, override, set_key

ROOT = Path(__file__).parent.parent


class Command(NamedTuple):
    place: str  # the file that shows it
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


class Rule(NamedTuple):
    pattern: str  # of the whole command, the first that matches
    does: str  # run: as it stands; print: with --dry_run; parse: its flags and config are checked
    adds: str = ""  # words at its end
    why: str = ""  # of parse


RULES = (
    Rule(r"python -m jaxlm\.data\.prepare .*--tokenizer.*", "run", adds="--workers=1"),
    Rule(r"python -m jaxlm\.data\.prepare .*", "run", adds="--workers=1 --vocab_size=300"),
    Rule(
        r"python -m jaxlm\.train .*configs/(llama|mixtral)\.py.*",
        "run",
        adds="--dry_run --devices=8",
    ),
    Rule(r"python -m jaxlm\.(train|evaluate|generate) .*", "run"),
    Rule(r"python -m jaxlm\.tune .*", "run", adds="--trials=1 --seeds=1"),
    Rule(
        r"python -m jaxlm\.bench .*--(parts|sweep).*", "parse", why="minutes; tests/test_bench.py"
    ),
    Rule(r"python -m jaxlm\.bench .*", "run", adds="--steps=2"),
    Rule(r"python -m jaxlm\.plan .*--topology=local", "run"),
    Rule(r"python -m jaxlm\.plan .*", "parse", why="compilers of pods; launch/test.sh --pods"),
    Rule(r"python -m jaxlm\.verify .*", "parse", why="minutes; tests/test_verify.py"),
    Rule(r"python -m jaxlm\.lora .*", "parse", why="of a run with adapters; tests/test_lora.py"),
    Rule(r"python -m jaxlm\.fitting .*", "parse", why="of two runs; tests/test_fitting.py"),
    Rule(
        r"python -c .*jaxlm\.load.*",
        "parse",
        why="of a run; the calls are run by tests/test_vectors.py",
    ),
    Rule(r"python configs/\w+\.py .*", "run"),
    Rule(r"bash launch/(tpu_pod|slurm|gpu_node)\.sh .*", "print"),
    Rule(
        r"bash launch/(quickstart|baselines|fitting|install|test)\.sh.*",
        "parse",
        why="installs; tests/test_launch.py",
    ),
    Rule(r"(source|export|envsubst|kubectl) .*", "parse", why="of the shell, or of a cluster"),
)
LARGEST = {  # of a config whose command is run, but where the recipe does not follow the key
    "model.num_layers": 1,
    "model.encoder_layers": 1,
    "model.num_heads": 4,  # before what it must divide
    "model.embed_dim": 32,
    "model.hidden_dim": 32,
    "model.mlp_dim": 64,
    "model.vocab_size": 512,
    "model.buckets": 1024,
    "data.seq_len": 256,  # of learned positions, so that 200 tokens can be written
    "data.enc_len": 64,
    "data.vocab_size": 300,
    "data.examples_per_row": 8,
    "data.min_count": 1,
    "optim.warmup_steps": 1,  # before what it must be below
    "train.steps": 4,
    "train.batch_size": 4,
    "train.grad_accumulation": 1,
    "eval.every": 2,
    "eval.generate": 4,
    "eval.max_tokens": 4,
    "checkpoint.every": 2,
}
LARGEST_FLAG = {"--vocab_size": 300}


def rule_of(command: Command) -> Rule:
    """The first rule that matches. Raises AssertionError that says what to add."""
    for rule in RULES:
        if re.fullmatch(rule.pattern, str(command).replace("'", "")):
            return rule
    raise AssertionError(
        f"{command.place} shows a command without a rule: {command}\nadd one to RULES in {__file__}"
    )


# ---------------------------------------------------------------- what is shown


def pages() -> dict[str, str]:
    """The text of README.md and of each page of docs/, in the order in which README first links them."""
    readme = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\((docs/[\w-]+\.md)", readme)
    files = []
    for file in sorted((ROOT / "docs").glob("*.md")):
        files.append(str(file.relative_to(ROOT)))
    texts = {"README.md": readme}
    for place in [*linked, *files]:
        texts[place] = (ROOT / place).read_text()
    return texts


def shown() -> list[Command]:
    """Every command, in the order of each file."""
    commands = []
    for place, text in pages().items():
        commands += in_markdown(place, text)
    for folder in ("configs", "jaxlm"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            text = ast.get_docstring(ast.parse(file.read_text())) or ""
            commands += in_lines(str(file.relative_to(ROOT)), indented(text))
    for file in sorted((ROOT / "launch").glob("*.sh")):
        commands += in_lines(
            f"launch/{file.name}",
            re.findall(r"^#   (bash launch/.*)", file.read_text(), re.MULTILINE),
        )
    return commands


def indented(docstring: str) -> list[str]:
    """The lines of a docstring that are commands."""
    lines = docstring.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"    (python|bash) ", line)]


def blocks(text: str, languages: str) -> list[str]:
    """The fenced blocks of a page in these languages, a regular expression."""
    return re.findall(rf"^```(?:{languages})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def in_markdown(place: str, text: str) -> list[Command]:
    """Of the blocks of bash, then of what stands in a sentence."""
    lines = []
    for block in blocks(text, "bash|sh|shell|console"):
        lines += block.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`((?:python|bash)\s[^`]+)`", prose):
        lines.append(" ".join(span.split()))
    return in_lines(place, lines)


def in_lines(place: str, lines: list[str]) -> list[Command]:
    commands = []
    for line in lines:
        syntax = re.search(r"\[[A-Z-]|<[A-Z]", line)  # says which flags there may be
        commands += [] if syntax else split(place, line.removeprefix("$ "))
    return commands


def split(place: str, line: str) -> list[Command]:
    """The commands of a line of the shell; "..." in them stands for flags of the reader's."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    commands = []
    words = []
    for word in [*lexer, ";"]:
        if word in ("&&", "||", ";", "|"):
            commands += [Command(place, tuple(words))] if words else []
            words = []
        elif word != "...":
            words.append(word)
    return commands


# ---------------------------------------------------------------- what it becomes


class Parsed(Exception):
    """Raised instead of what comes after the command line is read."""


def program_of(name: str):
    """The module that `python -m NAME` runs."""
    found = importlib.import_module(name)
    if hasattr(found, "main"):
        return found
    return importlib.import_module(f"{name}.__main__")


def parse(module: str, words: list[str]):
    """The namespace that a program's own parser makes of these words. Raises ConfigError where it refuses them."""
    original = cli.Parser.parse

    def stop(self, argv):
        raise Parsed(original(self, argv))

    cli.Parser.parse = stop
    try:
        program_of(module).main(list(words))
    except Parsed as parsed:
        return parsed.args[0]
    finally:
        cli.Parser.parse = original
    raise AssertionError(f"{module}.main reads no command line")


def small(command: Command) -> list[str]:
    """The words of a command of jaxlm made small: what is larger than LARGEST, or than LARGEST_FLAG, is cut."""
    args = parse(command.words[2], command.words[3:])
    words = list(command.words)
    for flag, limit in LARGEST_FLAG.items():
        if (getattr(args, flag[2:], None) or 0) > limit:
            words.append(f"{flag}={limit}")
    if getattr(args, "config", None) and not getattr(args, "dry_run", False):
        config = load(args.config)
        override(config, args.overrides)
        words += cuts(config)
    return words


def cuts(config) -> list[str]:
    """The flags that make a config small."""
    flags = []
    for key, limit in LARGEST.items():
        before = flatten(config)[key]
        if before > limit:
            set_key(config, key, limit)
            if check(config):
                set_key(config, key, before)
            else:
                flags.append(f"--config.{key}={limit}")
    assert config.train.steps <= LARGEST["train.steps"], (
        "the run would be long: something else in LARGEST comes first"
    )
    return flags


def runnable(command: Command) -> list[str]:
    """The words that a test runs. The working directory is where the command's recipe is."""
    words = list(command.words)
    rule = rule_of(command)
    if words[:2] == ["python", "-m"] and "--dry_run" not in rule.adds:
        words = small(command)
    return words + rule.adds.split()


def run(words: list[str]) -> None:
    """Runs a command of Python in this process. Raises what it raises, SystemExit for an exit code that is not 0."""
    if words[1] != "-m":
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")
        cut(Path(words[2]))
    elif code := program_of(words[2]).main(words[3:]):
        raise SystemExit(code)


def cut(folder: Path, lines: int = 24) -> None:
    """Keeps the first lines of the data that a recipe made."""
    for file in folder.glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))


def run_all(commands: list[list[str]]) -> list[dict]:
    """What came of each: {"words", "error" (empty: nothing went wrong), "said"}."""
    outcomes = []
    for words in commands:
        said = io.StringIO()
        error = ""
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                run(words)
        except BaseException:
            error = traceback.format_exc()
        outcomes.append({"words": words, "error": error, "said": said.getvalue()})
    return outcomes


if __name__ == "__main__":
    print(json.dumps(run_all(json.load(sys.stdin))))
