"""A prepared directory: token shards that are written once and then read at random through memory maps.

    manifest.json  tokenizer.model or .json  train-00000.tokens  train-00000.offsets  ...  val-00000.tokens  ...

`.tokens` is flat little-endian uint16 (uint32 where the vocabulary is larger than 65,536). `.offsets` is little-endian
int64: the positions in the shard at which a document starts. A document is its tokens, then the tokenizer's end of text
where it has one, and may go on in the next shard. A split is one stream: its shards in order. manifest.json, written
last, has the sizes and hashes of all of it.
"""

import bisect
import hashlib
import json
import mmap
import os
import shlex
from pathlib import Path

import numpy as np

from jaxlm.cli import near_path
from jaxlm.errors import ConfigError, DataError

VERSION = 1
MANIFEST = "manifest.json"
PAIRS = "pairs"  # how the folders begin that jaxlm.data.pairs keeps beside the shards
KEYS = set("version input options sources splits shards counts tokenizer dtype".split())
SHOWN = 10  # problems
OFFSET = np.dtype("<i8")


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def load_manifest(path: str | Path) -> dict:
    """The manifest of a prepared directory. Raises DataError where there is none, or not one that can be used."""
    file = Path(path) / MANIFEST
    command = f"python -m jaxlm.data.prepare --input=... --output={path}"
    try:
        manifest = json.loads(file.read_bytes())
        if KEYS - manifest.keys():
            raise KeyError
        if manifest["version"] != VERSION:
            raise DataError(
                f"{file} has format version {manifest['version']}, this jaxlm reads {VERSION}; make it again with "
                f"`{command} --overwrite`"
            )
        return manifest
    except OSError as error:
        if Path(path).is_file():
            raise DataError(
                f"{path} is a file; needed is a directory that jaxlm.data.prepare has made"
            ) from None
        why = f"{file}: {error.strerror}{near_path(path)}"
        raise DataError(f"{path} is not prepared data: {why}; make it with `{command}`") from None
    except (ValueError, KeyError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file} is truncated or corrupt; make it again with `{command} --overwrite`"
        ) from None


def inside(directory: Path, name: str) -> Path:
    """directory / name, where a manifest may only name files that lie directly in its directory."""
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise DataError(
            f"{directory / MANIFEST} names {name!r}, which is not a file of that directory"
        )
    return directory / name


def broken_files(directory: Path, shards: list[dict]) -> list[str]:
    """What is missing or not as long as it should be, a line for each file."""
    lines = []
    for shard in shards:
        for kind in ("tokens", "offsets"):
            file = inside(directory, f"{shard['file']}.{kind}")
            want = shard[f"{kind}_bytes"]
            have = file.stat().st_size if file.is_file() else None
            if have is None:
                lines.append(f"{file} is missing")
            elif have != want:
                lines.append(f"{file} has {have:,} bytes instead of {want:,}")
    return lines


