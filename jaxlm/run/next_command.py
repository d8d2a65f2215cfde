"""The command that shows what a trained model does, printed at the end of a run."""

import shlex
from pathlib import PurePath

from ml_collections import ConfigDict

from jaxlm.config.keys import ANSWERING, SILENT
from jaxlm.errors import DataError

QUESTION = '{"question": "Who wrote it?", "context": "Ann wrote it."}'  # of task qa


def next_command(config: ConfigDict, workdir: PurePath, tokenizer, flags: str = "") -> str:
    """'try python -m jaxlm.generate ...', or jaxlm.evaluate where the model writes nothing.

    flags: to add to the command, such as ' --step=best'.
    """
    program = "evaluate" if config.task.name in SILENT else "generate"
    prompt = prompt_for(config, tokenizer, program)
    command = f"try python -m jaxlm.{program} --workdir={shlex.quote(str(workdir))}{flags}"
    if prompt:
        command += f" --prompt={shlex.quote(prompt)}"
    return command


def prompt_for(config: ConfigDict, tokenizer, program: str) -> str:
    """A prompt for the reader to replace, '' where none is needed."""
    task = config.task.name
    if task == "mlm":
        return "[MASK]"
    if task == "qa":
        return QUESTION
    if task in ANSWERING or (program == "generate" and tokenizer.bos_id is None):
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
