"""Turns raw text into token shards, once.

    python -m jaxlm.data.prepare --input='corpus/*.jsonl.gz' --output=data/mine

Two passes over parts of the input, each part on its own: the first counts, and collects what the tokenizer is made
from; the second writes the shards. Finished parts are kept, so that an interrupted run goes on where it was, and the
files are the same bytes whatever the number of workers. Broken input is refused, or skipped and counted, never
swallowed. A tokenizer that is trained here sees a sample of all the text, validation included. All but words, for word
vectors, give the text back whole; what a tokenizer from elsewhere can't write, or changes, is reported, and above 1% of
unknown text is refused.
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from jaxlm import cli
from jaxlm.data import readers, store
from jaxlm.data import shard_jobs as parts
from jaxlm.data.preparation.output import PARTIAL, claim, clear
from jaxlm.data.preparation.summary import COUNTS, UNKNOWN, begin_and_end, summary
from jaxlm.data.shard_jobs import Job, Options
from jaxlm.data.tokenization import fidelity, specials
from jaxlm.data.tokenization.tokenizer import Bytes, Tokenizer, load
from jaxlm.data.tokenization.vocabulary import (
    SAMPLE_CHARS,
    chars_from,
    train_sentencepiece,
    words_from,
)
from jaxlm.errors import ConfigError, DataError, UserError

SIZED = ("sentencepiece", "words")  # tokenizers that are trained to a size
TRAINED = (*SIZED, "bytes", "chars")  # --tokenizer: one of these, else a path
VAL_SPLITS = ("tail", "documents")
ON_BAD_RECORD = ("error", "skip")
VOCAB_SIZE = 4096  # of a sentencepiece model, unless another is asked for


def prepare(
    inputs: Iterable[str],
    output: str | Path,
    tokenizer: str = "sentencepiece",
    vocab_size: int | None = None,
    val_fraction: float = 0.1,
    val_split: str = "tail",
    workers: int | None = None,
    text_key: str = "text",
    on_bad_record: str = "error",
    overwrite: bool = False,
    bos: str | None = None,
    eos: str | None = None,
    allow_unknown: bool = False,
) -> dict:
    """Writes a prepared directory (see store.py) and returns its manifest. One that is finished is left as it is.

    `val_split="tail"` takes the last val_fraction of the characters of the corpus: the document on the border is cut in
    two, of which the first half gets no end of text and the second counts as a document. `"documents"` draws whole
    documents by a hash of their first 4,096 characters, so that copies stay together. `workers` defaults to all cores.
    bos, eos: a given tokenizer's token, by its text or its id, or "none"; default: what it says by itself.
    Raises ConfigError for options that are wrong or not those of an existing output, DataError for the input.
    """
    output = Path(output)
    inputs = [inputs] if isinstance(inputs, str) else list(inputs)
    given = _given(tokenizer, bos, eos)
    if tokenizer in SIZED and vocab_size is None:
        vocab_size = VOCAB_SIZE
    name = given.fingerprint if given else tokenizer
    ids = (given.bos_id, given.eos_id) if given else (None, None)
    options = Options(name, vocab_size, val_fraction, val_split, text_key, on_bad_record, *ids)
    _check(options, workers)
    sources = readers.find(inputs, text_key)
    identity = _identity(inputs, options, sources)
    console = Console(stderr=True, highlight=False)
    if given:
        _print(console, [f"note: {note}" for note in given.notes])
    if not claim(output, identity, overwrite):
        return _already_prepared(output, given, console)
    _print(console, [*readers.formats_of(sources), *readers.left_out(inputs)])
    jobs = []
    for i, spans in enumerate(parts.plan(sources)):
        jobs.append(Job(i, spans, options, output / PARTIAL))
    run = functools.partial(parts.run, workers=workers or os.cpu_count() or 1, console=console)
    try:
        return _passes(output, identity, jobs, given, run, allow_unknown)
    except parts.Interrupted:
        raise
    except UserError:  # the next attempt will be with other options or another input
        clear(output)
        raise


def _given(tokenizer: str | Path, bos: str | None, eos: str | None) -> Tokenizer | None:
    """The tokenizer of a path, with the begin and the end that a person has chosen; None where one is to be made.

    Raises ConfigError where there is no such tokenizer or token, DataError where its file can't be read.
    """
    if tokenizer not in TRAINED:
        if not Path(tokenizer).exists():
            hint = cli.did_you_mean(str(tokenizer), TRAINED)
            raise ConfigError(
                f"--tokenizer={tokenizer} is not {', '.join(TRAINED)} or a file{hint}"
            )
        given = load(tokenizer)
        specials.of_flags(given, bos, eos)
        return given
    if (bos, eos) != (None, None):
        raise ConfigError(
            f"--bos and --eos are for a tokenizer that is a path; --tokenizer={tokenizer} has its own"
        )
    return None


def _identity(inputs: list[str], options: Options, sources: list[readers.Source]) -> dict:
    """All that decides which bytes are written, as JSON."""
    files = []
    for source in sources:
        files.append({"path": source.name, "bytes": source.bytes, "sha256": source.sha256})
    return {
        "version": store.VERSION,
        "input": inputs,
        "options": dataclasses.asdict(options),
        "sources": files,
    }


def _print(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _already_prepared(output: Path, given: Tokenizer | None, console: Console) -> dict:
    """The manifest of an output that is finished; says so, and what has changed since."""
    manifest = store.load_manifest(output)
    lines = [f"{output} is already prepared"]
    there = manifest["tokenizer"]
    if given and (given.bos_id, given.eos_id) != (there["bos_id"], there["eos_id"]):
        now = begin_and_end(_entry(given), []).removeprefix("note: ")
        lines.append(f"note: now it would be: {now}; --overwrite prepares it anew")
    _print(console, lines)
    return manifest


def _check(options: Options, workers: int | None) -> None:
    """Raises ConfigError that lists every option that is wrong."""
    wrong = []

    def require(right: bool, key: str, value, rule: str) -> None:
        if not right:
            wrong.append(f"{key}={value!r} must be {rule}")

    fraction = options.val_fraction
    vocab_size = options.vocab_size
    require(0 <= fraction < 1, "val_fraction", fraction, "at least 0 and below 1")
    for key, known in (("val_split", VAL_SPLITS), ("on_bad_record", ON_BAD_RECORD)):
        value = getattr(options, key)
        require(value in known, key, value, " or ".join(known))
    require(workers is None or workers >= 1, "workers", workers, "at least 1")
    require(vocab_size is None or vocab_size >= 1, "vocab_size", vocab_size, "at least 1")
    if vocab_size is not None and options.tokenizer not in SIZED:
        wrong.append(f"vocab_size is for tokenizer={' or '.join(SIZED)}, the others have their own")
    if wrong:
        raise ConfigError("; ".join(wrong))


def _passes(
    output: Path,
    identity: dict,
    jobs: list[Job],
    given: Tokenizer | None,
    run: Callable,
    allow_unknown: bool,
) -> dict:
    """Counts, makes the tokenizer, writes, and puts everything in its place. Returns the manifest."""
    options = jobs[0].options
    folder = jobs[0].folder
    if options.tokenizer in SIZED:
        jobs = _with_samples(jobs)
    run(parts.count, jobs)
    counted = _read_records(jobs, "count")
    counts = parts.check_counts(counted, skip=options.on_bad_record == "skip")
    tokenizer = given or _make_tokenizer(counted, options)
    specials.write_tokenizer(folder, tokenizer)
    jobs = _with_borders(jobs, counted, folder / tokenizer.filename)
    run(parts.write, jobs)
    written = _read_records(jobs, "write")
    kept = _what_is_kept(written, jobs)
    # Words that are made here to a size leave out the rare ones on purpose.
    if not allow_unknown and options.tokenizer != "words":
        _refuse_unknown(kept)
    return _finish(
        output, identity, jobs, {key: counts[key] for key in COUNTS}, tokenizer, written, kept
    )


def _read_records(jobs: list[Job], task: str) -> list[dict]:
    """What each job has left."""
    return [json.loads(job.record(task).read_bytes()) for job in jobs]


def _with_samples(jobs: list[Job]) -> list[Job]:
    """The jobs, each with the share of text that it keeps to train the tokenizer on."""
    total = max(1, sum(job.bytes for job in jobs))
    sampled = []
    for job in jobs:
        share = 1 + SAMPLE_CHARS * job.bytes // total
        sampled.append(dataclasses.replace(job, sample_chars=share))
    return sampled


def _with_borders(jobs: list[Job], counted: list[dict], tokenizer: Path) -> list[Job]:
    """The jobs, each with the tokenizer's file and where its text turns from train to val."""
    options = jobs[0].options
    characters = 0
    keys = []
    for record in counted:
        characters += record["characters"]
        keys += record["keys"]
    share = int(parts.NUM_KEYS * options.val_fraction)
    threshold = 0
    if share:  # of two different documents or more, at least one is val and at least one is train
        threshold = min(max(share, min(keys) + 1), max(keys))
    cut = int(characters * (1 - options.val_fraction))
    ready = []
    for job, record in zip(jobs, counted, strict=True):
        size = record["characters"]
        borders = {"characters": size, "cut": cut, "threshold": threshold}
        ready.append(dataclasses.replace(job, tokenizer=tokenizer, **borders))
        cut = cut - size if cut >= size else -1
    return ready


