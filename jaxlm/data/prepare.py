"""Turns raw text into token shards, once.

    python -m jaxlm.data.prepare --input='corpus/*.jsonl.gz' --output=data/mine

Two passes over parts of the input, each part on its own: the first counts, and collects what the tokenizer is made
from; the second writes the shards. Finished parts are kept, so that an interrupted run goes on where it was, and the
files are the same bytes whatever the number of workers. Broken input is refused, or skipped and counted, never
swallowed. A tokenizer that is trained here sees a sample of all the text, validation included. All but words, for word
vectors, give the text back whole; what a tokenizer from elsewhere can't write, or changes, is told, and above 1% of
unknown text is refused.
"""

import dataclasses
import functools
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from jaxlm import cli
from jaxlm.data import readers, store
from jaxlm.data import shard_jobs as parts
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
PARTIAL = ".partial"  # the folder in the output that holds unfinished work
IDENTITY = "identity.json"  # in it: what this work is for
COUNTS = {
    "empty_documents": "empty documents dropped",
    "bad_records": "bad records skipped",
    "broken_files": "broken files kept as far as they go",
    "replaced_bytes": "U+FFFD written for invalid UTF-8",
    "replaced_surrogates": "U+FFFD written for lone surrogates",
    "byte_order_marks": "byte order marks stripped",
}

