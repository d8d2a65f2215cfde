"""python -m jaxlm.generate --workdir=DIR --prompt "...": text from a trained model.

A model fine-tuned on a task answers: a translation or a reply of its own, the probability of each class, the tag of
each word; one of task mlm says what may stand at each [MASK]. --input reads the prompts from a file, one a line; of
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
from jaxlm.config.keys import ANSWERING, ROLES, WRITTEN
from jaxlm.data.examples import label_names
from jaxlm.data.files import conll
from jaxlm.data.files.example_files import NotUtf8, lines_of, opened, read_text, suffix_of
from jaxlm.data.files.tables import columns_given
from jaxlm.errors import ConfigError, DataError
from jaxlm.generate.arguments import Arguments, columns_of, examples_of, is_message
from jaxlm.parallel import hosts

SAMPLING = "max_tokens temperature top_k top_p num_samples seed stop".split()
SEARCH = "beams length_penalty max_tokens stop output".split()
RECORDS = (".jsonl", ".ndjson", ".json")  # names of --input that holds examples, not lines of text


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="jaxlm.generate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="run directory of jaxlm.train")
    parser.add_argument(
        "--prompt",
        action="append",
        help="how the text begins (repeat for several; default: nothing)",
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="prompts, one a line; FILE.jsonl, FILE.json: examples and dialogues (see above)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write the answers there, one a line; FILE.jsonl: as JSON"
    )
    parser.add_argument(
        "--beams",
        type=int,
        default=1,
        help="hypotheses of a beam search; 1: greedy (translation, chat)",
    )
    parser.add_argument("--length_penalty", type=float, default=0.6, help="of the beam search")
    parser.add_argument("--max_tokens", type=int, default=200, help="tokens of a text, at most")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the most likely token"
    )
    parser.add_argument("--top_k", type=int, default=0, help="choose among the k likeliest; 0: all")
    parser.add_argument(
        "--top_p", type=float, default=0.0, help="choose among the likeliest of this mass; 0: all"
    )
    parser.add_argument("--num_samples", type=int, default=1, help="texts for each prompt")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="cut the text before this string (repeat for several)",
    )
    parser.add_argument("--step", default="latest", help="checkpoint: latest, best or a number")
    hosts.add_flags(parser)
    args = parser.parse(argv)
    if args.input and not Path(args.input).is_file():
        raise ConfigError(f"--input={args.input}: there is no such file{cli.near_path(args.input)}")
    cli.require_writable("--output", args.output)
    hosts.connect(args)

    import jaxlm

    lm = jaxlm.load(args.workdir, step=args.step)
    task = lm.config.task.name
    refuse_useless(task, args, parser)
    if task in ANSWERING and not (args.prompt or args.input):
        raise ConfigError(f"--prompt or --input: what is a model of task {task} to answer?")
    prompts = args.prompt or ([] if args.input else [""])
    if task == "qa":  # a question is nothing without its context
        prompts = [question_of(prompt) for prompt in prompts]
    if args.input:
        prompts += read_sentences(args.input, lm.config) or read_input(args.input, task)
    if task in ANSWERING:
        return answer(lm, prompts, args)
    texts = lm.generate(prompts, **{name: getattr(args, name) for name in SAMPLING})
    if jax.process_index():
        return  # the first process tells
    alone = len(texts) == 1
    for i, text in enumerate(texts):
        if not alone:
            print(f"--- sample {i + 1} ---")
        print(prompts[i // args.num_samples] + text)


def refuse_useless(task: str, args, parser: cli.Parser) -> None:
    """Raises ConfigError where a flag was given that says nothing to a model of this task."""
    if task not in ANSWERING:
        follows = SAMPLING
    else:
        follows = SEARCH if task in WRITTEN else ["output"]
    if task in WRITTEN and task != "seq2seq":  # which is searched, not sampled
        follows = [*follows, "temperature", "top_k", "top_p", "seed"]
    given = set()
    for name in (*SAMPLING, *SEARCH):
        if getattr(args, name) != parser.get_default(name):
            given.add(name)
    if useless := sorted(given - {*follows}):

        def say(names):
            return ", ".join(f"--{name}" for name in names)

        raise ConfigError(
            f"{say(useless)}: not for a model of task {task}; of these flags it takes {say(follows)}"
        )


def answer(lm, prompts: list[str], args) -> None:
    options = {}
    if lm.config.task.name in WRITTEN:
        options = {
            "beams": args.beams,
            "length_penalty": args.length_penalty,
            "max_tokens": args.max_tokens,
        }
        options["stop"] = args.stop
        options |= {"top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
        if lm.config.task.name == "seq2seq":
            options["temperature"] = 0.0
        else:
            options["temperature"] = args.temperature
    answers = lm.answer(prompts, **options)
    if jax.process_index():
        return
    if args.output:
        write_answers(args.output, prompts, answers)
    else:
        print("\n".join(map(spelled, answers)))


def read_input(path: str, task: str) -> list:
    """What --input asks: texts, or the examples of a file of JSON. Raises DataError, and ConfigError of columns."""
    if not path.endswith(RECORDS):
        return read_prompts(path)
    names, records = read_records(path)
    where = f"--input={path}"
    if task in ROLES:
        return examples_of(task, columns_of(task), records, where, names)
    read = Arguments(where)
    texts = [read.text(name, text_in(record)) for name, record in zip(names, records)]
    read.refuse()
    return texts


def read_records(path: str) -> tuple[list[str], list]:
    """(what messages call each, the JSON values): of each line, or of a file that is one JSON value."""
    lines = read_prompts(path)
    if path.endswith(".json"):
        try:
            whole = json.loads("\n".join(lines))
        except json.JSONDecodeError:
            pass  # one a line, then
        else:
            if isinstance(whole, list) and not all(map(is_message, whole)):
                records = whole
            else:
                records = [whole]
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


def text_in(record):
    """The text of a record for a model that goes on from it, or that fills its masks."""
    for name in ("prompt", "text"):
        if isinstance(record, dict) and name in record:
            return record[name]
    return record


def question_of(prompt: str) -> dict | str:
    """An example of qa, of a --prompt that is one as JSON."""
    try:
        example = json.loads(prompt)
    except json.JSONDecodeError:
        example = None
    if isinstance(example, dict):
        return example
    like = '{"question": "Who wrote it?", "context": "Ann wrote it."}'
    raise ConfigError(
        f"--prompt={prompt}: a model of task qa is asked about a context: --prompt='{like}'"
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
    if config.task.name != "tag" or path.endswith(RECORDS):
        return []
    given = columns_given(config.data.columns, "tag")
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
    if path.endswith(".jsonl"):
        pairs = zip(prompts, answers, strict=True)
        lines = []
        for prompt, said in pairs:
            lines.append(cli.readable_json({"prompt": prompt, "answer": said}))
    else:
        lines = [escaped(said) if isinstance(said, str) else spelled(said) for said in answers]
        changed = sum(isinstance(said, str) and said != line for said, line in zip(answers, lines))
        if changed:
            print(
                f"--output={path}: in {changed} of {len(lines)} answers backslash, newline and carriage return are "
                "written as \\\\, \\n and \\r, so that each is one line (FILE.jsonl keeps them in JSON)",
                file=sys.stderr,
            )
    Path(path).write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))


def spelled(said) -> str:
    if isinstance(said, str):
        return said
    return cli.readable_json(said)


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


if __name__ == "__main__":
    cli.run(main)
