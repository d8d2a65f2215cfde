"""Which tokens begin and end a text (bos and eos), of a tokenizer that was made elsewhere.

What is said wins over what is guessed, in this order: the flags --bos and --eos; the files that lie beside the
tokenizer, as on a hub; the post-processor of tokenizer.json, or the sentencepiece model; known names.
"""

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from jaxlm.cli import did_you_mean
from jaxlm.data.tokenization.tokenizer_json import around_the_text, special_tokens
from jaxlm.errors import ConfigError, DataError

ROLES = ("bos", "eos")
# What a run's tokenizer begins and ends a text with, beside the tokenizer.
IDS = "tokenizer_ids.json"
FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
SHOWN = 12  # special tokens, in a message
# How special tokens are written, but for those of bytes: <s>, <|im_end|>, [SEP]
LIKE_SPECIAL = re.compile(r"<(?!0x)[^<>\s]+>|\[[A-Z_]+\]")
OWN = "the sentencepiece model"
BY_NAME = "by its name"
POST_PROCESSOR = "post-processor of tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
# Where nothing says which special token is which, these are looked for, in this order.
NAMES = {
    "bos": (
        "<|begin_of_text|>",
        "<|startoftext|>",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<s>",
        "<bos>",
        "[CLS]",
        "[BOS]",
        END_OF_TEXT,
        "<EOT>",
    ),
    "eos": (
        "<|end_of_text|>",
        END_OF_TEXT,
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "</s>",
        "<eos>",
        "[SEP]",
        "[EOS]",
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<EOT>",
    ),
}
# What versions before eval.bleu_tokenize looked for in the whole vocabulary, and trained with.
OLDER_NAMES = {
    "bos": ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "[CLS]", END_OF_TEXT),
    "eos": ("<|end_of_text|>", END_OF_TEXT, "</s>", "<eos>", "[SEP]"),
}


def put(tokenizer, role: str, id_: int | None, origin: str | None) -> None:
    """Makes a token (None: no token) the tokenizer's bos or eos. origin: who says so, None where nobody need ask."""
    setattr(tokenizer, f"{role}_id", id_)
    setattr(tokenizer, f"{role}_from", origin)


def of_tokenizer_json(content: dict, ids: dict[str, int], tokenizer) -> None:
    """Puts what a tokenizer.json says by itself: its post-processor, then names among its special tokens."""
    around = around_the_text(content.get("post_processor"))
    # A file that marks nothing as special leaves only the names to go by.
    candidates = special_tokens(content) or ids
    for role, token in zip(ROLES, around):
        if token in ids:
            put(tokenizer, role, ids[token], POST_PROCESSOR)
            continue
        token = _first_of(NAMES[role], candidates)
        if token is not None:
            put(tokenizer, role, ids[token], BY_NAME)


def of_files(tokenizer, folder: Path) -> None:
    """Puts what the files beside a tokenizer say. What they name but the tokenizer lacks goes to tokenizer.notes.

    Raises DataError where one of them can't be read.
    """
    for role in ROLES:
        id_ = getattr(tokenizer, f"{role}_id")
        if id_ is not None and getattr(tokenizer, f"{role}_from") is None:
            put(tokenizer, role, id_, OWN)
    said = {}
    for name in FILES:
        content = _read_json(folder / name)
        for role in ROLES:
            if f"{role}_token" in content:
                said.setdefault(role, []).append((name, content[f"{role}_token"]))
            if f"{role}_token_id" in content:
                said.setdefault(role, []).append((name, _first_id(content[f"{role}_token_id"])))
    for role in ROLES:
        _put_first_that_fits(tokenizer, role, said.get(role, []))


def of_flags(tokenizer, bos: str | None, eos: str | None) -> None:
    """Puts what a person has chosen: a token's text, its id, or none. None: nothing was chosen. Raises ConfigError."""
    problems = []
    for role, given in zip(ROLES, (bos, eos)):
        if given is None:
            continue
        id_ = _chosen_id(tokenizer, given)
        if id_ is None and given != "none":
            problems.append(f"--{role}={given}: {_no_such_token(tokenizer, given)}")
        put(tokenizer, role, id_, f"--{role}")
    if problems:
        raise ConfigError("\n".join(problems))


def _chosen_id(tokenizer, given: str) -> int | None:
    """The token that a flag names, by its id or its text; None for none, and where there is no such."""
    if given == "none":
        return None
    if not (given.isascii() and given.isdecimal()):
        return tokenizer.token_id(given)
    if tokenizer.token(int(given)) is None:
        return None
    return int(given)


def write_tokenizer(folder, tokenizer) -> None:
    """Leaves a tokenizer in a folder, its file and its ids. folder: a pathlib.Path, or epath's of a bucket."""
    (folder / tokenizer.filename).write_bytes(tokenizer.to_bytes())
    (folder / IDS).write_text(json.dumps(ids_of(tokenizer)) + "\n")