UNKNOWN = "unknown_tokens"  # of the counts, the one that the second pass makes
GIVEN = ("huggingface", "sentencepiece")  # kinds of tokenizers that are given as files


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
    Raises: ConfigError for options that are wrong or not those of an existing output, DataError for the input.
    """
    output = Path(output)
    inputs = [inputs] if isinstance(inputs, str) else list(inputs)
    if tokenizer not in TRAINED and not Path(tokenizer).exists():
        hint = cli.did_you_mean(str(tokenizer), TRAINED)
        raise ConfigError(f"--tokenizer={tokenizer} is not {', '.join(TRAINED)} or a file{hint}")
    given = _given(tokenizer, bos, eos)
    if tokenizer in SIZED and vocab_size is None:
        vocab_size = VOCAB_SIZE
    name = given.fingerprint if given else tokenizer
    ids = (given.bos_id, given.eos_id) if given else (None, None)
    options = Options(name, vocab_size, val_fraction, val_split, text_key, on_bad_record, *ids)
    _check(options, workers)
    sources = readers.find(inputs, text_key)
    identity = {
        "version": store.VERSION,
        "input": inputs,
        "options": dataclasses.asdict(options),
        "sources": [{"path": s.name, "bytes": s.bytes, "sha256": s.sha256} for s in sources],
    }
    console = Console(stderr=True, highlight=False)
    _print(console, [f"note: {note}" for note in given.notes] if given else [])
    if not _claim(output, identity, overwrite):
        return _already_prepared(output, given, console)
    _print(console, [*readers.formats_of(sources), *readers.left_out(inputs)])
    jobs = []
    for i, spans in enumerate(parts.plan(sources)):
        jobs.append(Job(i, spans, options, output / PARTIAL))
    run = functools.partial(parts.run, workers=workers or os.cpu_count() or 1, console=console)
    try:
        return _passes(output, identity, jobs, given, run, allow_unknown)
    except UserError as error:
        if not isinstance(
            error, parts.Interrupted
        ):  # the next attempt will be with other options or another input
            _clear(output)
        raise


def _given(tokenizer: str | Path, bos: str | None, eos: str | None) -> Tokenizer | None:
    """The tokenizer of a path, with the begin and the end that a person has chosen; None where one is to be made.

    Raises: ConfigError, DataError.
    """
    if tokenizer not in TRAINED:
        given = load(tokenizer)
        specials.of_flags(given, bos, eos)
        return given
    if (bos, eos) != (None, None):
        raise ConfigError(
            f"--bos and --eos are for a tokenizer that is a path; --tokenizer={tokenizer} has its own"
        )
    return None


def _print(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _already_prepared(output: Path, given: Tokenizer | None, console: Console) -> dict:
    """The manifest of an output that is finished; says so, and what has changed since."""
    manifest = store.load_manifest(output)
    lines = [f"{output} is already prepared"]
    there = manifest["tokenizer"]
    if given and (given.bos_id, given.eos_id) != (there["bos_id"], there["eos_id"]):
        now = _begin_and_end(_entry(given)).removeprefix("note: ")
        lines.append(f"note: now it would be: {now}; --overwrite prepares it anew")
    _print(console, lines)
    return manifest


def _check(options: Options, workers: int | None) -> None:
    wrong = []
    for key, value, rule, right in (
        (
            "val_fraction",
            options.val_fraction,
            "at least 0 and below 1",
            0 <= options.val_fraction < 1,
        ),
        ("val_split", options.val_split, " or ".join(VAL_SPLITS), options.val_split in VAL_SPLITS),
        (
            "on_bad_record",
            options.on_bad_record,
            " or ".join(ON_BAD_RECORD),
            options.on_bad_record in ON_BAD_RECORD,
        ),
        ("workers", workers, "at least 1", workers is None or workers >= 1),
        (
            "vocab_size",
            options.vocab_size,
            "at least 1",
            options.vocab_size is None or options.vocab_size >= 1,
        ),
    ):
        if not right:
            wrong.append(f"{key}={value!r} must be {rule}")
    if options.vocab_size is not None and options.tokenizer not in SIZED:
        wrong.append(f"vocab_size is for tokenizer={' or '.join(SIZED)}, the others have their own")
    if wrong:
        raise ConfigError("; ".join(wrong))


def _claim(output: Path, identity: dict, overwrite: bool) -> bool:
    """Makes the output ready to be worked on; False where it is finished. Raises: ConfigError where it is not ours."""
    try:
        if overwrite:
            _clear(output)
        folder = output / PARTIAL
        if (output / store.MANIFEST).exists():
            _compare(store.load_manifest(output), identity, output)
            shutil.rmtree(folder, ignore_errors=True)
            return False
        if (folder / IDENTITY).exists():
            _compare(json.loads((folder / IDENTITY).read_bytes()), identity, output)
            return True
        shutil.rmtree(folder, ignore_errors=True)
        if not overwrite and output.is_dir() and any(output.iterdir()):
            raise ConfigError(f"--output={output} has other files in it; choose a new directory")
        folder.mkdir(parents=True)
        parts.save(folder / IDENTITY, identity)
        return True
    except OSError as error:
        raise ConfigError(
            f"--output={output} can't be written: {error.filename}: {error.strerror}"
        ) from None


def _compare(found: dict, identity: dict, output: Path) -> None:
    """Raises: ConfigError that lists every option and source that is not what it was."""
    there = found["options"]
    now = identity["options"]
    if "bos_id" not in there:  # of an earlier version: its ids are in the manifest, and stay
        there = {**there, "bos_id": now["bos_id"], "eos_id": now["eos_id"]}
    changes = []
    for key in now:
        if there.get(key) != now[key]:
            changes.append(f"{key} was {there.get(key)!r}, is {now[key]!r}")
    there, now = (
        {source["path"]: source for source in side["sources"]} for side in (found, identity)
    )
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    for name in names[:5]:
        if name not in there:
            change = "is new"
        else:
            change = "is gone" if name not in now else "has changed"
        changes.append(f"the input {name} {change}")
    if len(names) > 5:
        changes.append(f"and {len(names) - 5:,} more inputs")
    if list(there) != list(now) and not names:
        changes.append("the inputs are in another order")
    if changes:
        raise ConfigError(
            f"{output} was prepared from something else:\n  "
            + "\n  ".join(changes)
            + "\nchoose another --output, or pass --overwrite to replace it"
        )


def _clear(output: Path) -> None:
    """Deletes what this program writes, and nothing else; the manifest first, so that the rest counts as unfinished."""
    if not output.is_dir():
        return
    for pattern in (
        store.MANIFEST,
        "*-[0-9]*.tokens",
        "*-[0-9]*.offsets",
        "tokenizer.model",
        "tokenizer.json",
    ):
        for file in output.glob(pattern):
            file.unlink()
    for folder in (output / PARTIAL, *output.glob(f"{store.PAIRS}-*")):
        shutil.rmtree(folder, ignore_errors=True)
    if not any(output.iterdir()):
        output.rmdir()


def _passes(
    output: Path,
    identity: dict,
    jobs: list[Job],
    given: Tokenizer | None,
    run: Callable,
    allow_unknown: bool,
) -> dict:
    """Counts, makes the tokenizer, writes, and puts everything in its place. Returns the manifest."""
    total = max(1, sum(job.bytes for job in jobs))
    options = jobs[0].options
    folder = jobs[0].folder
    if options.tokenizer in SIZED:
        jobs = [
            dataclasses.replace(job, sample_chars=1 + SAMPLE_CHARS * job.bytes // total)
            for job in jobs
        ]
    run(parts.count, jobs)
    counted = [json.loads(job.record("count").read_bytes()) for job in jobs]
    counts = parts.judge(counted, skip=options.on_bad_record == "skip")
    tokenizer = given or _make_tokenizer(counted, options)
    file = folder / tokenizer.filename
    specials.write_tokenizer(folder, tokenizer)
    keys = [key for record in counted for key in record["keys"]]
    share = int(parts.NUM_KEYS * options.val_fraction)
    # Of two different documents or more, at least one is val and at least one is train.
    threshold = min(max(share, min(keys) + 1), max(keys)) if share else 0
    cut = int(sum(record["characters"] for record in counted) * (1 - options.val_fraction))
    for i, record in enumerate(counted):
        size = record["characters"]
        jobs[i] = dataclasses.replace(
            jobs[i], tokenizer=file, characters=size, cut=cut, threshold=threshold
        )
        cut = cut - size if cut >= size else -1
    run(parts.write, jobs)
    written = [json.loads(job.record("write").read_bytes()) for job in jobs]
    kept = _what_is_kept(written, jobs)
    # Words that are made here to a size leave out the rare ones on purpose.
    if not allow_unknown and options.tokenizer != "words":
        _refuse_unknown(kept)
    return _finish(
        output, identity, jobs, {key: counts[key] for key in COUNTS}, tokenizer, written, kept
    )


def _what_is_kept(written: list[dict], jobs: list[Job]) -> dict:
    """Takes what each part tells of its unknown text out of the entries of the shards; returns the sums."""
    records = []
    for entries in written:
        for entry in entries.values():
            # A part that an earlier version wrote before an interruption has the count of tokens alone, if any.
            older = {"unknown_tokens": entry.pop("unknown_tokens", 0)}
            records.append(entry.pop("kept", older))
    tokens = sum(entry["tokens"] for entries in written for entry in entries.values())
    return {
        **fidelity.add(records),
        "tokens": tokens,
        "characters": sum(job.characters for job in jobs),
    }


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
    if options.tokenizer == "bytes":
        return Bytes()
    if options.tokenizer == "chars":
        return chars_from(character for record in counted for character in record["alphabet"])
    sample = (chunk for record in counted for chunk in record["sample"])
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
        mine = [(job, entries[split]) for job, entries in zip(jobs, written) if split in entries]
        for number, (job, entry) in enumerate(mine):
            name = f"{split}-{number:05d}"
            shards.append({"file": name, "split": split, **entry})
            for kind in ("tokens", "offsets"):
                part = job.folder / f"{job.index:05d}.{split}.{kind}"
                if part.exists():  # else it was moved before an interruption
                    os.replace(part, output / f"{name}.{kind}")
        splits[split] = {
            key: sum(entry[key] for _, entry in mine) for key in ("tokens", "documents", "bytes")
        }
    if not splits["train"]["tokens"]:
        raise DataError("no text is left to train on: give more text, or a smaller --val_fraction")
    if broken := store.broken_files(output, shards):
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


def _begin_and_end(tokenizer: dict) -> str:
    """One line on the tokens around a document. tokenizer: the manifest's entry."""
    bos, eos = (_one_end(tokenizer, role) for role in specials.ROLES)
    if tokenizer["eos_id"] is None:
        if tokenizer["name"] in GIVEN:
            flag = _hint(tokenizer, "eos")
        else:
            flag = ""
        return f"note: {bos}, {eos}: documents have no end, so that generation goes on to max_tokens{flag}"
    if tokenizer["bos_id"] is None:
        return f"note: {bos}, so that a prompt can't be empty, {eos}{_hint(tokenizer, 'bos')}"
    return f"{bos}, {eos}"


