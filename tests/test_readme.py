"""Every command that README.md and docs/ show is sound, and runs; their Python too.

Fast: each command is read by the parser of its program, its config is checked, and what a launcher would do is printed.
Slow: those that need no pod, made small, in the order in which they are shown. tests/commands.py says which is which.
"""

import ast
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

import commands
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT, Command, parse, rule_of, runnable, shown
from conftest import FLAGS

from jaxlm import cli
from jaxlm.config.check import check
from jaxlm.config.keys import base
from jaxlm.config.recipe import flatten, load, override

PAGES = commands.pages()
SHOWN = shown()
PROGRAMS = sorted({command.words[2] for command in SHOWN if command.words[:2] == ("python", "-m")})
PYTHON = [block for text in PAGES.values() for block in commands.blocks(text, "python")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory as README's reader has it: with the repository's files, and recipes as README shows them."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "launch", "jaxlm", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for block in PYTHON:
        if name := re.match(r"# (\w+\.py)\n", block):
            (folder / name[1]).write_text(block)
    return folder


# ---------------------------------------------------------------- fast


@pytest.mark.parametrize("command", dict.fromkeys(SHOWN), ids=str)
def test_each_command_is_sound(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    rule = rule_of(command)
    assert rule.does != "parse" or rule.why
    words = command.words
    if words[:2] == ("python", "-m"):
        sound_config(parse(words[2], words[3:]))
    elif words[:2] == ("python", "-c"):
        compile(words[2], command.place, "exec")
    elif words[0] in ("python", "bash"):
        assert (ROOT / words[1]).is_file()
    if rule.does == "print":
        printed(command)


def sound_config(args) -> None:
    """The config that a command names has its keys, and nothing is wrong with it."""
    if getattr(args, "config", None):
        config = load(args.config)
        assert not override(config, args.overrides)
        assert not check(config)


def printed(command: Command) -> None:
    """A launcher prints what it would do, and jaxlm.train knows the flags that it is given."""
    words = list(command.words)
    if "--" in words:
        end = words.index("--")
    else:
        end = len(words)
    dry = [*words[:end], "--dry_run", *words[end:]]
    run = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout, f"{command}\n{run.stdout}{run.stderr}"
    if words[end:]:
        sound_config(parse("jaxlm.train", words[end + 1 :]))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```bash\na --b 'c d' && e  # f && g\n```", ["a --b 'c d'", "e"]),
        ("```bash\na \\\n  --b=c ...   # d\n\n# e\n```", ["a --b=c"]),
        ("```bash\nexport A=b ...; f <g | h -\n```", ["export A=b", "f '<' g", "h -"]),
        ("```python\na\n```\nSay `bash\nx.sh y`, or `a.sh`.", ["bash x.sh y"]),
    ],
)
def test_what_is_a_command(text, found):
    assert [str(command) for command in commands.in_markdown("page", text)] == found


def test_an_unknown_command_says_what_to_add():
    with pytest.raises(
        AssertionError,
        match=r"page shows a command without a rule: python -m jaxlm\.fly\nadd one to",
    ):
        rule_of(Command("page", ("python", "-m", "jaxlm.fly")))


