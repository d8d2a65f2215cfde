"""Text to token ids and back: sentencepiece, UTF-8 bytes, characters, or Hugging Face's tokenizer.json."""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from jaxlm.data import store
from jaxlm.data.tokenization import specials, tokenizer_json
from jaxlm.data.tokenization.base import Prefixed, Tokenizer
from jaxlm.data.tokenization.specials import END_OF_TEXT
from jaxlm.data.tokenization.words import SPLITS, text_of, word_spans, words_in
from jaxlm.errors import ConfigError, DataError

# Looked for in a folder, in this order.
HUB_NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
OTHER_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json")  # not read


class Bytes(Tokenizer):
    """The UTF-8 bytes of the text, and 256 as beginning and end of text."""

    name = "bytes"
    filename = "tokenizer.json"
    vocab_size = 257
    bos_id = 256
    eos_id = 256

    def __init__(self, data: bytes = b""):
        del data  # there is nothing to configure

    def to_bytes(self) -> bytes:
        return json.dumps({"jaxlm": self.name}).encode()

    def token(self, id_: int) -> str | None:
        if id_ == self.eos_id:
            return END_OF_TEXT
        if 0 <= id_ < 256:
            return f"<0x{id_:02X}>"
        return None

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

    name = "chars"
    filename = "tokenizer.json"

    def __init__(self, data: bytes):
        self.characters = json.loads(data)["characters"]
        self.vocab_size = len(self.characters)
        self._points = _code_points(self.characters)

    def to_bytes(self) -> bytes:
        return json.dumps({"jaxlm": self.name, "characters": self.characters}).encode()

    def token(self, id_: int) -> str | None:
        if 0 <= id_ < self.vocab_size:
            return self.characters[id_]
        return None

    def _encode(self, text: str):
        points = _code_points(text)
        ids = np.searchsorted(self._points, points).clip(max=self.vocab_size - 1)
        unknown = self._points[ids] != points
        if unknown.any():
            names = ", ".join(map(repr, map(chr, np.unique(points[unknown])[:10])))
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
    """Words; id 0 stands for those that it does not know. jaxlm/data/tokenization/words.py says what is a word.

    A file of an earlier version does not say how words are split: they are what stands between white space.
    """

    name = "words"
    filename = "tokenizer.json"
    UNKNOWN = "<unk>"
    unknown_id = 0

    def __init__(self, data: bytes):
        content = json.loads(data)
        self.split = content.get("split", "spaces")
        if self.split not in SPLITS:
            raise ValueError(
                f"it splits words at {self.split!r}; this version knows {', '.join(SPLITS)}"
            )
        self.words = [self.UNKNOWN, *content["words"]]
        self.vocab_size = len(self.words)
        self._ids = {word: i for i, word in enumerate(self.words)}

    def to_bytes(self) -> bytes:
        content = {"jaxlm": self.name, "words": self.words[1:]}
        if self.split != "spaces":  # so that the files of earlier versions keep their bytes
            content["split"] = self.split
        return json.dumps(content).encode()

    def token(self, id_: int) -> str | None:
        if 0 <= id_ < self.vocab_size:
            return self.words[id_]
        return None

    def lost(self, text: str) -> list[str]:
        return [word for word in words_in(text, self.split) if word not in self._ids]

    def _encode(self, text: str):
        return [self._ids.get(word, self.unknown_id) for word in words_in(text, self.split)]

    def _encode_with_offsets(self, text: str):
        return self._encode(text), word_spans(text, self.split)

    def _decode(self, ids: np.ndarray) -> str:
        return text_of([self.words[i] for i in ids], self.split)