def _hint(tokenizer: dict, role: str) -> str:
    if tokenizer.get(f"{role}_from") == f"--{role}":
        return ""
    return f"; --{role}=TOKEN chooses one"


def _one_end(tokenizer: dict, role: str) -> str:
    """In words, the token that is the tokenizer's bos or eos, and where that is from."""
    id_ = tokenizer[f"{role}_id"]
    origin = tokenizer.get(f"{role}_from")
    told = f" ({origin})" if origin else ""
    if id_ is None:
        return f"no {role}{told}"
    token = f" {tokenizer[f'{role}_token']}" if told else ""
    return f"{role}{token} is token {id_}{told}"


def summary(manifest: dict, output: str | Path) -> str:
    """What a person wants to know about a prepared directory, and what to type next."""
    splits = manifest["splits"]
    tokenizer = manifest["tokenizer"]
    lines = [f"{'':10}{'documents':>14}{'bytes':>18}{'tokens':>18}{'bytes/token':>14}"]
    for name, split in splits.items():
        ratio = split["bytes"] / max(1, split["tokens"])
        lines.append(
            f"{name:10}{split['documents']:14,}{split['bytes']:18,}{split['tokens']:18,}{ratio:14.3f}"
        )
    lines.append(f"tokenizer {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens")
    lines.append(_begin_and_end(tokenizer))
    wanted = manifest["options"]["vocab_size"]
    if wanted and wanted > tokenizer["vocab_size"]:
        lines.append(f"note: the text has no pieces for the {wanted:,} tokens that were asked for")
    if manifest["options"]["val_fraction"] and not splits["val"]["tokens"]:
        lines.append(
            "note: val is empty, since no two documents differ; --val_split=tail would cut one in two"
        )
    lines += _what_is_lost(manifest)
    lines += [
        f"note: {manifest['counts'][key]:,} {name}"
        for key, name in COUNTS.items()
        if manifest["counts"][key]
    ]
    lines += [
        f"written to {output}",
        "next:",
        f"  python -m jaxlm.train --config=... --config.data.path={shlex.quote(str(output))}",
    ]
    return "\n".join(lines)


