"""The command that shows what a trained model does, printed at the end of a run."""

import json
import shlex
from pathlib import PurePath

from ml_collections import ConfigDict

from jaxlm.config.tasks import task_of
from jaxlm.errors import DataError

QUESTION = '{"question": "Who wrote it?", "context": "Ann wrote it."}'  # for a span of a context


def next_command(config: ConfigDict, workdir: PurePath, tokenizer, flags: str = "") -> str:
    """'try python -m jaxlm.generate ...', or jaxlm.evaluate where the model writes nothing.

    flags: to add to the command, such as ' --step=best'.
    """
    program = "evaluate" if task_of(config).answers_nothing else "generate"
    prompt = prompt_for(config, tokenizer, program)
    command = f"try python -m jaxlm.{program} --workdir={shlex.quote(str(workdir))}{flags}"
    if prompt:
        command += f" --prompt={shlex.quote(prompt)}"
    return command


def prompt_for(config: ConfigDict, tokenizer, program: str) -> str:
    """A prompt for the reader to replace, '' where none is needed."""
    task = task_of(config)
    if task.answer == "hidden":
        return "[MASK]"
    if task.answer == "span":
        return QUESTION
    if len(task.asked_columns) > 1:
        text = known_text(tokenizer, config.data.lowercase)
        return json.dumps(dict.fromkeys(task.asked_columns, text))
    if task.answers_examples or (program == "generate" and tokenizer.bos_id is None):
        return known_text(tokenizer, config.data.lowercase)
    return ""


def known_text(tokenizer, lowercase: bool) -> str:
    """TEXT, or one character that the tokenizer has where it lacks these (a tokenizer of characters)."""
    try:
        tokenizer.encode("text" if lowercase else "TEXT")
    except DataError:
        shown = [character for character in tokenizer.characters if character.isalnum()]
        return (shown or tokenizer.characters)[0]
    return "TEXT"