class Store:
    """One split of a prepared directory, as a flat stream of tokens. Opens a shard when it is first read.

    Attributes: `path`, `split`, `manifest`, `num_tokens`, `num_documents`, `num_bytes` (UTF-8 bytes of the text,
    without end of text), `vocab_size`, `bos_id`, `eos_id` (None where there is none), `fingerprint` (SHA-256, in hex,
    over the tokenizer and the shards of the split). Raises ConfigError for an unknown split, DataError that lists
    every file that is missing or has the wrong size.
    """

    def __init__(self, path: str | Path, split: str):
        self.path = Path(path)
        self.split = split
        self.manifest = manifest = load_manifest(path)
        if split not in manifest["splits"]:
            raise ConfigError(
                f"{path} has no split {split!r}; it has {', '.join(manifest['splits'])}"
            )
        self._shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        self._refuse(broken_files(self.path, self._shards))
        totals = manifest["splits"][split]
        tokenizer = manifest["tokenizer"]
        self.num_tokens = totals["tokens"]
        self.num_documents = totals["documents"]
        self.num_bytes = totals["bytes"]
        self.vocab_size = tokenizer["vocab_size"]
        self.bos_id = tokenizer["bos_id"]
        self.eos_id = tokenizer["eos_id"]
        hashes = tokenizer["sha256"]
        self._bounds = [0]  # where each shard begins in the stream, and the last one ends
        for shard in self._shards:
            hashes += shard["tokens_sha256"] + shard["offsets_sha256"]
            self._bounds.append(self._bounds[-1] + shard["tokens"])
        self.fingerprint = hashlib.sha256(hashes.encode()).hexdigest()
        self._tokens: list[np.ndarray | None] = [None] * len(self._shards)
        self._offsets: list[np.ndarray | None] = [None] * len(self._shards)

    def __reduce__(self):  # a memory map would be pickled as a copy of all its tokens
        return Store, (self.path, self.split)

    def verify(self) -> None:
        """Reads everything. Raises DataError that lists each file whose SHA-256 is not the manifest's."""
        bad = []
        for shard in self._shards:
            for kind in ("tokens", "offsets"):
                with open(self.path / f"{shard['file']}.{kind}", "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard[f"{kind}_sha256"]:
                        bad.append(f"{file.name} has changed since it was written (SHA-256)")
        self._refuse(bad)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream, int32. Raises IndexError outside of the stream."""
        return self.rows(np.array([start]), length)[0]

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens from each of `starts` [b]: int32 [b, length]. Raises IndexError outside of the stream."""
        if len(starts) and not 0 <= starts.min() <= starts.max() <= self.num_tokens - length:
            raise IndexError(
                f"{length} tokens from each of {starts.min()} ... {starts.max()}: {self.path} has {self.num_tokens}"
            )
        rows = np.empty((len(starts), length), np.int32)
        for row, start in zip(rows, starts.tolist()):
            shard = bisect.bisect_right(self._bounds, start) - 1
            done = 0
            while done < length:
                begin = start + done - self._bounds[shard]
                piece = self._shard(shard)[begin : begin + length - done]
                row[done : done + len(piece)] = piece
                done += len(piece)
                shard += 1
        return rows

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """The positions in [start, stop) of the stream at which a document begins, in order: int64."""
        return start + self.starts_in(np.array([start]), stop - start)[1]

    def starts_in(self, windows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(number of the window, place in it) of every document that begins in one of [window, window + length).

        windows: int64 [b], anywhere. Both are int64, windows in their order and places rising in each.
        """
        numbers = [np.empty(0, np.int64)]
        places = [np.empty(0, np.int64)]
        first = np.searchsorted(self._bounds, windows, "right") - 1
        end = np.searchsorted(self._bounds, windows + length)
        most = (end - first).max(initial=0)  # shards of any window
        shards = np.unique(first[:, None] + np.arange(most))
        for shard in shards[(shards >= 0) & (shards < len(self._shards))].tolist():
            number, place = self._starts_in_shard(shard, windows, length)
            numbers.append(number)
            places.append(place)
        number = np.concatenate(numbers)
        place = np.concatenate(places)
        if len(numbers) > 2:
            order = np.argsort(number, kind="stable")
            number = number[order]
            place = place[order]
        return number, place

    def _starts_in_shard(
        self, shard: int, windows: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`starts_in` of one shard alone."""
        begin, end = self._bounds[shard : shard + 2]
        near = np.flatnonzero((windows < end) & (windows + length > begin))
        offsets = self._shard_offsets(shard)
        low = np.searchsorted(offsets, windows[near] - begin)
        high = np.searchsorted(offsets, windows[near] + length - begin)
        counts = high - low
        number = np.repeat(near, counts)
        index = np.arange(len(number)) + np.repeat(low - np.cumsum(counts) + counts, counts)
        return number, offsets[index] + begin - windows[number]

    def _shard_offsets(self, index: int) -> np.ndarray:
        if self._offsets[index] is None:
            self._offsets[index] = self._map(f"{self._shards[index]['file']}.offsets", OFFSET)
        return self._offsets[index]

    def _shard(self, index: int) -> np.ndarray:
        if self._tokens[index] is None:
            self._tokens[index] = self._map(
                f"{self._shards[index]['file']}.tokens", np.dtype(self.manifest["dtype"])
            )
        return self._tokens[index]

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        # mmap and not np.memmap, whose slices cost 4 us each
        with open(self.path / name, "rb") as file:
            if not os.fstat(file.fileno()).st_size:  # mmap refuses empty files
                return np.zeros(0, dtype)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(data, dtype)

    def _refuse(self, problems: list[str]) -> None:
        """Raises DataError where there are problems, with the command that makes the data again."""
        if not problems:
            return
        shown = problems[:SHOWN]
        if len(problems) > SHOWN:
            shown.append(f"and {len(problems) - SHOWN} more")
        inputs = [f"--input={pattern}" for pattern in self.manifest["input"]]
        command = shlex.join([*inputs, f"--output={self.path}"])
        raise DataError(
            "\n  ".join([f"the data in {self.path} is damaged:", *shown])
            + f"\ncopy it again, or make it again with `python -m jaxlm.data.prepare {command} --overwrite` and the "
            "same other options"
        )


class ShardWriter:
    """Writes `stem`.tokens and `stem`.offsets."""

    def __init__(self, stem: Path, dtype: np.dtype):
        self._dtype = dtype
        self._tokens = _HashedFile(f"{stem}.tokens")
        self._offsets = _HashedFile(f"{stem}.offsets")
        self._count = 0
        self._documents = 0
        self._bytes = 0

    def add(self, tokens: np.ndarray, num_bytes: int, starts_document: bool) -> None:
        """Appends tokens, which stand for `num_bytes` bytes of text."""
        if starts_document:
            self._offsets.write(self._count.to_bytes(OFFSET.itemsize, "little"))
            self._documents += 1
        self._tokens.write(tokens.astype(self._dtype).tobytes())
        self._count += len(tokens)
        self._bytes += num_bytes

    def close(self) -> dict:
        """The shard's entry in the manifest, without its name and split."""
        tokens = self._tokens.close()
        offsets = self._offsets.close()
        return {
            "tokens": self._count,
            "documents": self._documents,
            "bytes": self._bytes,
            "tokens_bytes": tokens["bytes"],
            "tokens_sha256": tokens["sha256"],
            "offsets_bytes": offsets["bytes"],
            "offsets_sha256": offsets["sha256"],
        }


class _HashedFile:
    def __init__(self, path: str):
        self._file = open(path, "wb")  # noqa: SIM115 (close() closes it)
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def close(self) -> dict:
        size = self._file.tell()
        self._file.close()
        return {"bytes": size, "sha256": self._hash.hexdigest()}