def _what_is_kept(written: list[dict], jobs: list[Job]) -> dict:
    """Takes what each part says of its unknown text out of the entries of the shards; returns the sums."""
    records = []
    tokens = 0
    for entries in written:
        for entry in entries.values():
            # A part that an earlier version wrote before an interruption has the count of tokens alone, if any.
            older = {"unknown_tokens": entry.pop("unknown_tokens", 0)}
            records.append(entry.pop("kept", older))
            tokens += entry["tokens"]
    characters = sum(job.characters for job in jobs)
    return {**fidelity.add(records), "tokens": tokens, "characters": characters}


def _refuse_unknown(kept: dict) -> None:
    """Raises DataError where more of the text is unknown than a model could do without."""
    if kept["unknown_characters"] <= fidelity.MOST_UNKNOWN * kept["characters"]:
        return
    raise DataError(
        f"{fidelity.unknown_in_words(kept)}; at most {fidelity.MOST_UNKNOWN:.0%} of the text may be, since losses and "
        "answers are of the rest alone: give a --tokenizer that knows this text (sentencepiece, which is made from it, "
        "or bytes), leave such documents out, or go on with --allow_unknown"
    )


def _make_tokenizer(counted: list[dict], options: Options) -> Tokenizer:
    """The tokenizer of the text that was counted. Raises ConfigError where its size is too small, DataError without
    text."""
    if options.tokenizer == "bytes":
        return Bytes()
    if options.tokenizer == "chars":
        return chars_from("".join(record["alphabet"] for record in counted))
    sample = []
    for record in counted:
        sample += record["sample"]
    if options.tokenizer == "words":
        return words_from(sample, options.vocab_size, split="punctuation")
    return train_sentencepiece(sample, options.vocab_size)


