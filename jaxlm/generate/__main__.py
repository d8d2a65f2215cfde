"""python -m jaxlm.generate --workdir=DIR --prompt "...": text from a trained model.

A model fine-tuned on a task answers: a translation or a reply of its own, the probability of each class, the tag of
each word; one of task mlm predicts the token at each [MASK]. --input reads the prompts from a file, one a line; of
FILE.jsonl each line is an object of the task's columns, such as a dialogue of several turns:

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}, {"role": "user", ...}]}

FILE.json holds one such object, a list of messages (one dialogue), or a list of objects. --beams searches instead of
sampling.
"""

import json
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.tasks import TASKS, task_of
from jaxlm.data.files import conll
from jaxlm.data.files.columns import columns_given
from jaxlm.data.files.example_files import NotUtf8, lines_of, opened, read_text
from jaxlm.data.files.formats import suffix_of
from jaxlm.data.labels import label_names
from jaxlm.errors import ConfigError, DataError
from jaxlm.generate.arguments import (
    NUMBERS,
    Arguments,
    examples_of,
    is_message,
    number_by,
    refuse_sampled_search,
)
from jaxlm.parallel import hosts

# The flags that a model follows: as it goes on from a prompt, and as it searches an answer.
SAMPLING = "max_tokens temperature top_k top_p num_samples seed stop".split()
SEARCH = "beams length_penalty max_tokens stop output".split()
RECORDS = (".jsonl", ".ndjson", ".json")  # names of --input that holds examples, not lines of text


def parser_of_flags() -> cli.Parser:
    parser = cli.Parser(prog="jaxlm.generate", description=__doc__)
    add = parser.add_argument
    add("--workdir", required=True, help="run directory of jaxlm.train")
    add(
        "--prompt",
        action="append",
        help="how the text begins (repeat for several; default: nothing)",
    )
    add(
        "--input",
        metavar="FILE",
        help="prompts, one a line; FILE.jsonl, FILE.json: examples and dialogues (see above)",
    )
    add("--output", metavar="FILE", help="write the answers there, one a line; FILE.jsonl: as JSON")
    add(
        "--beams",
        type=int,
        default=1,
        help="hypotheses of a beam search; 1: greedy (translation, chat)",
    )
    add("--length_penalty", type=float, default=0.6, help="of the beam search")
    add("--max_tokens", type=int, default=200, help="tokens of a text, at most")
    add("--temperature", type=float, default=0.8, help="0: always the most likely token")
    add("--top_k", type=int, default=0, help="choose among the k likeliest; 0: all")
    add("--top_p", type=float, default=0.0, help="choose among the likeliest of this mass; 0: all")
    add("--num_samples", type=int, default=1, help="texts for each prompt")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    add(
        "--stop",
        action="append",
        default=[],
        help="cut the text before this string (repeat for several)",
    )
    add("--step", default="latest", help="checkpoint: latest, best or a number")
    hosts.add_flags(parser)
    return parser


def refuse_senseless(args, given: set[str]) -> None:
    """Raises ConfigError of numbers that mean nothing, by their flags. given: the flags that are not as by default."""
    read = Arguments("jaxlm.generate", prefix="--")
    numbers = {}
    for name in NUMBERS:
        value = number_by(read, name, getattr(args, name))
        if name in given:
            numbers[name] = value
    refuse_sampled_search(read, numbers)
    read.refuse()


def given_flags(args, parser: cli.Parser) -> set[str]:
    """Those of sampling and search whose values are not the defaults."""
    names = set()
    for name in (*SAMPLING, *SEARCH):
        if getattr(args, name) != parser.get_default(name):
            names.add(name)
    return names


