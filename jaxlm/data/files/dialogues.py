"""Dialogues as other projects write them, to the columns of the tasks sft and dpo.

Read are OpenAI's messages of role and content, ShareGPT's conversations of from and value (human, gpt), Alpaca's
instruction, input and output (Taori et al. 2023), prompt and completion, and pairs of preferences as texts or lists of
messages. What a file is taken for is told, in one line.
"""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxlm.cli import did_you_mean
from jaxlm.config.tasks import TASKS

ROLES = {  # who speaks, as others call them
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
}
TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")  # of Bai et al. 2022
OF_ANTHROPIC = {"Human": "user", "Assistant": "assistant"}
# Other names of a prompt and of a response, the likeliest first.
ASKED = ("question", "query", "instruction", "input", "user", "source")
ANSWERED = ("answer", "output", "completion", "assistant", "target", "reply")


class Form(NamedTuple):
    """A way to write an example: the columns that tell it, those that may be there, and what makes an example of it."""

    name: str  # for people
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    example: Callable[[dict], dict]


def form_of(names: list[str], task: str) -> Form | None:
    """The form that the columns of a file tell, where they are not the task's own."""
    known = {name.casefold() for name in names}
    for form in FORMS.get(TASKS[task].transform, ()):
        prompt_elsewhere = form.example is preference_alone and known & set(ASKED)
        if set(form.needed) <= known and not prompt_elsewhere:
            return form
    return None


def is_native(names: list[str], task: str) -> bool:
    """Whether a file has the columns of the task itself."""
    known = {name.casefold() for name in names}
    if "messages" in TASKS[task].column_names:
        return "messages" in known or {"prompt", "response"} <= known
    return {"prompt", "chosen", "rejected"} <= known


def own_columns(example: dict, task: str) -> dict:
    """An example of the task's own columns, whose messages may still be written as ShareGPT has them.

    What needs no change is given back as it is. Raises ValueError of what is no dialogue.
    """
    if TASKS[task].is_preference:
        return preference(example)
    if "messages" in example and is_foreign(example["messages"]):
        return example | {"messages": dialogue(example["messages"])}
    if any(isinstance(example.get(role), list) for role in ("prompt", "response")):
        return completion(example)
    return example


# ---------------------------------------------------------------- messages


def loaded(value):
    """A list that a table has as JSON, else the value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def is_foreign(value) -> bool:
    """Whether messages have to be changed to be those of role and content."""
    messages = loaded(value)
    if not isinstance(messages, list):
        return False
    dicts = [message for message in messages if isinstance(message, dict)]
    return any("from" in message or isinstance(message.get("content"), list) for message in dicts)


def dialogue(value) -> list[dict]:
    """Messages of role and content. Raises ValueError where they are none."""
    messages = loaded(value)
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list):
        raise ValueError(f"a dialogue is a list of messages, not {str(value)[:60]}")
    return [message_of(message) for message in messages]


def message_of(message) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f'a message is {{"role": ..., "content": ...}}, not {str(message)[:60]}')
    speaker = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = joined(content)
    if speaker is None or content is None:
        raise ValueError(f"a message has a speaker and a text, not {str(message)[:60]}")
    role = ROLES.get(str(speaker).casefold())
    if role is None:
        known = ", ".join(ROLES)
        hint = did_you_mean(str(speaker), ROLES)
        raise ValueError(
            f"a message of {speaker!r}: only {known} are read{hint}; leave such examples out"
        )
    if message.get("weight") is not None:
        weight = {"weight": message["weight"]}
    else:
        weight = {}
    return {"role": role, "content": content, **weight}


def joined(parts: list) -> str:
    """The text of a content in parts. Raises ValueError where one is no text."""
    texts = []
    for part in parts:
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            raise ValueError(f"the content of a message is text, not {str(part)[:60]}")
        texts.append(part["text"])
    return "".join(texts)


# ---------------------------------------------------------------- forms


def conversations(example: dict) -> dict:
    messages = dialogue(example.get("conversations", example.get("conversation")))
    return {"messages": [*system_of(example), *messages]}


def system_of(example: dict) -> list[dict]:
    if not example.get("system"):
        return []
    return [{"role": "system", "content": example["system"]}]


def instructed(example: dict) -> str:
    """An instruction, and the input that it is about after an empty line."""
    about = example.get("input", example.get("context"))
    parts = []
    for part in (example["instruction"], about):
        if part not in (None, ""):
            parts.append(str(part))
    return "\n\n".join(parts)


def instruction(example: dict) -> dict:
    answer = example.get("output", example.get("response"))
    prompt = instructed(example)
    history = loaded(example.get("history") or [])
    if not (example.get("system") or history):
        return {"prompt": prompt, "response": answer}
    messages = system_of(example)
    for pair in history:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            raise ValueError(f"its history is a list of pairs, not {str(history)[:60]}")
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def completion(example: dict) -> dict:
    """A prompt and what follows it, texts or lists of messages."""
    prompt = example["prompt"]
    answer = example.get("completion", example.get("response"))
    if not isinstance(prompt, list) and not isinstance(answer, (list, dict)):
        return {"prompt": prompt, "response": answer}
    return {"messages": turns(prompt, "user") + turns(answer, "assistant")}


def turns(value, role: str) -> list[dict]:
    """Messages, of a list of them or of the text of one."""
    if isinstance(value, (list, dict)):
        return dialogue(value)
    return [{"role": role, "content": value}]


def preference(example: dict) -> dict:
    """A prompt, and two answers: of texts, or of dialogues that are the same up to the last message."""
    sides = [example.get("chosen"), example.get("rejected")]
    prompt = example.get("prompt")
    if not any(isinstance(value, (list, dict)) for value in (prompt, *sides)):
        return example
    before = [] if prompt is None else turns(prompt, "user")
    first, second = [turns(value, "assistant") for value in sides]
    shared = common(first, second)
    answers = [first[len(shared) :], second[len(shared) :]]
    if any(len(answer) != 1 or answer[0]["role"] != "assistant" for answer in answers):
        raise ValueError(
            "chosen and rejected are the same dialogue but for one last message, the assistant's"
        )
    before = merged(before, shared)
    if not before:
        raise ValueError(
            "it has no prompt: neither a column prompt nor messages before the answers"
        )
    alone = len(before) == 1 and before[0]["role"] == "user"
    pair = {"chosen": answers[0][0]["content"], "rejected": answers[1][0]["content"]}
    return example | {"prompt": before[0]["content"] if alone else before} | pair


def common(first: list[dict], second: list[dict]) -> list[dict]:
    """The messages that both begin with, but for the last of each."""
    shared = []
    for one, other in zip(first[:-1], second[:-1]):
        if one != other:
            break
        shared.append(one)
    return shared


def merged(prompt: list[dict], shared: list[dict]) -> list[dict]:
    """The prompt once, where chosen and rejected begin with it too."""
    if not shared or prompt == shared:
        return prompt
    said = [message["content"].strip() for message in shared]
    if all(message["content"].strip() in said for message in prompt):
        return shared
    if shared[0]["role"] == "assistant":
        return prompt + shared
    raise ValueError("its prompt is another than the one that chosen and rejected begin with")


def preference_alone(example: dict) -> dict:
    """Chosen and rejected with the prompt in them, as lists of messages or in Anthropic's spelling."""
    if isinstance(example["chosen"], str):
        sides = {name: spoken(example[name]) for name in ("chosen", "rejected")}
        return preference(sides)
    return preference(example)