def _finish(
    output: Path,
    identity: dict,
    jobs: list[Job],
    counts: dict,
    tokenizer: Tokenizer,
    written: list[dict],
    kept: dict,
) -> dict:
    """Numbers the shards, moves everything to where it belongs, and writes the manifest."""
    counts = {
        **counts,
        UNKNOWN: kept["unknown_tokens"],
        "unknown_characters": kept["unknown_characters"],
    }
    shards = []
    splits = {}
    for split in ("train", "val"):
        entries = _place_shards(split, jobs, written, output)
        shards += entries
        splits[split] = {}
        for key in ("tokens", "documents", "bytes"):
            splits[split][key] = sum(entry[key] for entry in entries)
    if not splits["train"]["tokens"]:
        raise DataError("no text is left to train on: give more text, or a smaller --val_fraction")
    broken = store.broken_files(output, shards)
    if broken:
        raise DataError(
            "\n  ".join(["files were damaged while they were written; start again:", *broken])
        )
    (output / tokenizer.filename).write_bytes(tokenizer.to_bytes())
    manifest = {
        **identity,
        "splits": splits,
        "shards": shards,
        "counts": counts,
        "tokenizer": _entry(tokenizer),
        "kept": {**kept, "give_back": fidelity.give_back_in_words(kept, tokenizer)},
        "dtype": store.token_dtype(tokenizer.vocab_size).str,
    }
    parts.save(output / store.MANIFEST, manifest)
    shutil.rmtree(output / PARTIAL)
    return manifest