def main(argv: list[str]) -> None:
    parser = parser_of_flags()
    args = parser.parse(argv)
    given = given_flags(args, parser)
    refuse_senseless(args, given)
    if args.input and not Path(args.input).is_file():
        raise ConfigError(f"--input={args.input}: there is no such file{cli.near_path(args.input)}")
    cli.require_writable("--output", args.output)
    hosts.connect(args)

    import jaxlm  # here, as orbax is slow to import: a wrong flag is refused at once

    lm = jaxlm.load(args.workdir, step=args.step)
    task = lm.config.task.name
    refuse_useless(task, given)
    if TASKS[task].answers_examples and not (args.prompt or args.input):
        raise ConfigError(f"--prompt or --input: what is a model of task {task} to answer?")
    prompts = args.prompt or ([] if args.input else [""])
    if len(TASKS[task].asked_columns) > 1:  # a question is nothing without its context
        prompts = [question_of(prompt, task) for prompt in prompts]
    if args.input:
        prompts += read_sentences(args.input, lm.config) or read_input(args.input, task)
    if TASKS[task].answers_examples:
        return answer(lm, prompts, args)
    options = {name: getattr(args, name) for name in SAMPLING}
    texts = lm.generate(prompts, **options)
    if jax.process_index():
        return  # the first process prints
    alone = len(texts) == 1
    for i, text in enumerate(texts):
        if not alone:
            print(f"--- sample {i + 1} ---")
        print(prompts[i // args.num_samples] + text)


def refuse_useless(task: str, given: set[str]) -> None:
    """Raises ConfigError where a flag was given that a model of this task does not follow."""
    if not TASKS[task].answers_examples:
        follows = SAMPLING
    else:
        follows = SEARCH if TASKS[task].writes_text else ["output"]
    if TASKS[task].is_chat:  # a translation is searched, not sampled
        follows = [*follows, "temperature", "top_k", "top_p", "seed"]
    useless = sorted(given - {*follows})
    if useless:
        raise ConfigError(
            f"{flags(useless)}: not for a model of task {task}; of these flags it takes {flags(follows)}"
        )


def flags(names: list[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def answer(lm, prompts: list[str], args) -> None:
    names = []
    if task_of(lm.config).writes_text:
        names = ["max_tokens", "stop"]
        if args.beams > 1:
            names += ["beams", "length_penalty"]
        elif task_of(lm.config).is_chat:  # a translation is searched, not sampled
            names += ["temperature", "top_k", "top_p", "seed"]
    options = {name: getattr(args, name) for name in names}
    answers = lm.answer(prompts, **options)
    if jax.process_index():
        return
    if args.output:
        write_answers(args.output, prompts, answers)
    else:
        print("\n".join(map(in_a_line, answers)))


def read_input(path: str, task: str) -> list:
    """The prompts of --input: texts, or the examples of a file of JSON.

    Raises DataError of a file that can't be read, ConfigError of columns that the task does not know.
    """
    if not path.endswith(RECORDS):
        return read_prompts(path)
    names, records = read_records(path)
    where = f"--input={path}"
    if TASKS[task].from_examples:
        return examples_of(task, TASKS[task].column_names, records, where, names)
    read = Arguments(where)
    texts = []
    for name, record in zip(names, records):
        texts.append(read.text(name, text_in(record)))
    read.refuse()
    return texts


def read_records(path: str) -> tuple[list[str], list]:
    """(the name of each in messages, the JSON values): of each line, or of a file that is one JSON value.

    Raises DataError of a line that is not JSON.
    """
    lines = read_prompts(path)
    if path.endswith(".json"):
        whole = json_or_none("\n".join(lines))
        if whole is not None:
            is_list = isinstance(whole, list) and not all(map(is_message, whole))
            records = whole if is_list else [whole]
            return [f"item {number}" for number in range(1, len(records) + 1)], records
    names = []
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(
                f"--input={path}: line {number} is not JSON ({error.msg}, column {error.colno}): each line of such a "
                "file is an object; prompts as plain lines belong in a file of another name, such as prompts.txt"
            ) from None
        names.append(f"line {number}")
    return names, records


def json_or_none(text: str):
    """The value of a text that is JSON; None of another."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def text_in(record):
    """The text of a record for a model that goes on from it, or that fills its masks."""
    for name in ("prompt", "text"):
        if isinstance(record, dict) and name in record:
            return record[name]
    return record


def question_of(prompt: str, task: str) -> dict:
    """The example in a --prompt, as JSON, of a task that is asked with several columns.

    Raises ConfigError of any other prompt.
    """
    example = json_or_none(prompt)
    if isinstance(example, dict):
        return example
    if TASKS[task].answer == "span":
        about = "a context"
        like = '{"question": "Who wrote it?", "context": "Ann wrote it."}'
    else:
        about = "an example of its columns"
        like = json.dumps(dict.fromkeys(TASKS[task].asked_columns, "TEXT"))
    raise ConfigError(
        f"--prompt={prompt}: a model of task {task} is asked about {about}: --prompt='{like}'"
    )


def read_prompts(path: str) -> list[str]:
    """The lines of a text. Only a newline ends one, not every character that Unicode lets end a line."""
    return lines_of(text_of(path))


def text_of(path: str) -> str:
    try:
        return read_text(opened(path))
    except NotUtf8 as error:
        raise DataError(f"--input={path}: byte {error.byte} is not UTF-8; {error.remedy}") from None
    except DataError as error:
        raise DataError(f"--input={error}") from None


def read_sentences(path: str, config: ConfigDict) -> list[dict]:
    """The sentences of a file with a word a line, for a model that tags; [] of any other."""
    if task_of(config).answer != "tags" or path.endswith(RECORDS):
        return []
    given = columns_given(config.data.columns, config.task.name)
    sentences = conll.words_of(path, text_of(path), suffix_of(path), given, label_names(config))
    if sentences:
        words = sum(map(len, sentences))
        print(
            f"--input={path}: {len(sentences):,} sentences, {words:,} words, read as a word a line",
            file=sys.stderr,
        )
    return [{"words": words} for words in sentences]


def write_answers(path: str, prompts: list[str], answers: list) -> None:
    """One line an answer: objects {"prompt", "answer"} to FILE.jsonl, else texts whose line ends are escaped."""
    lines = []
    changed = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if path.endswith(".jsonl"):
            line = cli.readable_json({"prompt": prompt, "answer": answer})
        elif isinstance(answer, str):
            line = escaped(answer)
            changed += line != answer
        else:
            line = in_a_line(answer)
        lines.append(line + "\n")
    if changed:
        print(
            f"--output={path}: in {changed} of {len(lines)} answers backslash, newline and carriage return are "
            "written as \\\\, \\n and \\r, so that each is one line (FILE.jsonl keeps them in JSON)",
            file=sys.stderr,
        )
    Path(path).write_bytes("".join(lines).encode("utf-8"))


def in_a_line(answer) -> str:
    if isinstance(answer, str):
        return answer
    return cli.readable_json(answer)


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


if __name__ == "__main__":
    cli.run(main)
