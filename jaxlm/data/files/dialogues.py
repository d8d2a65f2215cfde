"""Dialogues: the messages of an example, and those of other projects, to the columns of the tasks sft and dpo.

Read are OpenAI's messages of role and content, ShareGPT's conversations of from and value (human, gpt), Alpaca's
instruction, input and output (Taori et al. 2023), prompt and completion, and pairs of preferences as texts or lists of
messages. What a file is taken for is said in one line.
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
    """A way to write an example: the columns that show it, those that may be there, and what makes an example of it."""

    name: str  # for people
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    example: Callable[[dict], dict]


def form_of(names: list[str], task: str) -> Form | None:
    """The form that the columns of a file show, where they are not the task's own."""
    known = set(map(str.casefold, names))
    for form in FORMS.get(TASKS[task].transform, ()):
        prompt_elsewhere = form.example is preference_alone and known & set(ASKED)
        if set(form.needed) <= known and not prompt_elsewhere:
            return form
    return None


def is_native(names: list[str], task: str) -> bool:
    """Whether a file has the columns of the task itself."""
    known = set(map(str.casefold, names))
    if "messages" in TASKS[task].column_names:
        return "messages" in known or {"prompt", "response"} <= known
    return {"prompt", "chosen", "rejected"} <= known


def own_columns(example: dict, task: str) -> dict:
    """An example of the task's own columns, whose messages may be written as ShareGPT has them.

    What needs no change is given back as it is. Raises ValueError of what is no dialogue.
    """
    if TASKS[task].is_preference:
        return preference(example)
    if "messages" in example and is_foreign(example["messages"]):
        return example | {"messages": dialogue(example["messages"])}
    if any(isinstance(example.get(role), list) for role in ("prompt", "response")):
        return completion(example)
    return example


# ---------------------------------------------------------------- messages of role and content


def messages_of(example) -> list[dict]:
    """The messages of an example, which has them as such, in JSON, or as a prompt and a response.

    Raises ValueError where its messages are no list.
    """
    if "messages" in example:
        given = example["messages"]
        given = from_json(given) if isinstance(given, str) else given
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"messages is a list of messages, not {str(given)[:60]}")
        return list(given)
    messages = []
    for name, role in (("prompt", "user"), ("response", "assistant")):
        said = example.get(name)
        if isinstance(said, (list, tuple)):  # what came before, of several turns
            messages += said
        elif name in example:
            messages.append({"role": role, "content": said})
    return messages


def from_json(text: str):
    """Raises ValueError where a text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"messages is a list of messages, or that in JSON, not {text[:60]!r}: {error}"
        ) from None


def refuse_message(message) -> None:
    """Raises ValueError where a message is not one of a known role with a text and a weight of 0 or 1."""
    if not (isinstance(message, dict) and {"role", "content"} <= set(message)):
        raise ValueError(f'a message is {{"role": ..., "content": ...}}, not {str(message)[:60]}')
    role = message["role"]
    content = message["content"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"the role {role!r} is not system, user or assistant")
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is text, not {str(content)[:60]}")
    weight = weight_of(message)
    if weight not in (0, 1):
        raise ValueError(
            f"the weight of a message is 0 (not learned) or 1, not {repr(weight)[:60]}"
        )


def weight_of(message: dict):
    """A message's weight, 1 where it has none."""
    weight = message.get("weight")
    return 1 if weight is None else weight  # a table has None where there is none


# ---------------------------------------------------------------- messages of others


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
    for message in messages:
        if isinstance(message, dict) and "from" in message:
            return True
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            return True
    return False


def dialogue(value) -> list[dict]:
    """Messages of role and content. Raises ValueError where they are none."""
    messages = loaded(value)
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list):
        raise ValueError(f"a dialogue is a list of messages, not {str(value)[:60]}")
    return list(map(message_of, messages))


def message_of(message) -> dict:
    """One message of role, content and, where it has one, weight. Raises ValueError where it is none."""
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
    converted = {"role": role, "content": content}
    if message.get("weight") is not None:
        converted["weight"] = message["weight"]
    return converted


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
    parts = [str(part) for part in (example["instruction"], about) if part not in (None, "")]
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
    first = turns(sides[0], "assistant")
    second = turns(sides[1], "assistant")
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
    prompt = before
    if len(before) == 1 and before[0]["role"] == "user":
        prompt = before[0]["content"]
    pair = {"chosen": answers[0][0]["content"], "rejected": answers[1][0]["content"]}
    return example | {"prompt": prompt} | pair


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
    texts = [message["content"].strip() for message in shared]
    if all(message["content"].strip() in texts for message in prompt):
        return shared
    if shared[0]["role"] == "assistant":
        return prompt + shared
    raise ValueError("its prompt is another than the one that chosen and rejected begin with")


def preference_alone(example: dict) -> dict:
    """Chosen and rejected with the prompt in them, as lists of messages or in Anthropic's spelling."""
    if isinstance(example["chosen"], str):
        chosen = spoken(example["chosen"])
        return preference({"chosen": chosen, "rejected": spoken(example["rejected"])})
    return preference(example)


def spoken(text) -> list[dict]:
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    before, *rest = TURN.split(text) if isinstance(text, str) else [text]
    if not rest or before.strip():
        raise ValueError(
            "it has no prompt: give a column prompt, or lists of messages, or texts that begin with an empty line and "
            "Human:"
        )
    messages = []
    for speaker, text in zip(rest[::2], rest[1::2]):
        messages.append({"role": OF_ANTHROPIC[speaker], "content": text.strip()})
    return messages


def preference_after(example: dict) -> dict:
    """Chosen and rejected answers to a dialogue."""
    given = example.get("conversations", example.get("messages"))
    return preference({"prompt": [*system_of(example), *dialogue(given)]} | pair_of(example))


def preference_instructed(example: dict) -> dict:
    return preference({"prompt": instructed(example)} | pair_of(example))


def pair_of(example: dict) -> dict:
    return {"chosen": example["chosen"], "rejected": example["rejected"]}


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
        name = next((name for name in others if name in folded), None)
        if name and role in roles:
            found[role] = folded[name]
    return found