class SentencePiece(Prefixed):
    """A sentencepiece model: one trained here, or anyone's .model file."""

    name = "sentencepiece"
    filename = "tokenizer.model"
    # Appended to a model, which is a protobuf message: of two values of a field the last counts.
    # ModelProto.normalizer_spec (3) { add_dummy_prefix (3): false }, as in sentencepiece_model.proto.
    NO_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(self, data: bytes):
        if not data:  # sentencepiece would say so only when it is first used
            raise ValueError("the file is empty")
        self._data = data
        self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.vocab_size = self._model.get_piece_size()
        # Ids below 0 are of no token.
        if self._model.eos_id() >= 0:
            self.eos_id = self._model.eos_id()
        self.bos_id = self.eos_id
        if self._model.bos_id() >= 0:
            self.bos_id = self._model.bos_id()
        self.unknown_id = self._model.unk_id()
        bare = self._bare or self._model
        # sentencepiece writes a space as U+2581, so that U+2581 itself would come back as a space: it goes in as bytes.
        space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        lossless = self.unknown_id not in space and bare.normalize("a") == "a"
        self._space = space if lossless else None

    @cached_property
    def _bare(self):
        if self._model.normalize("a") == "a":
            return None
        return sentencepiece.SentencePieceProcessor(model_proto=self._data + self.NO_PREFIX)

    @cached_property
    def _strips(self) -> bool:
        return self._model.normalize("a ") == self._model.normalize("a")

    def to_bytes(self) -> bytes:
        return self._data

    def token(self, id_: int) -> str | None:
        if 0 <= id_ < self.vocab_size:
            return self._model.id_to_piece(id_)
        return None

    @cached_property
    def special_ids(self) -> set[int]:
        return set(filter(self._model.is_control, range(self.vocab_size)))

    def lost(self, text: str) -> list[str]:
        ids = self._model.encode(text, out_type=int)
        pieces = self._model.encode(text, out_type=str)  # of what is unknown, the text itself
        pairs = zip(ids, pieces, strict=True)
        return [piece for id_, piece in pairs if id_ == self.unknown_id]

    def _encode(self, text: str):
        return self._encode_with(self._model, text)

    def _encode_with(self, model, text: str):
        if self._space is None or "\u2581" not in text:
            return model.encode(text)
        first, *rest = text.split("\u2581")
        ids = model.encode(first)
        for part in rest:
            ids += self._space + (self._bare or self._model).encode(part)
        return ids

    def _encode_with_offsets(self, text: str):
        parts = [text]
        if self._space is not None:
            parts = text.split("\u2581")
        ids = []
        offsets = []
        begin = 0
        model = self._model
        for number, part in enumerate(parts):
            if number:
                model = self._bare or self._model
                ids += self._space
                offsets += [(begin, begin + 1)] * len(self._space)
                begin += 1
            found, places = self._offsets_of_part(model, part)
            ids += found
            offsets += [(begin + first, begin + last) for first, last in places]
            begin += len(part)
        return ids, offsets

    def _offsets_of_part(self, model, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = model.encode(text, return_type="offset_mapping")
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


class HuggingFace(Prefixed):
    """Hugging Face's tokenizer.json. Special tokens that are spelled out in a text are read as plain text."""

    name = "huggingface"
    filename = "tokenizer.json"

    def __init__(self, data: bytes):
        self._data = data
        self._model = self._read_model(data.decode())
        ids = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1  # ids may have gaps
        content = json.loads(data)
        specials.of_tokenizer_json(content, ids, self)
        self._added = {token["id"]: token["content"] for token in content.get("added_tokens") or []}
        special = tokenizer_json.special_tokens(content) & ids.keys()
        self._special = set(map(ids.get, special))
        self.unknown_id = tokenizer_json.unknown_id(content["model"], ids)
        self._drops = tokenizer_json.drops_text(content, ids)

    def _read_model(self, content: str):
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                'reading a Hugging Face tokenizer.json needs: pip install -e ".[hf]"'
            ) from None
        model = tokenizers.Tokenizer.from_str(content)
        model.encode_special_tokens = True
        model.no_truncation()
        model.no_padding()
        return model

    @cached_property
    def _bare(self):
        content = json.loads(self._data)
        normalizer = tokenizer_json.without_prefix(content.get("normalizer"))
        splitter = tokenizer_json.without_prefix(content.get("pre_tokenizer"))
        if (normalizer, splitter) == (content.get("normalizer"), content.get("pre_tokenizer")):
            return None
        return self._read_model(
            json.dumps({**content, "normalizer": normalizer, "pre_tokenizer": splitter})
        )

    @cached_property
    def _strips(self) -> bool:
        return self._encode("a ") == self._encode("a")

    def to_bytes(self) -> bytes:
        return self._data

    def token(self, id_: int) -> str | None:
        if id_ in self._added:
            return self._added[id_]  # the library writes some with a space before them
        if 0 <= id_ < self.vocab_size:
            return self._model.id_to_token(id_)
        return None

    def token_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    @property
    def special_ids(self) -> set[int]:
        return self._special

    def may_lose(self, ids: np.ndarray) -> bool:
        return self._drops or super().may_lose(ids)

    def lost(self, text: str) -> list[str]:
        encoding = self._model.encode(text, add_special_tokens=False)
        known = np.zeros(len(text), bool)
        unknown = {}  # stretches, each once
        for id_, (start, stop) in zip(encoding.ids, encoding.offsets):
            if id_ == self.unknown_id:
                unknown[start, stop] = text[start:stop]
            else:
                known[start:stop] = True
        if not self._drops:
            return list(unknown.values())
        # White space is often dropped on purpose: whether it comes back is another question.
        dropped = np.flatnonzero(~known).tolist()
        return [text[place] for place in dropped if not text[place].isspace()]

    def _encode(self, text: str):
        return self._encode_with(self._model, text)

    def _encode_with(self, model, text: str):
        try:
            return model.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library has no narrower one
            raise DataError(
                f"this tokenizer can't write {text[:40]!r}: {error}; it has no token for what it doesn't know: give "
                "another --tokenizer"
            ) from None

    def _encode_with_offsets(self, text: str):
        encoding = self._model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _decode(self, ids: np.ndarray) -> str:
        return self._model.decode(ids.tolist(), skip_special_tokens=True)


