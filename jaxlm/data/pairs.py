"""How often words stand near each other, counted once and kept, and batches of these pairs (GloVe).

X[i, j] is the sum of 1 / distance over every place where word j stands at most task.window words from word i, on either
side, in the same document (Pennington, Socher and Manning 2014). The counts lie beside the tokens that they are of:

    pairs-train-window10-3f0c.../words      little-endian uint32 [n, 2]: i and j, in their order
                                 counts     little-endian float32 [n]: X[i, j], above 0
"""

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxlm.data.store import PAIRS, Store
from jaxlm.errors import DataError

BLOCK = 1 << 18  # tokens whose pairs are sorted at once: at a window of 10 these take about 250 MB
HELD = 1 << 25  # sums in memory, of 16 bytes; sorting takes as much again three times
WORDS = np.dtype("<u4")
COUNTS = np.dtype("<f4")
LONG = 10_000_000  # tokens that take so long that it is said before

Sums = tuple[np.ndarray, np.ndarray]  # (i x vocabulary + j, rising, int64 [n]; float64 [n])


def pairs_in(store: Store, start: int, stop: int, window: int) -> Sums:
    """The sums of the pairs whose first word is one of the tokens [start, stop) of the stream."""
    end = min(stop + window, store.num_tokens)
    ids = store.read(start, end - start).astype(np.int64)
    document = np.zeros(len(ids), np.int64)
    document[store.document_starts(start, end) - start] = 1
    document = np.cumsum(document)
    is_word = ids != (-1 if store.eos_id is None else store.eos_id)
    keys = []
    counts = []
    for distance in range(1, window + 1):
        first = np.arange(min(stop - start, len(ids) - distance))
        second = first + distance
        together = (document[first] == document[second]) & is_word[first] & is_word[second]
        left = ids[first[together]]
        right = ids[second[together]]
        keys += [left * store.vocab_size + right, right * store.vocab_size + left]
        counts.append(np.full(2 * len(left), 1 / distance))
    return summed(np.concatenate(keys), np.concatenate(counts))


def summed(keys: np.ndarray, counts: np.ndarray) -> Sums:
    """Each key once, in order, with the sum of its counts."""
    if not len(keys):
        return keys, counts
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    counts = counts[order]
    first = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    return keys[first], np.add.reduceat(counts, first)


def added(parts: list[Sums]) -> Sums:
    """The sums of several parts together."""
    keys, counts = zip(*parts, strict=True)
    return summed(np.concatenate(keys), np.concatenate(counts))


def count_pairs(
    store: Store, window: int, folder: Path, block: int = BLOCK, held: int = HELD
) -> Iterator[Sums]:
    """All sums of a split, in parts of rising keys. folder: for what does not fit into memory, `held` sums."""
    runs = []
    waiting = []
    for start in range(0, store.num_tokens, block):
        waiting.append(pairs_in(store, start, min(start + block, store.num_tokens), window))
        if sum(len(keys) for keys, _ in waiting) > held:
            waiting = [added(waiting)]
            if len(waiting[0][0]) > held // 2:  # else adding up has made room
                runs.append(put_aside(waiting.pop(), folder, len(runs)))
    if not runs:
        yield added(waiting) if waiting else (np.zeros(0, np.int64), np.zeros(0))
        return
    if waiting:
        runs.append(put_aside(added(waiting), folder, len(runs)))
    yield from merged(runs, held)


def put_aside(sums: Sums, folder: Path, number: int) -> Sums:
    """The same sums, in files."""
    mapped = []
    for name, array in zip(("keys", "sums"), sums, strict=True):
        file = folder / f"{name}-{number}.npy"
        np.save(file, array)
        mapped.append(np.load(file, mmap_mode="r"))
    return tuple(mapped)


