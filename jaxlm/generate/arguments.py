"""Arguments of jaxlm.load, its LM and jaxlm.generate: converted where the meaning is plain, else refused by name."""

import json
import math
from numbers import Integral, Real
from operator import index

import numpy as np

from jaxlm.cli import did_you_mean
from jaxlm.config.tasks import TASKS
from jaxlm.errors import ConfigError

INT32 = 2**31 - 1
MOST_SHOWN = 10  # faults of one call


class Arguments:
    """The arguments of one call. Each method returns the value as the code wants it, or notes what is wrong with it.

    where: the call, as messages name it. prefix: of names in messages, "--" of flags. `refuse()` raises one ConfigError
    of everything that was noted; what was returned until then may be None.
    """

    def __init__(self, where: str, prefix: str = ""):
        self.where = where
        self.prefix = prefix
        self.problems: list[str] = []

    def refuse(self) -> None:
        """Raises ConfigError where anything was noted."""
        shown_problems = self.problems[:MOST_SHOWN]
        if len(self.problems) > MOST_SHOWN:
            shown_problems.append(f"and {len(self.problems) - MOST_SHOWN:,} more")
        if shown_problems:
            raise ConfigError(f"{self.where}: " + "; ".join(shown_problems))

    def must(self, name: str, value, rule: str) -> None:
        self.problems.append(f"{self.prefix}{name}={shown(value)}: must be {rule}")

    def whole(
        self, name: str, value, low: int | None, rule: str, high: int | None = None
    ) -> int | None:
        """An int of any integer type, or of a float such as 5.0."""
        number = number_of(value)
        is_whole = number is not None and math.isfinite(number) and number == int(number)
        is_low = is_whole and low is not None and number < low
        is_high = is_whole and high is not None and number > high
        if not is_whole or is_low or is_high:
            self.must(name, value, f"a whole number, {rule}")
            return None
        return int(number)

    def real(self, name: str, value, low: float, high: float, rule: str) -> float | None:
        """A finite float from low to high."""
        number = number_of(value)
        if number is None or not math.isfinite(number) or not low <= number <= high:
            self.must(name, value, f"a number, {rule}")
            return None
        return float(number)

    def integers(self, name: str, value, rule: str) -> np.ndarray | None:
        """int32 of whole numbers in an array or in lists of equal lengths. rule: what they are to be."""
        try:
            array = np.asarray(value)
        except Exception:  # rows of several lengths, or what a library makes of them
            array = np.asarray(None)
        numeric = array.dtype.kind in "iuf" and np.isfinite(array).all() and not np.any(array % 1)
        if not numeric and array.size:
            hint = ""
            if is_text(value):
                hint = " (lm.tokenizer.encode(text) gives them)"
            self.must(name, value, f"{rule}{hint}")
            return None
        if array.size and np.abs(array.astype(np.float64)).max() > INT32:
            self.must(name, value, f"{rule}, of 32 bits")
            return None
        return array.astype(np.int32)

    def text(self, name: str, value) -> str | None:
        """A str that can be written as UTF-8."""
        if not isinstance(value, str):
            self.must(name, value, f"a text{hint_of(value)}")
            return None
        place = half_character(value)
        if place is not None:
            self.must(name, value, f"a text; character {place} is half of one (a lone surrogate)")
            return None
        return str(value)

    def texts(self, name: str, value) -> list[str] | None:
        """A list of str, of a str alone or of anything that gives them in order."""
        if isinstance(value, str):
            text = self.text(name, value)
            if text is None:
                return None
            return [text]
        items = self.items(name, value, "a text or a list of texts")
        if items is None:
            return None
        return [self.text(f"{name}[{number}]", item) for number, item in enumerate(items)]

    def items(self, name: str, value, rule: str) -> list | None:
        """The items of a list, a tuple, a generator, an array or a column of a table."""
        unordered = isinstance(value, (bytes, bytearray, dict, set, frozenset))
        if isinstance(value, np.ndarray):
            return np.atleast_1d(value).tolist()
        if unordered or not hasattr(value, "__iter__"):
            self.must(name, value, f"{rule}{hint_of(value)}")
            return None
        return list(value)


SPEAKERS = ("system", "user", "assistant")


