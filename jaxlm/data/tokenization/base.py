"""What every tokenizer offers."""

import hashlib
import re
from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np


class Tokenizer(ABC):
    """What every tokenizer offers. Ids are int32, from 0 to vocab_size - 1.

    Attributes: `name` (a key of TOKENIZERS), `filename` (what to call `to_bytes()` on disk), `vocab_size`, `bos_id`
    and `eos_id` (None where there is no such token; one token may be both), `unknown_id` (what text that has no token
    becomes, None where there is no such token), `bos_from` and `eos_from` (who says so, where it had to be found out),
    `notes` (what was odd about that).
    """

    name: str
    filename: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    unknown_id: int | None = None
    bos_from: str | None = None
    eos_from: str | None = None

    @cached_property
    def notes(self) -> list[str]:
        return []

    def encode(self, text: str, after: str = "") -> np.ndarray:
        """The int32 ids of `text`, without special tokens. A lone surrogate is read as U+FFFD.

        after: what comes before it in its document, of which the last character is enough; "" where it begins. Some
        tokenizers put a space before a text, which pieces of one document must not get.
        """
        text = replace_surrogates(text)[0]
        ids = self._go_on(text, after) if after else self._encode(text)
        return np.asarray(ids, dtype=np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(`encode(text)`, int64 [tokens, 2]: the first character of `text` that a token stands for, and one past
        the last).

        Neither column decreases. Tokens that spell one character together all have that character. A token that stands
        for no character, such as a space that the tokenizer adds, has an empty stretch.
        """
        ids, offsets = self._encode_with_offsets(replace_surrogates(text)[0])
        ids = np.asarray(ids, dtype=np.int32)
        offsets = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        return ids, np.maximum.accumulate(offsets, axis=0)

    def decode(self, ids) -> str:
        """The text of `ids`, an array or list of any shape. Never raises: special tokens and ids that are out of range
        (a model's vocabulary may be padded) give nothing, bytes that are not UTF-8 give U+FFFD."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        is_text = (ids >= 0) & (ids < self.vocab_size)
        for special in (self.bos_id, self.eos_id):
            if special is not None:
                is_text &= ids != special
        return self._decode(ids[is_text])

    def lost(self, text: str) -> list[str]:
        """The stretches of `text`, in order, that have no token: they are unknown, or dropped."""
        return []

    def may_lose(self, ids: np.ndarray) -> bool:
        """Whether `lost` may have something to say of a text with these ids; quick, and rarely wrongly True."""
        return self.unknown_id is not None and bool(np.any(ids == self.unknown_id))

    @abstractmethod
    def token(self, id_: int) -> str | None:
        """How the vocabulary writes a token; None where there is none of this id."""

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it; None where there is none."""
        for id_ in range(self.vocab_size):
            if self.token(id_) == token:
                return id_
        return None

    @property
    def special_ids(self) -> set[int]:
        """The tokens that the tokenizer marks as no text; empty where it marks none."""
        return set()

    @abstractmethod
    def to_bytes(self) -> bytes:
        """All that `from_bytes` needs to make this tokenizer again."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the name and the bytes."""
        return hashlib.sha256(self.name.encode() + self.to_bytes()).hexdigest()

    @abstractmethod
    def _encode(self, text: str):
        """Ids of text without lone surrogates, in any array or list."""

    def _go_on(self, text: str, after: str):
        """Ids of text that comes after other text of its document."""
        return self._encode(text)

    @abstractmethod
    def _encode_with_offsets(self, text: str):
        """(ids, pairs of characters) of text without lone surrogates, in any arrays or lists."""

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> str:
        """Text of ids that are in range and not special."""


class Prefixed(Tokenizer):
    """A tokenizer that may put a space before a text, which is right only where a document begins."""

    @cached_property
    @abstractmethod
    def _bare(self):
        """The model without that; None where it puts none."""

    @cached_property
    @abstractmethod
    def _strips(self) -> bool:
        """Whether spaces at the end of a text give no tokens, so that the next space must come from the prefix."""

    @abstractmethod
    def _encode_with(self, model, text: str) -> list[int]:
        """`_encode` by another of its models."""

    def _go_on(self, text: str, after: str):
        if self._bare is None:
            return self._encode(text)
        if not self._strips:
            return self._encode_with(self._bare, text)
        if self._is_gap(after[-1]) or self._is_gap(text[:1]):
            return self._encode(text)  # its prefix is the space between the two
        gap = 0
        while gap < len(text) and not self._is_gap(text[gap]):
            gap += 1
        return [*self._encode_with(self._bare, text[:gap]), *self._encode(text[gap:])]

    def _is_gap(self, character: str) -> bool:
        """Whether the model takes a character for a space, and so drops it at an end. A newline is unknown to some."""
        return character.isspace() and self._encode(f"a{character}") == self._encode("a")


def replace_surrogates(text: str) -> tuple[str, int]:
    """The text with U+FFFD for each lone surrogate, which UTF-8 can't write, and how many there were."""
    if text.isascii():
        return (text, 0)
    return re.subn("[\ud800-\udfff]", "\ufffd", text)
