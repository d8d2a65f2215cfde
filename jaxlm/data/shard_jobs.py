"""The input in parts: what a worker does with one part, on its own, and how all parts are worked through.

A part is counted first and written later. Each leaves a record, a small JSON file, when it is done; a part that has its
record is not worked on again.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from jaxlm.data.files.repeats import said_once
from jaxlm.data.readers import BAD_SHOWN, Source, Span, beginning, read
from jaxlm.data.store import ShardWriter, token_dtype
from jaxlm.data.tokenization.fidelity import Kept
from jaxlm.data.tokenization.pieces import PIECE_BYTES, Notes, Piece, character
from jaxlm.data.tokenization.tokenizer import Tokenizer, load
from jaxlm.data.tokenization.vocabulary import Sample
from jaxlm.errors import DataError

PART_BYTES = 32 << 20  # of input in a part ...
MAX_PARTS = 1024  # ... but about this many parts (and shards) at most
# Documents that agree this far are one document to val_split=documents; every first piece has it.
KEY_CHARS = 1 << 12
NUM_KEYS = 1 << 64
# on_bad_record=skip still refuses more than both of these
BAD_SHARE = 0.01
BAD_COUNT = 10


@functools.cache  # once per worker
def _load(path: Path, written: int) -> Tokenizer:
    """The tokenizer of a file. written: when, in ns, since the same path may have been another's before."""
    del written
    return load(path)


class Interrupted(DataError):
    """The work stopped half-way; what is finished is kept."""


@dataclass(frozen=True)
class Options:
    """All that decides, together with the input, which bytes are written."""

    tokenizer: str  # a kind, or the fingerprint of a given tokenizer
    vocab_size: int | None
    val_fraction: float
    val_split: str
    text_key: str
    on_bad_record: str
    bos_id: int | None = None  # of a given tokenizer
    eos_id: int | None = None


@dataclass(frozen=True)
class Job:
    """A part, and what a worker needs to know to count it or to write it."""

    index: int
    spans: tuple[Span, ...]
    options: Options
    folder: Path
    sample_chars: int = 0  # count: how much text to keep to train the tokenizer on
    tokenizer: Path | None = None  # write: its file
    characters: int = 0  # write: what was counted
    cut: int = 0  # write, tail: val starts at this character of the part (or started before it, if negative)
    threshold: int = 0  # write, documents: those with a smaller hash are val

    @property
    def bytes(self) -> int:
        return sum(span.bytes for span in self.spans)

    def record(self, task: str) -> Path:
        return self.folder / f"{self.index:05d}.{task}.json"


