"""Text to token ids and back: sentencepiece, UTF-8 bytes, characters, or Hugging Face's tokenizer.json."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from jaxlm.data import store
from jaxlm.data.words import SPLITS, text_of, word_spans, words_in
from jaxlm.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """What every tokenizer offers. Ids are int32, from 0 to vocab_size - 1.

    Attributes: `name` (a key of TOKENIZERS), `filename` (what to call `to_bytes()` on disk), `vocab_size`, `bos_id`
    and `eos_id` (None where there is no such token; one token may be both), `unknown_id` (what text that has no token
    becomes, None where there is no such token).
    """

    name: str
    filename: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    unknown_id: int | None = None

    def encode(self, text: str) -> np.ndarray:
        """The int32 ids of `text`, without special tokens. A lone surrogate is read as U+FFFD."""
        return np.asarray(self._encode(replace_surrogates(text)[0]), dtype=np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(`encode(text)`, int64 [tokens, 2]: the first character of `text` that a token stands for, and one past
        the last).

        Neither column decreases. Tokens that spell one character together all have that character. A token that stands
        for no character, such as a space that the tokenizer adds, has an empty stretch.
        """
        ids, offsets = self._encode_with_offsets(replace_surrogates(text)[0])
        offsets = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        return np.asarray(ids, dtype=np.int32), np.maximum.accumulate(offsets, axis=0)

    def decode(self, ids) -> str:
        """The text of `ids`, an array or list of any shape. Never raises: special tokens and ids that are out of range
        (a model's vocabulary may be padded) give nothing, bytes that are not UTF-8 give U+FFFD."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        special = [i for i in (self.bos_id, self.eos_id) if i is not None]
        return self._decode(ids[(ids >= 0) & (ids < self.vocab_size) & ~np.isin(ids, special)])

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

    @abstractmethod
    def _encode_with_offsets(self, text: str):
        """(ids, pairs of characters) of text without lone surrogates, in any arrays or lists."""

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> str:
        """Text of ids that are in range and not special."""


class Bytes(Tokenizer):
    """The UTF-8 bytes of the text, and 256 as beginning and end of text."""

    name, filename = "bytes", "tokenizer.json"
    vocab_size, bos_id, eos_id = 257, 256, 256

    def __init__(self, data: bytes = b""):
        del data  # there is nothing to configure

    def to_bytes(self) -> bytes:
        return json.dumps({"jaxlm": self.name}).encode()

    def _encode(self, text: str):
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def _encode_with_offsets(self, text: str):
        ids = self._encode(text)
        continues = (ids & 0xC0) == 0x80  # in UTF-8 every byte of a character but its first
        character = np.cumsum(~continues) - 1
        return ids, np.stack([character, character + 1], axis=1)

    def _decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class Chars(Tokenizer):
    """One id per distinct character, in the order of code points; no special tokens."""

    name, filename = "chars", "tokenizer.json"

    def __init__(self, data: bytes):
        self.characters = json.loads(data)["characters"]
        self.vocab_size = len(self.characters)
        self._points = _code_points(self.characters)

    def to_bytes(self) -> bytes:
        return json.dumps({"jaxlm": self.name, "characters": self.characters}).encode()

    def _encode(self, text: str):
        points = _code_points(text)
        ids = np.searchsorted(self._points, points).clip(max=self.vocab_size - 1)
        unknown = self._points[ids] != points
        if unknown.any():
            names = ", ".join(repr(chr(point)) for point in np.unique(points[unknown])[:10])
            raise DataError(
                f"characters that this tokenizer has not seen: {names}; prepare the data again with them in the "
                f"text, or use --tokenizer=bytes"
            )
        return ids

    def _encode_with_offsets(self, text: str):
        character = np.arange(len(text))
        return self._encode(text), np.stack([character, character + 1], axis=1)

    def _decode(self, ids: np.ndarray) -> str:
        return self._points[ids].tobytes().decode("utf-32-le")


class Words(Tokenizer):
    """Words; id 0 stands for those that it does not know. jaxlm/data/words.py says what is a word.

    A file of an earlier version does not say how words are split: they are what stands between white space.
    """

    name, filename = "words", "tokenizer.json"
    UNKNOWN = "<unk>"
    unknown_id = 0

    def __init__(self, data: bytes):
        content = json.loads(data)
        self.split = content.get("split", "spaces")
        if self.split not in SPLITS:
            raise ValueError(f"it splits words at {self.split!r}; this version knows {', '.join(SPLITS)}")
        self.words = [self.UNKNOWN, *content["words"]]
        self.vocab_size = len(self.words)
        self._ids = {word: i for i, word in enumerate(self.words)}

    def to_bytes(self) -> bytes:
        content = {"jaxlm": self.name, "words": self.words[1:]}
        if self.split != "spaces":  # so that the files of earlier versions keep their bytes
            content["split"] = self.split
        return json.dumps(content).encode()

    def _encode(self, text: str):
        return [self._ids.get(word, 0) for word in words_in(text, self.split)]

    def _encode_with_offsets(self, text: str):
        return self._encode(text), word_spans(text, self.split)

    def _decode(self, ids: np.ndarray) -> str:
        return text_of([self.words[i] for i in ids], self.split)


class SentencePiece(Tokenizer):
    """A sentencepiece model: one trained here, or anyone's .model file."""

    name, filename = "sentencepiece", "tokenizer.model"

    def __init__(self, data: bytes):
        if not data:
            raise ValueError("the file is empty")  # sentencepiece would say so only when it is first used
        self._data = data
        self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.vocab_size = self._model.get_piece_size()
        bos, eos = (i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        self.bos_id, self.eos_id = eos if bos is None else bos, eos
        self.unknown_id = self._model.unk_id()
        # sentencepiece writes a space as U+2581, so that U+2581 itself would come back as a space: it goes in as bytes.
        space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        lossless = self.unknown_id not in space and self._model.normalize("a") == "a"
        self._space = space if lossless else None

    def to_bytes(self) -> bytes:
        return self._data

    def _encode(self, text: str):
        if self._space is None or "\u2581" not in text:
            return self._model.encode(text)
        first, *rest = (self._model.encode(part) for part in text.split("\u2581"))
        return first + [i for part in rest for i in self._space + part]

    def _encode_with_offsets(self, text: str):
        parts = [text]
        if self._space is not None:
            parts = text.split("\u2581")
        ids, offsets = [], []
        begin = 0
        for number, part in enumerate(parts):
            if number:
                ids += self._space
                offsets += [(begin, begin + 1)] * len(self._space)
                begin += 1
            found, places = self._offsets_of_part(part)
            ids += found
            offsets += [(begin + first, begin + last) for first, last in places]
            begin += len(part)
        return ids, offsets

    def _offsets_of_part(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._model.encode(text, return_type="offset_mapping")
        offsets = list(found["offsets"])
        # Of several pieces that spell one character, sentencepiece gives it to the last: the others get it from there.
        for i in reversed(range(len(offsets) - 1)):
            begin, end = offsets[i]
            is_text = found["pieces"][i].strip("\u2581")
            if begin == end and is_text and offsets[i + 1][0] == begin:
                offsets[i] = offsets[i + 1]
        return list(found["ids"]), offsets

    def _decode(self, ids: np.ndarray) -> str:
        return self._model.decode(ids[ids != self.unknown_id].tolist())


class HuggingFace(Tokenizer):
    """Hugging Face's tokenizer.json. Special tokens that are spelled out in a text are read as plain text."""

    name, filename = "huggingface", "tokenizer.json"
    # Where the post processor does not say which special token is which, these are looked for, in this order.
    BOS = (
        "<|begin_of_text|>",
        "<|startoftext|>",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<s>",
        "<bos>",
        "[CLS]",
        "[BOS]",
        END_OF_TEXT,
    )
    EOS = (
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
    )

    def __init__(self, data: bytes):
        try:
            import tokenizers
        except ImportError:
            raise ConfigError('reading a Hugging Face tokenizer.json needs: pip install -e ".[hf]"') from None
        self._data = data
        self._model = tokenizers.Tokenizer.from_str(data.decode())
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        ids = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1  # ids may have gaps
        content = json.loads(data)
        bos, eos = _around_the_text(content.get("post_processor"))
        marked = _special_tokens(content)
        # A file that marks nothing as special leaves only the names to go by.
        candidates = marked or ids
        if bos not in ids:
            bos = _first_of(self.BOS, candidates)
        if eos not in ids:
            eos = _first_of(self.EOS, candidates)
        self.bos_id = ids.get(bos)
        self.eos_id = ids.get(eos)
        self.unknown_id = _unknown_id(content["model"], ids)

    def to_bytes(self) -> bytes:
        return self._data

    def _encode(self, text: str):
        return self._model.encode(text, add_special_tokens=False).ids

    def _encode_with_offsets(self, text: str):
        encoding = self._model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _decode(self, ids: np.ndarray) -> str:
        return self._model.decode(ids.tolist(), skip_special_tokens=True)


def _first_of(words: Iterable[str], candidates: Collection[str]) -> str | None:
    return next((word for word in words if word in candidates), None)


def _special_tokens(content: dict) -> set[str]:
    """The added tokens that a tokenizer.json marks as special."""
    added = content.get("added_tokens") or []
    return {token["content"] for token in added if token["special"]}


def _unknown_id(model: dict, ids: dict[str, int]) -> int | None:
    """What a tokenizer.json's model writes for text that it has no token for: by its word, or (Unigram) by its id."""
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return ids.get(model.get("unk_token"))


def _around_the_text(processor: dict | None) -> tuple[str | None, str | None]:
    """The tokens that a tokenizer.json's post processor puts before and after one text, None where it puts none."""
    kind = processor["type"] if processor else None
    if kind == "TemplateProcessing":
        return _around_the_template(processor)
    if kind in ("BertProcessing", "RobertaProcessing"):
        return processor["cls"][0], processor["sep"][0]
    before, after = None, None
    if kind == "Sequence":
        for part in processor["processors"]:
            first, last = _around_the_text(part)
            before = before or first
            after = after or last
    return before, after


def _around_the_template(processor: dict) -> tuple[str | None, str | None]:
    """The first special token on each side of the text."""
    before, after = [], []
    side = before
    for piece in processor["single"]:
        if "Sequence" in piece:
            side = after
        else:
            name = piece["SpecialToken"]["id"]
            side += processor["special_tokens"][name]["tokens"]
    return next(iter(before), None), next(iter(after), None)


TOKENIZERS = {kind.name: kind for kind in (SentencePiece, Bytes, Chars, Words, HuggingFace)}


def from_bytes(name: str, data: bytes) -> Tokenizer:
    """The tokenizer whose `name` and `to_bytes()` these are.

    Raises: ConfigError for an unknown name, DataError where the bytes are broken.
    """
    if name not in TOKENIZERS:
        raise ConfigError(f"no tokenizer is called {name!r}; there are {', '.join(TOKENIZERS)}")
    try:
        return TOKENIZERS[name](data)
    except (ConfigError, DataError):
        raise
    except Exception as error:  # each library has its own, down to bare Exception in `tokenizers`
        raise DataError(
            f"{len(data):,} bytes that should be a {name} tokenizer can't be read as one: the file is truncated, "
            f"corrupt or of another kind ({type(error).__name__}); copy or make it again"
        ) from error


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a prepared or a run directory, or of a file: sentencepiece's .model, Hugging Face's, our .json.

    Raises: DataError that says which file is missing, changed or broken.
    """
    path = Path(path)
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):  # of a run
            if not (path / store.MANIFEST).exists() and (path / name).is_file():
                return _read(path / name)
        entry = store.load_manifest(path)["tokenizer"]
        tokenizer = _read(store.inside(path, entry["file"]), entry["name"])
        if tokenizer.fingerprint != entry["sha256"]:
            raise DataError(f"{path / entry['file']} is not the tokenizer that the data was prepared with (SHA-256)")
        # Data that an earlier version prepared keep the begin and the end that they were written with.
        tokenizer.bos_id = entry["bos_id"]
        tokenizer.eos_id = entry["eos_id"]
        return tokenizer
    return _read(path)


def _read(path: Path, name: str | None = None) -> Tokenizer:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the tokenizer {path} can't be read: {error.strerror}") from None
    try:
        if name is None:
            name = json.loads(data).get("jaxlm", HuggingFace.name) if path.suffix == ".json" else SentencePiece.name
        return from_bytes(name, data)
    except ConfigError:
        raise
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a tokenizer: {error}") from None


def replace_surrogates(text: str) -> tuple[str, int]:
    """The text with U+FFFD for each lone surrogate, which UTF-8 can't write, and how many there were."""
    return (text, 0) if text.isascii() else re.subn("[\ud800-\udfff]", "\ufffd", text)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
