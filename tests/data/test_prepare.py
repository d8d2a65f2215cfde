"""Laws of preparation: one input gives the same bytes however it is worked on; bad input is refused or counted."""

import functools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxlm.data import prepare, readers, store
from jaxlm.data import shard_jobs as parts
from jaxlm.data.tokenization import tokenizer
from jaxlm.errors import ConfigError, DataError

DOCS = ["first\n", "  second\tdoc\r\n", "\0 third é \U0001f600", "fourth\n\n\nlines\n" * 30, "5"]
ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jaxlm.data.prepare", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def jsonl(path: Path, docs=DOCS) -> Path:
    path.write_text("".join(json.dumps({"text": doc}) + "\n" for doc in docs))
    return path


@pytest.fixture
def many(tmp_path, monkeypatch):
    """An input of about 20 parts (files that are cut, files that are grouped, lines), with parts made small."""
    monkeypatch.setattr(parts, "PART_BYTES", 5000)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(f"line {i} of a long text, é\n" for i in range(1000)))
    (folder / "b.txt").write_text("\u4e2d\u6587" * 5000)
    for i in range(30):
        (folder / f"c{i:02}.md").write_text(f"small document {i % 20}\n" * (i % 20))
    jsonl(folder / "d.jsonl", [f"record {i % 50} " * (i % 50) for i in range(300)])
    assert 15 < len(parts.plan(readers.find([str(folder)]))) < 60
    return str(folder)


@pytest.mark.parametrize("kind", ["sentencepiece", "words", "bytes", "chars"])
@pytest.mark.parametrize("split", ["tail", "documents"])
def test_any_number_of_workers_writes_the_same_bytes(many, tmp_path, kind, split):
    for workers in (1, 2):
        prepare.prepare([many], tmp_path / str(workers), kind, val_split=split, workers=workers)
    one = contents(tmp_path / "1")
    assert one == contents(tmp_path / "2")
    assert len(one) > 15
    for name in ("train", "val"):
        store.Store(tmp_path / "1", name).verify()


@pytest.mark.parametrize("kind", ["bytes", "chars", "sentencepiece"])
def test_the_two_splits_together_are_the_text(many, tmp_path, kind):
    prepare.prepare([many], tmp_path / "out", kind, val_fraction=0.3, workers=1)
    model = tokenizer.load(tmp_path / "out")
    pieces = readers.read(
        [s for part in parts.plan(readers.find([many])) for s in part], "text", readers.Notes()
    )
    text = "".join(piece.text for piece in pieces)
    decoded = []
    for name in ("train", "val"):
        data = store.Store(tmp_path / "out", name)
        decoded.append(model.decode(data.read(0, data.num_tokens)))
        assert data.num_bytes == len(decoded[-1].encode())
        starts = data.document_starts(0, data.num_tokens)
        assert len(starts) == data.num_documents
        assert starts[0] == 0
        if model.eos_id is not None:
            ends = np.flatnonzero(data.read(0, data.num_tokens) == model.eos_id) + 1
            assert np.array_equal(ends[: len(starts) - 1], starts[1:])
    assert "".join(decoded) == text
    assert len(decoded[0]) == int(len(text) * (1 - 0.3))