def plan(sources: list[Source]) -> list[tuple[Span, ...]]:
    """Cuts the sources into parts, in order: whole small files together, or one stretch of a large file. It depends
    on nothing but the files, so that any number of workers writes the same shards."""
    size = max(PART_BYTES, sum(source.bytes for source in sources) // MAX_PARTS)
    parts = []
    group = []
    room = size
    for source in sources:
        spans = [Span(source, start, stop) for start, stop in pairwise(_cuts(source, size))]
        if len(spans) > 1 or source.bytes > room:
            parts.append(tuple(group))
            group = []
            room = size
        if len(spans) > 1:
            parts += [(span,) for span in spans]
        else:
            group += spans
            room -= source.bytes
    return list(filter(None, [*parts, tuple(group)]))


def save(path: Path, value) -> None:
    """Writes JSON, all or nothing."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)


def count(job: Job) -> None:
    """Writes the record of what is in a part: the sums, what is wrong with it, and what the tokenizer is made from."""
    notes = Notes()
    sample = Sample(job.sample_chars)
    alphabet = set()
    characters = documents = 0
    low = NUM_KEYS
    high = 0
    for piece in read(job.spans, job.options.text_key, notes):
        characters += len(piece.text)
        documents += piece.first
        if job.sample_chars:
            sample.add(piece.text)
        if job.options.tokenizer == "chars":
            alphabet.update(piece.text)
        if job.options.val_split == "documents" and piece.first:
            low = min(low, key := _key(piece.text))
            high = max(high, key)
    save(
        job.record("count"),
        {
            "characters": characters,
            "documents": documents,
            "keys": [low, high],
            "alphabet": "".join(sorted(alphabet)),
            "sample": sample.chunks,
            "counts": notes.counts,
            "bad": notes.bad,
            "reasons": notes.reasons,
            "broken": notes.broken,
            "records": notes.records,
        },
    )


def check_counts(counted: list[dict], skip: bool) -> Counter:
    """The counts of all parts together. Raises DataError that lists what is too broken to go on, even with `skip`."""
    counts = Counter()
    documents = 0
    for record in counted:
        counts.update(record["counts"])
        documents += record["documents"]
    broken = _list_broken(counted)
    counts["broken_files"] = len(broken)
    num_bad = counts["bad_records"]
    records = documents + counts["empty_documents"] + num_bad
    may_skip = max(BAD_COUNT, BAD_SHARE * records)
    lines = []
    if num_bad > (may_skip if skip else 0):
        lines = [f"{num_bad:,} of {records:,} records are bad:", *_list_bad(counted)]
    if broken and not skip:
        lines += [f"broken files ({len(broken):,}):", *broken]
    if lines:
        hint = "repair the input"
        if skip:
            hint += f", even skip allows {BAD_SHARE:.0%} at most"
        elif documents and num_bad <= may_skip:
            hint += ", or pass --on_bad_record=skip to go on without"
        raise DataError("\n".join([*lines, hint]))
    if not documents:
        raise DataError(
            f"there is no text in the input ({counts['empty_documents']:,} empty documents)"
        )
    return counts


def _list_bad(counted: list[dict]) -> list[str]:
    """A line for each reason why records are bad, with its first places."""
    places = {}
    repeats = Counter()
    before = Counter()  # records of a file in earlier parts
    for record in counted:
        for name, number, reason in record["bad"]:
            places.setdefault(reason, []).append(f"{name}:{before[name] + number}")
        repeats.update(record.get("reasons", {}))  # an earlier version's unfinished work has none
        before.update(record["records"])
    lines = []
    left = sum(record["counts"].get("bad_records", 0) for record in counted)
    for reason, where in list(places.items())[:BAD_SHOWN]:
        count = max(repeats[reason], len(where))
        lines.append(f"  {said_once(reason, where, count)}")
        left -= count
    if left:
        lines.append(f"  and {left:,} more")
    return lines


def _list_broken(counted: list[dict]) -> list[str]:
    """A line for each file that breaks off."""
    lines = []
    for record in counted:
        for name, reason, done in record["broken"]:
            lines.append(f"  {name}: {reason} (after {done:,} records)")
    return lines


def write(job: Job) -> None:
    """Writes a part's shards, at most one of each split, and the record of them: {split: entry}."""
    tokenizer = _load(job.tokenizer, job.tokenizer.stat().st_mtime_ns)
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {}
    kept = {}
    characters = 0
    before = _before(job.spans[0])
    for split, piece in _routed(job):
        if split not in writers:
            writers[split] = ShardWriter(job.folder / f"{job.index:05d}.{split}", dtype)
            kept[split] = Kept(tokenizer)
        tokens = tokenizer.encode(piece.text, after="" if piece.first else before)
        before = piece.text[-1:]
        kept[split].inspect(piece.text, tokens)
        if piece.last and tokenizer.eos_id is not None:
            tokens = np.append(tokens, tokenizer.eos_id)
        writers[split].add(tokens, num_bytes(piece.text), piece.first)
        characters += len(piece.text)
    if characters != job.characters:
        names = sorted({span.source.name for span in job.spans})
        raise DataError(
            "the input changed, or became unreadable, while it was being read: look at "
            + ", ".join(names[:5])
        )
    entries = {}
    for split, writer in writers.items():
        entries[split] = {**writer.close(), "kept": kept[split].record()}
    save(job.record("write"), entries)


def _routed(job: Job) -> Iterator[tuple[str, Piece]]:
    """The pieces of a part, each with its split."""
    pieces = read(job.spans, job.options.text_key, Notes())
    if job.options.val_split == "tail":
        return _by_tail(pieces, job.cut)
    return _by_document(pieces, job)


def _before(span: Span) -> str:
    """The character before a span; a newline where that is not known. A span may begin in the middle of a document."""
    if span.start == 0 or span.source.streamed or span.source.kind != "text":
        return "\n"
    with open(span.source.path, "rb") as file:
        file.seek(max(0, span.start - 4))
        near = file.read(min(4, span.start))
    return near.decode(errors="ignore")[-1:] or "\n"


def num_bytes(text: str) -> int:
    """The length of the text in UTF-8."""
    if text.isascii():
        return len(text)
    return len(text.encode())


def run(task: Callable[[Job], None], jobs: list[Job], workers: int, console: Console) -> None:
    """Does the task for every job that has no record of it. Shows a progress bar, or lines where there is no terminal.

    Raises DataError from the task, Interrupted where a worker was killed or the disk is full.
    """
    total = sum(job.bytes for job in jobs)
    done = 0
    shown = 0
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{task.__name__:5}", total=total)
        for job in _finished(task, jobs, workers):
            done += job.bytes
            progress.advance(bar, job.bytes)
            if not console.is_terminal and (done == total or 10 * (done - shown) >= total):
                console.print(
                    f"{task.__name__}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB", soft_wrap=True
                )
                shown = done


def _finished(task: Callable[[Job], None], jobs: list[Job], workers: int) -> Iterator[Job]:
    """The jobs as they are done."""
    done = []
    left = []
    for job in jobs:
        recorded = job.record(task.__name__).exists()
        (done if recorded else left).append(job)
    yield from done
    workers = min(workers, len(left))
    pool = None
    try:
        if workers <= 1:
            for job in left:
                task(job)
                yield job
            return
        # spawn: the caller may have threads (JAX does), which fork would break
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
        futures = {pool.submit(task, job): job for job in left}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool:
        raise Interrupted(
            "a worker was killed, most likely for want of memory; finished parts are kept: run the same command again, "
            "with fewer --workers"
        ) from None
    except OSError as error:
        raise Interrupted(f"{error}; finished parts are kept: run the same command again") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # a killed parent would leave its workers waiting for ever
    os._exit(1)


def _cuts(source: Source, size: int) -> list[int]:
    """The borders of the spans of a source, from 0 to its size."""
    cuts = [0]
    within = -1 if source.kind == "jsonl" else PIECE_BYTES
    if source.cuttable:
        with open(source.path, "rb") as file:
            for start in range(size, source.bytes, size):
                if start > cuts[-1]:
                    cuts.append(_border(file, start, within))
    inside = [cut for cut in cuts if cut < source.bytes]
    return [*(inside or [0]), source.bytes]


def _border(file, start: int, within: int) -> int:
    """Where the next line starts after `start`, looking `within` bytes ahead (-1: all); if nowhere, a character."""
    file.seek(start)
    line = file.readline(within)
    if line.endswith(b"\n") or within < 0:
        return start + len(line)
    file.seek(start - 3)
    return start - 3 + character(file.read(4), 3)


def _by_tail(pieces: Iterable[Piece], cut: int) -> Iterator[tuple[str, Piece]]:
    """train up to character `cut` of the part, val from there on. What is left of a document that is cut counts as a
    document of val. A negative cut lies in an earlier part."""
    for piece in pieces:
        if 0 <= cut < len(piece.text):
            if cut:
                yield "train", Piece(piece.text[:cut], piece.first, False)
            yield "val", Piece(piece.text[cut:], True, piece.last)
        else:
            yield "val" if cut < 0 else "train", piece
        cut = cut - len(piece.text) if cut >= len(piece.text) else -1


def _by_document(pieces: Iterable[Piece], job: Job) -> Iterator[tuple[str, Piece]]:
    split = None
    for piece in pieces:
        if piece.first or split is None:
            if piece.first:
                text = piece.text
            else:
                text = beginning(job.spans[0].source)
            split = "val" if _key(text) < job.threshold else "train"
        yield split, piece


def _key(text: str) -> int:
    """What decides the split of the document that begins with `text`: the same for every copy of it."""
    digest = hashlib.blake2b(text[:KEY_CHARS].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