TOKENIZERS = {
    "sentencepiece": SentencePiece,
    "bytes": Bytes,
    "chars": Chars,
    "words": Words,
    "huggingface": HuggingFace,
}


def from_bytes(name: str, data: bytes) -> Tokenizer:
    """The tokenizer whose `name` and `to_bytes()` these are.

    Raises ConfigError for an unknown name, DataError where the bytes are broken.
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
    """The tokenizer of a prepared directory, of a run, of a folder as downloaded from a hub, or of a file:
    sentencepiece's .model, Hugging Face's, our .json.

    Raises DataError that says which file is missing, changed or broken.
    """
    path = Path(path)
    if not path.is_dir():
        return _with_ids(_read(path), path)
    if not (path / store.MANIFEST).exists():
        return _load_from_hub_folder(path)
    entry = store.load_manifest(path)["tokenizer"]
    tokenizer = _read(store.inside(path, entry["file"]), entry["name"])
    if tokenizer.fingerprint != entry["sha256"]:
        raise DataError(
            f"{path / entry['file']} is not the tokenizer that the data was prepared with (SHA-256)"
        )
    # Data that an earlier version prepared keep the begin and the end that they were written with.
    specials.put_ids(tokenizer, entry)
    return tokenizer


def _load_from_hub_folder(path: Path) -> Tokenizer:
    for name in HUB_NAMES:
        if (path / name).is_file():
            return _with_ids(_read(path / name), path / name)
    _refuse_folder(path)


def _with_ids(tokenizer: Tokenizer, file: Path) -> Tokenizer:
    """The tokenizer of a file, with the begin and the end that what lies beside it says."""
    folder = file.parent
    ids = specials.read_ids(folder)
    if ids:
        specials.put_ids(tokenizer, ids)
        return tokenizer
    config = specials.config_of_a_run(folder)
    if config is not None:
        specials.of_an_older_run(tokenizer, config)
    elif isinstance(tokenizer, Prefixed):
        specials.of_files(tokenizer, folder)
    return tokenizer


def _refuse_folder(path: Path) -> None:
    """Raises DataError: a folder has no tokenizer that can be read."""
    names = {file.name for file in path.iterdir() if file.is_file()}
    known = [name for name in OTHER_VOCABULARIES if name in names]
    if known or not names.isdisjoint(specials.FILES):  # of a hub
        there = f"it has {' and '.join(known)}, but " if known else ""
        raise DataError(
            f"{path} has no tokenizer that can be read: {there}none of {', '.join(HUB_NAMES)}; download one, or make "
            f"tokenizer.json with: python -c 'import transformers as t; "
            f't.AutoTokenizer.from_pretrained("{path}").save_pretrained("{path}")\''
        )
    raise DataError(
        f"{path} has no tokenizer: none of {', '.join(HUB_NAMES)}, nor the {store.MANIFEST} of prepared data"
    )


def _read(path: Path, name: str | None = None) -> Tokenizer:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the tokenizer {path} can't be read: {error.strerror}") from None
    try:
        return from_bytes(name or _kind_of_file(path, data), data)
    except ConfigError:
        raise
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a tokenizer: {error}") from None


def _kind_of_file(path: Path, data: bytes) -> str:
    """The name of the tokenizer in a file. Raises ValueError or AttributeError where a .json is none."""
    if path.suffix == ".json":
        return json.loads(data).get("jaxlm", HuggingFace.name)
    return SentencePiece.name


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