def test_tail_cuts_at_the_character_and_the_first_half_has_no_end(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij")
    (tmp_path / "b.txt").write_text("klmnopqrst")
    for fraction, train, val in (
        (0.25, [*b"abcdefghij", 256, *b"klmno"], [*b"pqrst", 256]),
        (0.5, [*b"abcdefghij", 256], [*b"klmnopqrst", 256]),
        (0.75, [*b"abcde"], [*b"fghij", 256, *b"klmnopqrst", 256]),
        (0.0, [*b"abcdefghij", 256, *b"klmnopqrst", 256], []),
    ):
        out = tmp_path / str(fraction)
        prepare.prepare([str(tmp_path / "*.txt")], out, "bytes", val_fraction=fraction)
        for name, tokens in (("train", train), ("val", val)):
            data = store.Store(out, name)
            assert data.read(0, data.num_tokens).tolist() == tokens
            assert data.num_bytes == len(tokens) - tokens.count(256)
            want = [0] * bool(tokens) + [i + 1 for i, t in enumerate(tokens[:-1]) if t == 256]
            assert data.document_starts(0, 99).tolist() == want


def test_documents_are_split_whole_copies_together_and_in_any_order(tmp_path):
    docs = [f"document {i % 40} " * 3 for i in range(100)]

    def split_of(docs, name):
        prepare.prepare(
            [str(jsonl(tmp_path / f"{name}.jsonl", docs))],
            tmp_path / name,
            "bytes",
            val_split="documents",
        )
        sides = []
        for split in ("train", "val"):
            data = store.Store(tmp_path / name, split)
            sides.append(tokenizer.load(tmp_path / name).decode(data.read(0, data.num_tokens)))
        return [sorted(doc for doc in docs if doc in side) for side in sides]

    train, val = split_of(docs, "a")
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(docs)
    assert 0 < len(val) < 30
    assert [train, val] == split_of(docs[::-1], "b")


@pytest.mark.parametrize("fraction", [1e-9, 0.999])
def test_of_two_documents_each_split_gets_one(tmp_path, fraction):
    path = jsonl(tmp_path / "a.jsonl", ["one", "two"])
    manifest = prepare.prepare(
        [str(path)], tmp_path / "out", "bytes", val_split="documents", val_fraction=fraction
    )
    assert [manifest["splits"][split]["documents"] for split in ("train", "val")] == [1, 1]


class Stop(OSError):
    pass


@pytest.mark.parametrize("task", ["count", "write"])
@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_then_continued_writes_the_same_bytes(
    many, tmp_path, monkeypatch, task, workers
):
    prepare.prepare([many], tmp_path / "whole", "sentencepiece")
    original = getattr(parts, task)
    done = []

    @functools.wraps(original)
    def stops(job):
        if len(done) == 5:
            raise Stop("no space left")
        original(job)
        done.append(job.record(task))

    monkeypatch.setattr(parts, task, stops)
    with pytest.raises(DataError, match="run the same command again"):
        prepare.prepare([many], tmp_path / "out", "sentencepiece", workers=1)
    monkeypatch.setattr(parts, task, original)
    times = [path.stat().st_mtime_ns for path in done]
    with pytest.raises(DataError, match="prepare"):
        store.Store(tmp_path / "out", "train")
    seen = []
    monkeypatch.setattr(
        prepare,
        "_finish",
        lambda *a, f=prepare._finish: (seen.extend(p.stat() for p in done), f(*a))[1],
    )
    prepare.prepare([many], tmp_path / "out", "sentencepiece", workers=workers)
    assert [stat.st_mtime_ns for stat in seen] == times  # not done again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("calls", [1, 7, 23, 26, 41, 60])
def test_killed_at_any_rename_then_continued_writes_the_same_bytes(many, tmp_path, calls):
    """Every step ends with a rename, so that dying at the n-th covers both passes and the final moves."""
    prepare.prepare([many], tmp_path / "whole", "bytes")
    script = (
        "import os, sys\nfrom jaxlm.data import prepare, shard_jobs\nshard_jobs.PART_BYTES = 5000\n"
        "rename, n = os.replace, [0]\n"
        "def replace(*a):\n    n[0] += 1\n    n[0] == int(sys.argv[3]) and os.kill(os.getpid(), 9)\n    rename(*a)\n"
        "os.replace = replace; prepare.prepare([sys.argv[1]], sys.argv[2], 'bytes', workers=1)"
    )
    code = subprocess.run(
        [sys.executable, "-c", script, many, str(tmp_path / "out"), str(calls)]
    ).returncode
    assert code == -9
    prepare.prepare([many], tmp_path / "out", "bytes", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def die(job):
    os._exit(1)


def test_a_killed_worker_is_an_error_that_says_how_to_go_on(many, tmp_path):
    options = parts.Options("bytes", None, 0.1, "tail", "text", "error")
    jobs = []
    for i, spans in enumerate(parts.plan(readers.find([many]))):
        jobs.append(parts.Job(i, spans, options, tmp_path))
    with pytest.raises(parts.Interrupted, match="same command again"):
        parts.run(die, jobs, 2, QUIET)


def test_a_finished_directory_is_left_alone_and_other_work_is_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    first = run("--input", path, "--output", tmp_path / "out", "--tokenizer=bytes")
    assert first.returncode == 0
    assert "jaxlm.train --config=" in first.stdout
    before = contents(tmp_path / "out")
    again = run("--input", path, "--output", tmp_path / "out", "--tokenizer=bytes", "--workers=1")
    assert again.returncode == 0
    assert "already prepared" in again.stderr
    for change in ("--tokenizer=chars", "--val_fraction=0.2"):
        other = run("--input", path, "--output", tmp_path / "out", "--tokenizer=bytes", change)
        assert other.returncode == 2
        assert "--overwrite" in other.stderr
        assert change[2:10] in other.stderr
    assert contents(tmp_path / "out") == before
    path.write_text(path.read_text().replace("fourth", "FOURTH"))
    with pytest.raises(ConfigError, match=r"a\.jsonl has changed"):
        prepare.prepare([str(path)], tmp_path / "out", "bytes")
    (tmp_path / "out" / "notes").write_text("mine")
    prepare.prepare([str(path)], tmp_path / "out", "bytes", overwrite=True)
    assert (tmp_path / "out" / "notes").read_text() == "mine"
    assert b"FOURTH" in bytes(
        store.Store(tmp_path / "out", "train").read(0, 100).clip(0, 255).astype(np.uint8)
    )


def test_usage_errors_are_one_line_with_exit_code_2_and_data_errors_are_3(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    (tmp_path / "file").write_text("")
    out = ("--input", path, "--output", tmp_path / "out")
    for args, code, words in (
        ((*out, "--tokeniser=bytes"), 2, "--tokenizer"),
        ((*out, "--tokenizer=byte"), 2, "bytes"),
        ((*out, "--val_fraction=1", "--workers=0"), 2, "workers=0"),
        ((*out, "--val_split=tial"), 2, "tail"),
        ((*out, "--tokenizer=bytes", "--vocab_size=9"), 2, "vocab_size"),
        ((*out, "--vocab_size=9"), 2, "--vocab_size="),
        (("--input", path, "--output", tmp_path / "file"), 2, "can't be written"),
        (("--input", path, "--output", tmp_path), 2, "other files"),
        (("--input", tmp_path / "nope", "--output", tmp_path / "out"), 3, "nope"),
        ((*out, "--tokenizer", tmp_path / "file"), 3, "not a tokenizer"),
    ):
        result = run(*args)
        assert result.returncode == code, (args, result)
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        work = (f"{path}: JSON lines, one document a record", "count:")
        errors = []
        for line in result.stderr.splitlines():
            if not line.startswith(work):
                errors.append(line)
        assert len(errors) == 1
        assert errors[0].startswith("error: ")


def test_a_given_tokenizer_is_used_and_kept(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    prepare.prepare([str(path)], tmp_path / "a", vocab_size=300)
    for given in (tmp_path / "a", tmp_path / "a" / "tokenizer.model"):
        prepare.prepare([str(path)], tmp_path / "b", str(given), overwrite=True)
        assert (
            tokenizer.load(tmp_path / "a").fingerprint == tokenizer.load(tmp_path / "b").fingerprint
        )
        assert (
            store.Store(tmp_path / "a", "val").fingerprint
            == store.Store(tmp_path / "b", "val").fingerprint
        )
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        tokenizer.load(tmp_path / "a")


@pytest.mark.parametrize(
    "kind, line",
    [
        ("bytes", "bos is token 256, eos is token 256"),
        ("sentencepiece", "bos is token 1, eos is token 1"),
        (
            "chars",
            "note: no bos, no eos: documents have no end, so that generation goes on to max_tokens",
        ),
    ],
)
def test_the_summary_says_how_documents_begin_and_end(tmp_path, kind, line):
    path = jsonl(tmp_path / "a.jsonl")
    size = 300 if kind == "sentencepiece" else None
    manifest = prepare.prepare([str(path)], tmp_path / "a", kind, vocab_size=size, workers=1)
    assert line in prepare.summary(manifest, tmp_path / "a").splitlines()


@pytest.mark.parametrize(("kind", "val_fraction"), [("bytes", 0), ("words", 0.1)])
def test_the_next_command_works_as_it_stands(tmp_path, kind, val_fraction):
    path = jsonl(tmp_path / "a.jsonl", ["a b c d " * 20] * 20)
    out = tmp_path / "my data"
    manifest = prepare.prepare([str(path)], out, kind, val_fraction=val_fraction, workers=1)
    *_, command = prepare.summary(manifest, out).splitlines()
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "jaxlm.train"]
    assert f"--config.data.path={out}" in words
    assert "--workdir=runs/my data" in words
    result = subprocess.run(
        [sys.executable, *words[1:], "--dry_run"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kind", ["words", "tokenizer.json"])
def test_unknown_tokens_are_counted_and_told(tmp_path, kind):
    path = jsonl(tmp_path / "a.jsonl", ["a a b", "b a c"])
    if kind == "words":
        given = {"jaxlm": "words", "words": ["a"]}
    else:
        library = pytest.importorskip("tokenizers")
        model = library.Tokenizer(library.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
        model.pre_tokenizer = library.pre_tokenizers.Whitespace()
        given = json.loads(model.to_str())
    (tmp_path / "t.json").write_text(json.dumps(given))
    arguments = [str(path)], tmp_path / "out", str(tmp_path / "t.json")
    with pytest.raises(
        DataError,
        match=r"30.00% of the text .3 of 10 characters., such as 'b', 'c'.*--allow_unknown",
    ):
        prepare.prepare(*arguments, val_fraction=0, workers=1)
    assert not (tmp_path / "out").exists()
    manifest = prepare.prepare(*arguments, val_fraction=0, workers=1, allow_unknown=True)
    assert manifest["counts"]["unknown_tokens"] == 3
    assert "note: 3 of 6 tokens (50.0%) are the tokenizer's unknown" in prepare.summary(
        manifest, tmp_path / "out"
    )


def test_another_tokenizer_in_the_same_place_and_process_is_read_anew(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    for kind in ("words", "bytes"):
        prepare.prepare(
            [str(path)], tmp_path / "out", kind, val_fraction=0, workers=1, overwrite=True
        )
    data = store.Store(tmp_path / "out", "train")
    assert data.num_tokens == data.num_bytes + data.num_documents


def test_data_prepared_before_keep_the_end_that_they_were_written_with(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    prepare.prepare([str(path)], tmp_path / "a", "bytes", workers=1)
    file = tmp_path / "a" / store.MANIFEST
    manifest = json.loads(file.read_bytes())
    manifest["tokenizer"] |= {"bos_id": None, "eos_id": None}
    file.write_text(json.dumps(manifest))
    loaded = tokenizer.load(tmp_path / "a")
    assert loaded.bos_id is None
    assert loaded.eos_id is None


def test_a_killed_program_leaves_no_workers_behind(many, tmp_path):
    script = (
        "import sys; from jaxlm.data import prepare, shard_jobs; shard_jobs.PART_BYTES = 5000\n"
        "if __name__ == '__main__': prepare.prepare([sys.argv[1]], sys.argv[2], 'bytes', workers=2)"
    )
    (tmp_path / "script.py").write_text(script)
    program = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", many, tmp_path / "out"], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 20
    while time.time() < deadline and len(family(program.pid)) < 3:
        time.sleep(0.01)
    workers = family(program.pid) - {program.pid}
    program.kill()
    program.wait()
    while time.time() < deadline and any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)
    assert workers
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def family(root: int) -> set[int]:
    """The process and all its descendants."""
    parent = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {root}
    while more := {pid for pid, above in parent.items() if above in found} - found:
        found |= more
    return found


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("end", ["\n", " "], ids=["lines", "one line"])
@pytest.mark.parametrize(("kind", "size"), [("bytes", 2**30), ("sentencepiece", 2**27)])
def test_a_gigabyte_in_one_file_needs_less_than_two_of_memory(tmp_path, kind, size, end):
    block = "".join(
        f"The quick brown fox number {i} jumps over the lazy dog.{end}" for i in range(20_000)
    ).encode()
    with open(tmp_path / "big.txt", "wb") as file:
        for _ in range(size // len(block) + 1):
            file.write(block)
    options = [
        "--input",
        tmp_path / "big.txt",
        "--output",
        tmp_path / "out",
        f"--tokenizer={kind}",
        "--workers=2",
    ]
    command = [sys.executable, "-m", "jaxlm.data.prepare", *map(str, options)]
    program = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    peak = 0
    while program.poll() is None:
        peak = max(peak, sum(resident(pid) for pid in family(program.pid)))
        time.sleep(0.1)
    assert program.returncode == 0
    assert 2**27 < peak < 2**31