def merged(runs: list[Sums], held: int) -> Iterator[Sums]:
    """The sums over all runs, in parts of at most `held`, of rising keys."""
    places = [0] * len(runs)
    step = max(held // len(runs), 1)
    while True:
        open_runs = [n for n, (keys, _) in enumerate(runs) if places[n] < len(keys)]
        if not open_runs:
            return
        heads = {}
        for n in open_runs:
            here = slice(places[n], places[n] + step)
            keys, counts = runs[n]
            heads[n] = (keys[here], counts[here])
        # Up to this key, every run has shown all that it has.
        last = min(int(keys[-1]) for keys, _ in heads.values())
        parts = []
        for n, (keys, counts) in heads.items():
            length = int(np.searchsorted(keys, last, side="right"))
            parts.append((keys[:length], counts[:length]))
            places[n] += length
        yield added(parts)


def kept_pairs(store: Store, window: int) -> Path:
    """The folder of a split's pairs, counted where that has not been done. Raises DataError where it can't be written.

    Several processes may count at the same time: each does it on its own, and they write the same bytes.
    """
    folder = store.path / f"{PAIRS}-{store.split}-window{window}-{store.fingerprint[:16]}"
    if folder.is_dir():
        return folder
    tokens = f"{store.num_tokens:,} tokens of {store.path} ({store.split})"
    if store.num_tokens >= LONG:
        print(
            f"counting the pairs of words in {tokens}, about a minute for every 10 million",
            file=sys.stderr,
        )
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{PAIRS}-", dir=store.path, ignore_cleanup_errors=True
        ) as work:
            number = write_pairs(store, window, Path(work))
            (Path(work) / "done").rename(folder)  # so that it is there as a whole or not at all
    except OSError as error:
        if folder.is_dir():  # another process was first
            return folder
        raise DataError(
            f"the pairs of words of {store.path} can't be kept there: {error.strerror}; task glove needs a data "
            "directory that can be written to: copy it to one"
        ) from None
    seconds = time.perf_counter() - began
    print(
        f"counted {number:,} pairs of words at most {window} apart in {tokens}, in {seconds:.1f} s; kept in {folder}",
        file=sys.stderr,
        flush=True,
    )
    return folder


def write_pairs(store: Store, window: int, work: Path) -> int:
    """Counts into work/done; returns how many pairs there are."""
    (work / "done").mkdir()
    number = 0
    with open(work / "done/words", "wb") as words, open(work / "done/counts", "wb") as counts:
        for keys, sums in count_pairs(store, window, work):
            pair = np.stack(np.divmod(keys, store.vocab_size), axis=1)
            words.write(pair.astype(WORDS).tobytes())
            counts.write(sums.astype(COUNTS).tobytes())
            number += len(keys)
    return number


def stride_of(number: int) -> int:
    """A step that reaches each of `number` places once, far from the one before: near the golden section."""
    stride = max(min(int(number * 0.618034), 2**62 // max(number, 1)), 1)
    while math.gcd(stride, number) > 1:
        stride -= 1
    return stride


class Pairs:
    """The pairs of a split as a source of batches, data.seq_len of them in a row, every pair once in an epoch.

    tokens, targets: the words i and j; counts: X[i, j], of another split than train times what makes it as long;
    weights: 1, of padding 0. In the file the pairs of a word are side by side: a row takes them from everywhere.
    """

    def __init__(self, config: ConfigDict, store: Store):
        folder = kept_pairs(store, config.task.window)
        self.words = read_flat(folder / "words", WORDS).reshape(-1, 2)
        self.counts = read_flat(folder / "counts", COUNTS)
        self.num_pairs = len(self.counts)
        self.length = config.data.seq_len
        if len(self.words) != self.num_pairs:
            raise DataError(f"{folder} is damaged; delete it, and it is counted again")
        if store.num_tokens and not self.num_pairs:
            raise DataError(
                f"{store.path}: no two words of its {store.split} split stand in one document; are its documents "
                "single words?"
            )
        self.num_rows = -(-self.num_pairs // self.length)
        self.num_tokens = store.num_tokens
        self.stride = stride_of(self.num_pairs)
        self.fingerprint = store.fingerprint
        self.scale = store.manifest["splits"]["train"]["tokens"] / max(store.num_tokens, 1)

    def read(self, rows: np.ndarray, keys: list[tuple]) -> dict[str, np.ndarray]:
        """The batch of these row numbers; one past the end is padding. keys: unused, since nothing is random."""
        place = rows.astype(np.int64)[:, None] * self.length + np.arange(self.length)
        there = place < self.num_pairs
        pair = np.where(there, place, 0) * self.stride % max(self.num_pairs, 1)
        words = np.where(there[..., None], self.words[pair], 0).astype(np.int32)
        counts = np.where(there, self.counts[pair] * np.float32(self.scale), 0)
        return {
            "tokens": words[..., 0],
            "targets": words[..., 1],
            "positions": np.zeros(place.shape, np.int32),
            "segments": there.astype(np.int32),
            "weights": there.astype(np.float32),
            "counts": counts.astype(np.float32),
        }


def read_flat(file: Path, dtype: np.dtype) -> np.ndarray:
    """A memory map of a file of numbers. Raises DataError where it is missing or cut off."""
    try:
        size = file.stat().st_size
        if size % dtype.itemsize:
            raise DataError(f"{file} is cut off; delete {file.parent}, and it is counted again")
        if not size:  # np.memmap refuses an empty file
            return np.zeros(0, dtype)
        return np.memmap(file, dtype, mode="r")
    except OSError as error:
        raise DataError(
            f"{file}: {error.strerror}; delete {file.parent}, and it is counted again"
        ) from None
