"""The vectors of words: which are near a word, and what is to c as b is to a."""

import logging

import numpy as np

from jaxlm.cli import did_you_mean
from jaxlm.data.tokenization.tokenizer import Tokenizer, Words
from jaxlm.errors import UserError

# Tokenizers whose tokens are neither words nor parts of words with the space before them.
SPELLED = ("bytes", "chars")


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors [..., D] of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


class Neighbors:
    """The vectors of a vocabulary. table_VD: a row for each token of the tokenizer, of any dtype and length.

    where: the call that errors and warnings name.
    """

    def __init__(self, table_VD: np.ndarray, tokenizer: Tokenizer, where: str):
        self.table_VD = unit(table_VD[: tokenizer.vocab_size].astype(np.float32))
        self.tokenizer = tokenizer
        self.where = where

    def ids_of(self, word: str) -> np.ndarray:
        """The tokens of a word. Where it is fewer of them after a space, as most are to sentencepiece, these are meant.

        Raises UserError where it is not in the vocabulary; warns where it is several tokens.
        """
        if self.tokenizer.name in SPELLED:
            texts = (word,)
        else:
            texts = (word, f" {word}")
        ids = min(map(self.tokenizer.encode, texts), key=len)
        unknown = self.tokenizer.unknown_id
        is_text = self.tokenizer.decode(ids).strip() or unknown in ids
        if not len(ids) or not is_text:
            raise UserError(f"{self.where}: {word!r} has no word in it")
        if unknown in ids and word != Words.UNKNOWN:
            raise UserError(f"{self.where}: {self.unknown(word)}")
        if len(ids) > 1:
            parts = ", ".join(repr(self.tokenizer.decode([i])) for i in ids)
            logging.getLogger("jaxlm").warning(
                f"{self.where}: {word!r} is {len(ids)} tokens ({parts}): the mean of their vectors is taken"
            )
        return ids

    def unknown(self, text: str) -> str:
        """What of a text is not in the vocabulary, each word with what is spelled nearly so."""
        known = ()
        if isinstance(self.tokenizer, Words):
            known = self.tokenizer.words
        hints = []
        for word in self.tokenizer.lost(text):
            hints.append(f"{word!r} is not in the vocabulary{self.near(word, known)}")
        return "; ".join(hints)

    def near(self, word: str, known) -> str:
        if word.lower() in known:
            return f"; did you mean {word.lower()}?"
        return did_you_mean(word, known)

    def vector(self, ids: np.ndarray) -> np.ndarray:
        """float32 [D], of length 1: the mean direction of tokens."""
        return unit(self.table_VD[ids].mean(axis=0))

    def nearest(self, vector_D: np.ndarray, without, count: int) -> list[tuple[str, float]]:
        """The `count` tokens of the largest cosine similarity with a vector, and that; none of `without`."""
        t = self.tokenizer
        similar_V = self.table_VD @ unit(vector_D)
        special = [i for i in (t.bos_id, t.eos_id, t.unknown_id) if i is not None]
        similar_V[[*without, *special]] = -np.inf
        found = []
        for i in np.argsort(-similar_V, kind="stable")[:count]:
            if np.isfinite(similar_V[i]):
                found.append((t.decode([i]), float(similar_V[i])))
        return found