def examples_of(
    task: str,
    columns: tuple[str, ...],
    given,
    where: str = "lm.answer",
    names: list[str] | None = None,
) -> list[dict]:
    """The examples in what was given to lm.answer, dicts of the task's columns. Raises ConfigError of all faults.

    A text is the first column that is asked for. Messages, dicts of role and content, are one dialogue of sft or dpo.
    where, names: what messages call the whole and each example.
    """
    read = Arguments(where)
    asked = TASKS[task].asked_columns
    chats = TASKS[task].is_chat
    if chats and "messages" not in columns:
        columns = ("messages", *columns)
    if isinstance(given, (str, dict)):
        given = [given]
    given = read.items("examples", given, "a text, a dict or a list of them") or []
    if chats and given and all(map(is_message, given)):
        given = [given]
    examples = []
    for number, item in enumerate(given):
        name = names[number] if names else f"examples[{number}]"
        if isinstance(item, str):
            item = {asked[0]: item}
        elif chats and isinstance(item, (list, tuple, np.ndarray)):
            item = {"messages": list(item)}
        elif not isinstance(item, dict):
            read.must(name, item, f"a text or a dict of {', '.join(columns)}")
            continue
        for problem in faults_of(task, columns, asked, item):
            read.problems.append(name + problem)
        examples.append(dict(item))
    read.refuse()
    return examples


def faults_of(
    task: str, columns: tuple[str, ...], asked: tuple[str, ...], example: dict
) -> list[str]:
    """What an example of lm.answer has that its task does not know, and what it lacks."""
    rule = f"a model of task {task} knows {', '.join(columns)}"
    unknown = [name for name in example if name not in columns]
    if unknown:
        return [f" has {name!r}: {rule}{did_you_mean(str(name), columns)}" for name in unknown]
    if TASKS[task].is_chat and "messages" in example:
        return dialogue_faults(example["messages"])
    problems = []
    for name in asked:
        if name not in example:
            problems.append(f" has no {name!r}: {rule}")
        elif name == "words":
            problems += words_faults(example[name])
        else:
            problems += text_faults(f"[{name!r}]", example[name])
    if "text2" in example:
        problems += text_faults("['text2']", example["text2"])
    return problems


def text_faults(where: str, value) -> list[str]:
    """Why a value is no text: a number is none, whose digits the model may have read in another form."""
    if not isinstance(value, str):
        return [f"{where}={shown(value)}: must be a text{hint_of(value)}"]
    if half_character(value) is not None:
        return [f"{where}={shown(value)}: it has half a character (a lone surrogate)"]
    return []


def words_faults(value) -> list[str]:
    """Why a value is neither a text nor a list of words."""
    if isinstance(value, str):
        return text_faults("['words']", value)
    if not hasattr(value, "__iter__") or isinstance(value, (bytes, dict)):
        return [f"['words']={shown(value)}: must be a text, or a list of words"]
    problems = []
    for number, word in enumerate(value):
        problems += text_faults(f"['words'][{number}]", word)
    return problems


def dialogue_faults(messages) -> list[str]:
    """Why messages, or their JSON, are no dialogue that an assistant can answer."""
    rule = 'a dialogue is a list of {"role": ..., "content": ...}'
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError:
            return [f"['messages']={shown(messages)}: {rule}"]
    if not isinstance(messages, (list, tuple)):
        return [f"['messages']={shown(messages)}: {rule}"]
    problems = []
    for number, message in enumerate(messages):
        where = f"['messages'][{number}]"
        if not is_message(message):
            problems.append(f"{where}={shown(message)}: {rule}")
            continue
        role = message["role"]
        content = message["content"]
        if role not in SPEAKERS:
            hint = did_you_mean(str(role), SPEAKERS)
            problems.append(f"{where} has the role {role!r}: roles are {', '.join(SPEAKERS)}{hint}")
        elif not isinstance(content, str):
            problems.append(f"{where} has the content {shown(content)}: must be a text")
        elif half_character(content) is not None:
            problems.append(f"{where} has half a character (a lone surrogate) in its content")
    if not problems and all(message["role"] == "assistant" for message in messages):
        problems.append("['messages'] has no message of a user to answer")
    return problems


def is_message(item) -> bool:
    return isinstance(item, dict) and {"role", "content"} <= set(item)