def test_a_wrong_flag_or_key_is_found(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for wrong in ("--stepp=3", "--config.optim.rate=1"):
        words = ("python", "-m", "jaxlm.bench", "--config=configs/quickstart.py", wrong)
        with pytest.raises((cli.ConfigError, AssertionError), match=r"--stepp|optim\.rate"):
            test_each_command_is_sound(Command("page", words), folder, monkeypatch)


def options(module: str, monkeypatch) -> set[str]:
    """The flags of a program."""
    parsers = []
    monkeypatch.setattr(cli.Parser, "parse", lambda self, argv: parsers.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        commands.program_of(module).main([])
    return set(parsers[0]._option_string_actions)


def every_flag(monkeypatch) -> set[str]:
    """Those of all programs: one also speaks of the flags that another was run with."""
    return set().union(*(options(module, monkeypatch) for module in PROGRAMS))


def test_programs_speak_of_flags_that_exist(monkeypatch):
    known = every_flag(monkeypatch)
    for module in PROGRAMS:
        said = commands.program_of(module).__doc__
        for flag in re.findall(r"(?<![\w-])--[a-z_]+", said):
            assert flag in known, f"{module} speaks of {flag}, which no program has"


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_keys_in_sentences_exist(page, monkeypatch):
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    spans = " ".join(re.findall(r"`([^`]+)`", prose))
    known = every_flag(monkeypatch)
    known |= set(
        re.findall(
            r"--[a-z_]+", "".join(file.read_text() for file in (ROOT / "launch").glob("*.*"))
        )
    )
    outside = re.sub(r"XLA_FLAGS=\S+|(gcloud|kubectl|git|pip|uv) .*", "", spans)
    for flag in re.findall(r"(?<![\w-])--[a-z_]+", outside):
        assert flag in known, f"{page} speaks of {flag}, which no program has"
    keys = flatten(base())
    sections = "|".join({key.partition(".")[0] for key in keys if "." in key})
    for key in re.findall(rf"(?<![\w./])(?:config\.)?((?:{sections})\.[a-z_]+)\b(?![./(])", spans):
        assert key in keys or key.endswith((".py", ".json")), (
            f"{page} speaks of the key {key}, which there is not"
        )


@pytest.mark.parametrize("page", PAGES)
def test_extras_exist(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for names in re.findall(r'"\.\[([\w,]+)\]"', PAGES[page]):
        assert set(names.split(",")) <= extras.keys()


def anchors(text: str) -> set[str]:
    """The names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name
        assert target.exists(), f"{page} links {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{page} links {link}"


def test_readme_is_a_front_door():
    """It has at most 200 lines, and links every page."""
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 200
    for page in PAGES:
        assert page == "README.md" or f"({page})" in readme


# ---------------------------------------------------------------- slow

SENTENCES = [
    ("the king saw a good film", "der könig sah einen film", "good"),
    ("a dull film by the sea", "ein film am meer", "bad"),
    ("what a fine old story", "ein mann läuft", "good"),
    ("the dog ran and the king slept", "der hund lief", "bad"),
]


def make_data(folder) -> None:
    """The files that README's reader would have, of a few sentences."""
    texts = []
    for number in range(60):
        for english, _, _ in SENTENCES:
            texts.append(f"{english} , {number} times .\n")
    for name in ("corpus", "openwebtext", "data"):
        (folder / name).mkdir()
    records = "".join(json.dumps({"text": text * 3}) + "\n" for text in texts)
    (folder / "corpus/a.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    pq.write_table(
        pa.table({"text": [text * 3 for text in texts]}), folder / "openwebtext/a.parquet"
    )
    (folder / "input.txt").write_text("".join(texts) * 3)
    (folder / "words.txt").write_text("".join(texts) * 3)
    for name in ("train", "val", "test"):
        for language, place in (("en", 0), ("de", 1)):
            lines = "".join(sentence[place] + "\n" for sentence in SENTENCES * 6)
            (folder / f"{name}.{language}.gz").write_bytes(gzip.compress(lines.encode()))
    for task in ("multi30k", "sst2"):  # where the recipes look
        (folder / "data" / task).symlink_to(folder)
    (folder / "runs/quickstart").mkdir(parents=True)
    (folder / "runs/quickstart/data").symlink_to(folder / "data/mine")
    for names, labels in (
        (("reviews", "reviews_val"), None),
        (("train", "dev"), {"good": "1", "bad": "0"}),
    ):
        lines = []
        for english, _, label in SENTENCES * 6:
            lines.append(f"{english}\t{labels[label] if labels else label}\n")
        for name in names:
            (folder / f"{name}.tsv").write_text("".join(lines))


def reader(words: list[str], folder, given: str):
    """Runs Python in the reader's directory, on one device."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FLAGS}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=env,
        input=given,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcomes(folder):
    """What came of the commands, in the order of README, then of the recipes."""
    make_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        once = {}
        for command in SHOWN:
            once.setdefault(command.words, command)
        chosen = [command for command in once.values() if rule_of(command).does == "run"]
        words = [runnable(command) for command in chosen]
    return dict(zip(chosen, reader([str(ROOT / "tests/commands.py")], folder, json.dumps(words))))


@pytest.mark.slow
def test_each_command_runs(outcomes):
    wrong = []
    for command, o in outcomes.items():
        if o["error"]:
            wrong.append(f"{command}\nrun as {shlex.join(o['words'])}\n{o['said']}{o['error']}")
    assert not wrong, "\n\n".join(wrong)


PYTHON_RUNS = {  # the run that a statement of README's Python needs, where it is not runs/mine
    "läuft": "runs/multi30k",
    "'role'": "runs/dialogue",
}
EACH_STATEMENT = """
import json, sys
runs, statements = json.load(sys.stdin)
for run, statement in zip(runs, statements):
    known = {}
    exec("import jaxlm", known)
    known["lm"] = jaxlm = known["jaxlm"].load(run)
    exec(statement, known)
print(json.dumps(len(statements)))
"""


@pytest.mark.slow
def test_readmes_python_runs(outcomes, folder):
    (block,) = [block for block in PYTHON if "jaxlm.load" in block]
    statements = [ast.unparse(statement) for statement in ast.parse(block).body]
    runs = []
    for statement in statements:
        needed = (run for words, run in PYTHON_RUNS.items() if words in statement)
        runs.append(next(needed, "runs/mine"))
    done = reader(["-c", EACH_STATEMENT], folder, json.dumps([runs, statements]))
    assert done == len(statements)