def ids_of(tokenizer) -> dict:
    """bos_id, eos_id and, where they are known, who said so: as JSON."""
    known = {}
    for role in ROLES:
        for key in (f"{role}_id", f"{role}_from"):
            known[key] = getattr(tokenizer, key)
    return known


def put_ids(tokenizer, entry: dict) -> None:
    """Puts what `ids_of` gave, or an older manifest, which has the ids alone."""
    for role in ROLES:
        put(tokenizer, role, entry[f"{role}_id"], entry.get(f"{role}_from"))


def read_ids(folder: Path) -> dict | None:
    """What `write_tokenizer` left of the ids. Raises DataError."""
    content = _read_json(folder / IDS)
    if not content:
        return None
    if not {"bos_id", "eos_id"} <= set(content):
        raise DataError(f"{folder / IDS} is damaged; copy it again")
    return content


def config_of_a_run(folder: Path) -> dict | None:
    """The flat config of a training run in this folder; None where config.json is of something else, or missing."""
    config = _read_json(folder / "config.json")
    if "model.name" in config:
        return config
    return None


def of_an_older_run(tokenizer, config: dict) -> None:
    """Puts what an earlier version trained with, whose checkpoints have no ids. config: of the run, flat."""
    if tokenizer.name != "huggingface" or "eval.bleu_tokenize" in config:
        return
    for role, names in OLDER_NAMES.items():
        ids = map(tokenizer.token_id, names)
        put(tokenizer, role, next((id_ for id_ in ids if id_ is not None), None), BY_NAME)


def _put_first_that_fits(tokenizer, role: str, said: list[tuple]) -> None:
    """said: (file, a token's text, its id, or None for none)."""
    for name, value in said:
        value = _text_or_id(value)
        if value is None:
            continue
        by_id = isinstance(value, int)
        id_ = value if by_id else tokenizer.token_id(value)
        if id_ is None or tokenizer.token(id_) is None:
            shown = f"token {value}" if by_id else f"{value!r}"
            tokenizer.notes.append(
                f"{name} says that {role} is {shown}, which this tokenizer doesn't have"
            )
        elif by_id and tokenizer.special_ids and id_ not in tokenizer.special_ids:
            # Configs of models often keep defaults that fit another vocabulary.
            shown = f"token {value}, {tokenizer.token(id_)!r}"
            tokenizer.notes.append(
                f"{name} says that {role} is {shown}, which is no special token: not followed"
            )
        else:
            put(tokenizer, role, id_, name)
            return
    denied = [name for name, value in said if value is None and name in FILES[:2]]
    if denied and getattr(tokenizer, f"{role}_from") == BY_NAME:
        put(tokenizer, role, None, denied[0])


def _text_or_id(value) -> str | int | None:
    """The token of a value in a JSON file: text, {"content": text}, an id, or null."""
    if isinstance(value, dict):
        value = value.get("content")
    if value == "" or isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return value


def _first_id(value):
    """Of several ends, for a model that chats, the first ends a text."""
    if isinstance(value, list):
        return next(iter(value), None)
    return value


def _no_such_token(tokenizer, given: str) -> str:
    """Why a flag can't be followed, and which tokens it may name."""
    special = special_tokens_of(tokenizer)
    if not special:
        return f"this tokenizer has no such token; its ids are 0 to {tokenizer.vocab_size - 1:,}"
    near = did_you_mean(given, special)
    return f"this tokenizer has no such token; its special tokens are {listed(special)}; none is for no token{near}"


def special_tokens_of(tokenizer) -> list[str]:
    """The tokens that may begin or end a text: those that are marked special, else those that are written like one."""
    if tokenizer.special_ids:
        return list(map(tokenizer.token, sorted(tokenizer.special_ids)))
    tokens = map(tokenizer.token, range(tokenizer.vocab_size))
    return [token for token in tokens if token and LIKE_SPECIAL.fullmatch(token)]


def listed(tokens: list[str]) -> str:
    """The first of the tokens, and how many more there are."""
    shown = ", ".join(tokens[:SHOWN])
    if len(tokens) > SHOWN:
        return f"{shown} and {len(tokens) - SHOWN:,} more"
    return shown


def _read_json(path: Path) -> dict:
    """The object in a JSON file, {} where there is no file."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(f"{path}, beside the tokenizer, can't be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(
            f"{path}, beside the tokenizer, is not JSON ({error}); copy it again or take it away"
        ) from None
    if isinstance(content, dict):
        return content
    return {}


def _first_of(words: Iterable[str], candidates: Collection[str]) -> str | None:
    return next((word for word in words if word in candidates), None)