def spoken(text) -> list[dict]:
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    before, *rest = TURN.split(text) if isinstance(text, str) else [text]
    if not rest or before.strip():
        raise ValueError(
            "it has no prompt: give a column prompt, or lists of messages, or texts that begin with an empty line and "
            "Human:"
        )
    pairs = zip(rest[::2], rest[1::2])
    return [{"role": OF_ANTHROPIC[speaker], "content": said.strip()} for speaker, said in pairs]


def preference_after(example: dict) -> dict:
    """Chosen and rejected answers to a dialogue."""
    given = example.get("conversations", example.get("messages"))
    return preference({"prompt": [*system_of(example), *dialogue(given)]} | pair_of(example))


def preference_instructed(example: dict) -> dict:
    return preference({"prompt": instructed(example)} | pair_of(example))


def pair_of(example: dict) -> dict:
    return {name: example[name] for name in ("chosen", "rejected")}


SHAREGPT = "ShareGPT's dialogues (conversations of from and value)"
ALPACA = "Alpaca's instructions (the prompt is instruction, an empty line and {about}; the response is {answer})"
FORMS = {  # Task.transform -> the forms of its examples
    "sft": (
        Form(SHAREGPT, ("conversations",), ("system",), conversations),
        Form(SHAREGPT, ("conversation",), ("system",), conversations),
        Form(
            "prompts and completions (the response is completion)",
            ("prompt", "completion"),
            (),
            completion,
        ),
        Form(
            ALPACA.format(about="input", answer="output"),
            ("instruction", "output"),
            ("input", "system", "history"),
            instruction,
        ),
        Form(
            ALPACA.format(about="context", answer="response"),
            ("instruction", "response"),
            ("context", "input", "system"),
            instruction,
        ),
    ),
    "dpo": (
        Form(
            "answers to dialogues (conversations)",
            ("conversations", "chosen", "rejected"),
            ("system",),
            preference_after,
        ),
        Form(
            "answers to dialogues (messages)",
            ("messages", "chosen", "rejected"),
            ("system",),
            preference_after,
        ),
        Form(
            "answers to instructions (the prompt is instruction, an empty line and input)",
            ("instruction", "chosen", "rejected"),
            ("input",),
            preference_instructed,
        ),
        Form(
            "dialogues that differ in their last answer",
            ("chosen", "rejected"),
            (),
            preference_alone,
        ),
    ),
}


def likely_columns(names: list[str], roles: list[str]) -> dict[str, str]:
    """Of these columns, what is most likely the prompt and the response, as far as these are asked for."""
    folded = {name.casefold(): name for name in names}
    found = {}
    for role, others in (("prompt", ASKED), ("response", ANSWERED)):
        known = [folded[name] for name in others if name in folded]
        if known and role in roles:
            found[role] = known[0]
    return found