def _what_is_lost(manifest: dict) -> list[str]:
    """Lines on the text that the tokens don't hold."""
    if "kept" not in manifest:  # of an earlier version, which counted tokens, or nothing
        unknown = manifest["counts"].get(UNKNOWN, 0)
        if unknown:
            return [
                f"note: {unknown:,} tokens are the tokenizer's unknown token: their text is lost"
            ]
        return []
    kept = manifest["kept"]
    lines = []
    if kept["unknown_tokens"] or kept["unknown_characters"]:
        lines.append(f"note: {fidelity.unknown_in_words(kept)}")
    if kept["give_back"]:
        lines.append(f"note: {kept['give_back']}")
    return lines


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python -m jaxlm.data.prepare", description=__doc__)
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
        "--tokenizer",
        default="sentencepiece",
        metavar="|".join([*TRAINED, "PATH"]),
        help="default: sentencepiece. words: of letters and digits, and each punctuation mark by itself ('king,' is "
        "king and a comma); don't, well-known and 3.14 stay whole, and text without spaces is not split into words",
    )
    parser.add_argument(
        "--vocab_size", type=int, help=f"tokens, of {' or '.join(SIZED)} (default: {VOCAB_SIZE})"
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
    parser.add_argument(
        "--bos",
        metavar="TOKEN",
        help="what begins a text: a given tokenizer's token, its id, or none",
    )
    parser.add_argument(
        "--eos",
        metavar="TOKEN",
        help="what ends a document: a given tokenizer's token, its id, or none",
    )
    parser.add_argument(
        "--allow_unknown",
        action="store_true",
        help=f"go on where over {100 * fidelity.MOST_UNKNOWN:.0f}%% of the text is unknown to the tokenizer, and lost",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the output")
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


if __name__ == "__main__":
    cli.run(main)