NUMBERS = {  # name: (whether whole, the least, the most, the rule), of lm.generate and lm.answer
    "max_tokens": (True, 1, 1_000_000, "from 1 to 1,000,000"),
    "temperature": (False, 0, math.inf, "0 (greedy) or positive"),
    "top_k": (True, 0, INT32, "0 (off) or positive"),
    "top_p": (False, 0, 1, "0 (off) or a probability"),
    "num_samples": (True, 1, None, "at least 1"),
    "seed": (True, None, None, "of any size"),
    "beams": (True, 1, 1024, "from 1 (no search) to 1,024"),
    "length_penalty": (False, 0, 1000, "0 (none) or positive"),
}
OF_ANSWERS = (
    "beams",
    "length_penalty",
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "stop",
)


def number_by(read: Arguments, name: str, value) -> int | float | None:
    """The value as the argument of this name wants it; None, with the fault noted, where it is none."""
    is_whole, low, high, rule = NUMBERS[name]
    if is_whole:
        return read.whole(name, value, low, rule, high)
    return read.real(name, value, low, high, rule)


def stops_of(read: Arguments, stop) -> list[str] | None:
    if stop is None:
        return []
    return read.texts("stop", stop)


def sampling_of(prompts, stop, given: dict) -> tuple[list[str], list[str], dict]:
    """(prompts, stop strings, the numbers by name) as given to lm.generate. Raises ConfigError of all faults."""
    read = Arguments("lm.generate")
    prompts = read.texts("prompts", prompts)
    stop = stops_of(read, stop)
    numbers = {name: number_by(read, name, value) for name, value in given.items()}
    read.refuse()
    return prompts, stop, numbers


def options_of(task: str, given: dict) -> tuple[list[str], dict]:
    """(stop strings, the numbers by name) of the options given to lm.answer. Raises ConfigError of all faults."""
    read = Arguments("lm.answer")
    stop = []
    numbers = {}
    for name, value in given.items():
        if name not in OF_ANSWERS:
            known = f"a model of task {task} knows {', '.join(OF_ANSWERS)}"
            read.problems.append(
                f"there is no option {name}: {known}{did_you_mean(name, OF_ANSWERS)}"
            )
        elif not TASKS[task].writes_text:
            read.problems.append(
                f"{name}={shown(value)}: not for a model of task {task}, which writes no text"
            )
        elif name == "stop":
            stop = stops_of(read, value)
        else:
            numbers[name] = number_by(read, name, value)
    refuse_sampled_search(read, numbers)
    read.refuse()
    return stop, numbers


def refuse_sampled_search(read: Arguments, numbers: dict) -> None:
    """Notes each option of sampling beside a beam search, which draws nothing."""
    beams = numbers.get("beams") or 1
    if beams == 1:
        return
    for name in ("temperature", "top_k", "top_p"):
        if numbers.get(name):
            read.problems.append(
                f"{read.prefix}beams={beams} and {read.prefix}{name}={numbers[name]}: a beam search draws nothing; "
                f"leave out {read.prefix}{name} to search, or say {read.prefix}beams=1 to sample"
            )


def number_of(value) -> float | int | None:
    """A Python number of a number of any library, None of anything else; True is no number."""
    if isinstance(value, np.ndarray) or hasattr(value, "__array__"):
        value = scalar_of(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return index(value)
    if isinstance(value, Real):
        return float(value)
    return None


def scalar_of(value):
    """The Python object in an array of no dimensions, else None."""
    array = np.asarray(value)
    if array.ndim == 0:
        return array.item()
    return None


def is_text(value) -> bool:
    """Whether there is text where ids should be: a text, or a list of them at any depth."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, str)


def half_character(text: str) -> int | None:
    """Where a text has a lone surrogate, which no encoding can write; None: nowhere."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def hint_of(value) -> str:
    if isinstance(value, (bytes, bytearray)):
        return ' (bytes become text by .decode("utf-8"))'
    if isinstance(value, (dict, list, tuple)):
        return " (a dialogue or an example is for lm.answer)"
    if number_of(value) is not None:
        return f' (as text: "{value}")'
    return ""


def shown(value, longest: int = 60) -> str:
    text = repr(value)
    if len(text) <= longest:
        return text
    return text[:longest] + "..."