def _place_shards(split: str, jobs: list[Job], written: list[dict], output: Path) -> list[dict]:
    """Numbers the shards of a split and moves them into the output; their entries in the manifest."""
    shards = []
    for job, entries in zip(jobs, written, strict=True):
        if split not in entries:
            continue
        name = f"{split}-{len(shards):05d}"
        shards.append({"file": name, "split": split, **entries[split]})
        for kind in ("tokens", "offsets"):
            part = job.folder / f"{job.index:05d}.{split}.{kind}"
            if part.exists():  # else it was moved before an interruption
                os.replace(part, output / f"{name}.{kind}")
    return shards


def _entry(tokenizer: Tokenizer) -> dict:
    """The tokenizer in the manifest."""
    entry = {
        "name": tokenizer.name,
        "file": tokenizer.filename,
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.fingerprint,
    }
    for role in specials.ROLES:
        id_ = getattr(tokenizer, f"{role}_id")
        if id_ is not None:
            entry[f"{role}_token"] = tokenizer.token(id_)
    return entry | specials.ids_of(tokenizer)


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python -m jaxlm.data.prepare", description=__doc__)
    _add_arguments_of_text(parser)
    _add_arguments_of_tokenizer(parser)
    args = parser.parse(argv)
    manifest = prepare(
        args.input,
        args.output,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        val_fraction=args.val_fraction,
        val_split=args.val_split,
        workers=args.workers,
        text_key=args.text_key,
        on_bad_record=args.on_bad_record,
        overwrite=args.overwrite,
        bos=args.bos,
        eos=args.eos,
        allow_unknown=args.allow_unknown,
    )
    print(summary(manifest, args.output))


def _add_arguments_of_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="GLOB",
        help="a file, a directory, a glob in quotes, or stdlib (Python's own source); may be given again",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where the shards of tokens go"
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=0.1,
        help="part of the text to keep for validation, 0 to 1",
    )
    parser.add_argument(
        "--val_split",
        choices=VAL_SPLITS,
        default="tail",
        help="the end of the text, or drawn by hash",
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--text_key", default="text", help="the key or column of a record that has the text"
    )
    parser.add_argument(
        "--on_bad_record", choices=ON_BAD_RECORD, default="error", help="skip: count them and go on"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the output")


def _add_arguments_of_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        default="sentencepiece",
        metavar="|".join([*TRAINED, "PATH"]),
        help="default: sentencepiece. words: of letters and digits, and each punctuation mark by itself ('king,' is "
        "king and a comma); don't, well-known and 3.14 stay whole, and text without spaces is not split into words",
    )
    parser.add_argument(
        "--vocab_size", type=int, help=f"tokens, of {' or '.join(SIZED)} (default: {VOCAB_SIZE})"
    )
    for role, what in (("bos", "begins a text"), ("eos", "ends a document")):
        parser.add_argument(
            f"--{role}",
            metavar="TOKEN",
            help=f"what {what}: a given tokenizer's token, its id, or none",
        )
    parser.add_argument(
        "--allow_unknown",
        action="store_true",
        help=f"go on where over {100 * fidelity.MOST_UNKNOWN:.0f}%% of the text is unknown to the tokenizer, and lost",
    )


if __name__ == "__main__":
    cli.run(main)
