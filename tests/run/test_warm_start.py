"""Runs that build on runs: the same tokens and labels or a refusal; adapters folded in; nothing taken in silence."""

import json

import jax
import numpy as np
import pytest
from conftest import body_logits, fresh_state, mesh_of, program, refused, small_config
from test_examples import write
from test_lora import with_noise

import jaxlm
from jaxlm.config import recipe
from jaxlm.config.check import check
from jaxlm.config.recipe import flatten
from jaxlm.data.batches import describe, fingerprint, load_tokenizer
from jaxlm.data.prepare import prepare
from jaxlm.errors import UserError
from jaxlm.generate.lm import LM
from jaxlm.lora.__main__ import write_run
from jaxlm.run.checkpoint import describe_run, name_of
from jaxlm.run.inherit import agree, inherit, overruled
from jaxlm.run.resume import rate_jump
from jaxlm.run.warm_start import warm_start
from jaxlm.step.optim import schedule
from jaxlm.step.state import init_state

TEXTS = ["a fine day", "a rainy day", "some fine rain"]
ROWS = {
    "classify": [
        {"text": text, "label": label} for text, label in zip(TEXTS, ("good", "bad", "good"))
    ],
    "sft": [{"prompt": text, "response": text[::-1]} for text in TEXTS],
    "dpo": [{"prompt": text, "chosen": text[::-1], "rejected": text} for text in TEXTS],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_dir):
    """Examples of each task; `chars`: the text of text_dir with another tokenizer."""
    path = tmp_path_factory.mktemp("start")
    for task, rows in ROWS.items():
        write(path / f"{task}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(text_dir.parent)], path / "chars", tokenizer="chars", workers=1)
    return path


def settings(folder, task="classify", **more):
    """A config as train would have it before `inherit`, of examples in bytes, or for lm of the tokens data__path."""
    if task == "lm":
        data = {"data__path": ""}
    else:
        data = {}
        for key in FILES:
            data[key] = str(folder / f"{task}.jsonl")
    if task == "classify":
        model = "encoder"
    else:
        model = "decoder"
    if task != "lm":
        given = {"data__tokenizer": "bytes"}
    else:
        given = {}
    given |= {"task__name": task, "model__name": model, "model__vocab_size": 0, "eval__every": 0}
    c = small_config(**given | data | more)
    c.model.num_labels = 0
    return c


FILES = ("data__train", "data__val")


def make_run(path, c, noise=False):
    """A run directory of an untrained model; noise: with adapters that do something."""
    vocab_size, c.data.labels, _ = describe(c)
    c = recipe.resolve(c, vocab_size)
    params = fresh_state(c).params
    tokenizer = load_tokenizer(c)
    params = with_noise(params) if noise else params
    write_run(path, 1, params, describe_run(c, tokenizer, fingerprint(c)), c, tokenizer)
    return str(path)


@pytest.fixture(scope="module")
def runs(folder, text_dir):
    made = {"lm": make_run(folder / "lm", settings(folder, "lm", data__path=str(text_dir)))}
    made["classify"] = make_run(folder / "classify", settings(folder))
    made["sft"] = make_run(folder / "sft", settings(folder, "sft"))
    adapters = settings(folder, model__lora_rank=4, seed=3)
    made["adapters"] = make_run(folder / "adapters", adapters, noise=True)
    return made


def problems_of(c):
    """What train says before it begins, and the config that it would resolve."""
    problems = inherit(c)
    vocab_size, c.data.labels, _ = describe(c)
    problems += agree(c, vocab_size)
    return problems + check(c, 1, vocab_size), recipe.resolve(c, vocab_size)


@pytest.mark.parametrize("key", ["train__init_from", "task__teacher"])
def test_other_tokens_are_refused_with_both_names(folder, runs, text_dir, key):
    more = {key: runs["lm"]} | ({"task__distill": 0.5} if key == "task__teacher" else {})
    (problem,), _ = problems_of(settings(folder, "lm", data__path=str(folder / "chars"), **more))
    for words in (
        "lm: its tokenizer (bytes, 257 tokens",
        "not the data's (chars",
        f"--tokenizer={runs['lm']}",
    ):
        assert words in problem
    assert "\n" not in problem
    same = settings(folder, "lm", data__path=str(text_dir), **more)
    assert problems_of(same)[0] == []


def test_examples_are_told_to_use_the_tokenizer_of_the_run(folder, runs):
    (problem,), _ = problems_of(
        settings(folder, train__init_from=runs["lm"], data__tokenizer=str(folder / "chars"))
    )
    assert f"give --config.data.tokenizer={runs['lm']}" in problem
    assert (
        problems_of(settings(folder, train__init_from=runs["lm"], data__tokenizer="words"))[0] == []
    ), "inherited"


def test_what_the_run_has_otherwise_than_the_user_asks_is_told(folder, runs):
    c = settings(folder, train__init_from=runs["lm"], model__embed_dim=64, model__dropout=0.3)
    before = flatten(c)
    theirs = jaxlm.load(runs["lm"]).config.model.embed_dim
    assert inherit(c) == []
    (line,) = overruled(
        ["model.embed_dim", "model.dropout", "model.num_heads", "train.steps"], before, c
    )
    assert (
        line
        == f"config.model.embed_dim=64 is not followed: the run of train.init_from has {theirs}"
    )


def test_train_ends_with_exit_2_and_the_other_problems_too(folder, runs, tmp_path):
    flags = [
        f"--config.data.path={folder / 'chars'}",
        f"--config.train.init_from={runs['lm']}",
        "--config.task.beta=2",
    ]
    run = refused(
        "jaxlm.train", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", *flags
    )
    assert run.returncode == 2
    assert "2 problems" in run.stderr
    assert not (tmp_path / "run").exists()
    assert "its tokenizer (bytes" in run.stderr
    assert "task.beta=2.0: task lm does not follow it (but dpo)" in run.stderr


@pytest.mark.parametrize("labels", [("good", "bad"), ("bad", "good", "unknown")])
def test_a_teacher_of_other_labels_is_refused(folder, runs, labels):
    taught = {"task__teacher": runs["classify"], "task__distill": 0.5}
    (problem,), _ = problems_of(settings(folder, data__labels=labels, **taught))
    assert "task classify with labels bad, good" in problem
    assert f"with labels {', '.join(labels)};" in problem
    assert "--config.data.labels=\"('bad', 'good')\"" in problem
    assert problems_of(settings(folder, **taught))[0] == []


def test_a_teacher_of_another_task_is_refused_whatever_its_tokenizer(folder, runs):
    taught = {
        "task__teacher": runs["sft"],
        "task__distill": 0.5,
        "data__tokenizer": str(folder / "chars"),
    }
    (problem,), _ = problems_of(settings(folder, **taught))
    assert (
        "are of task sft, this run's of task classify with labels bad, good; give another teacher"
        in problem
    )
    assert "tokenizer" not in problem


def test_a_teacher_must_know_the_ids_of_the_task(folder, runs, text_dir):
    """A reference that has never seen a dialogue has no rows for its special tokens."""
    (problem,), _ = problems_of(settings(folder, "dpo", train__init_from=runs["lm"]))
    assert "a model of 257 ids" in problem
    assert "give a run of task sft" in problem
    found, c = problems_of(settings(folder, "dpo", train__init_from=runs["sft"]))
    assert found == []
    assert c.task.teacher == runs["sft"]
    wide = make_run(
        folder / "wide", settings(folder, "lm", data__path=str(text_dir), model__vocab_size=320)
    )
    taught = {"task__teacher": wide, "task__distill": 0.5, "data__path": str(text_dir)}
    (problem,), _ = problems_of(settings(folder, "lm", **taught))
    assert "set --config.model.vocab_size=320" in problem
    assert problems_of(settings(folder, "lm", model__vocab_size=320, **taught))[0] == []


def begun(c):
    """The parameters that a run of a checked config begins with, and those that it would have had."""
    mesh = mesh_of(1)
    with jax.set_mesh(mesh):
        fresh = init_state(c, mesh).params
        return warm_start(fresh, c), fresh


def test_a_vocabulary_grows_with_the_task(folder, runs):
    found, c = problems_of(settings(folder, "sft", train__init_from=runs["lm"]))
    assert found == []
    assert c.model.vocab_size == 257 + 9
    params, fresh = begun(c)
    np.testing.assert_array_equal(
        params["embed"]["tokens"][:257], jaxlm.load(runs["lm"]).params["embed"]["tokens"]
    )
    np.testing.assert_array_equal(params["embed"]["tokens"][257:], fresh["embed"]["tokens"][257:])


@pytest.mark.parametrize("labels", [(), ("good", "bad"), ("bad", "good", "unknown")])
def test_a_head_of_other_labels_begins_anew_and_is_told(folder, runs, labels, capsys):
    found, c = problems_of(
        settings(folder, train__init_from=runs["classify"], data__labels=labels, seed=7)
    )
    assert found == []
    params, fresh = begun(c)
    before = jaxlm.load(runs["classify"]).params
    told = capsys.readouterr().out
    of = "task classify with labels"
    jax.tree.map(np.testing.assert_array_equal, params["layers"], before["layers"])
    kept = fresh if labels else before
    jax.tree.map(np.testing.assert_array_equal, params["head"], kept["head"])
    new = f"its head of {of} bad, good is left, for a new one of {of} {', '.join(labels)}"
    assert (new in told) == bool(labels)
    assert ("head/kernel" in told) == bool(labels)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_begun_from_one_with_adapters_computes_the_same(folder, runs, rank, capsys):
    """Folded in, also where the run that begins has adapters of its own."""
    found, c = problems_of(
        settings(folder, train__init_from=runs["adapters"], model__lora_rank=rank)
    )
    assert found == []
    params, _ = begun(c)
    told = capsys.readouterr().out
    assert "its adapters are folded in" in told
    assert "not used" not in told
    assert any("lora_" in name_of(path) for path, _ in jax.tree.leaves_with_path(params)) == bool(
        rank
    )
    before = jaxlm.load(runs["adapters"])
    tokens = np.arange(64).reshape(2, 32)
    after = LM(c, params, before.tokenizer, mesh_of(1), 0)
    np.testing.assert_allclose(body_logits(after, tokens), body_logits(before, tokens), atol=1e-5)
    plain = LM(c, params | {"layers": begun_without(folder, c)}, before.tokenizer, mesh_of(1), 0)
    assert np.abs(body_logits(plain, tokens) - body_logits(before, tokens)).max() > 1e-2, (
        "adapters that do something"
    )


def begun_without(folder, c):
    """The layers that the run with adapters had at the start, when these did nothing."""
    plain = c.copy_and_resolve_references()
    plain.seed = 3
    return fresh_state(plain).params["layers"]


# ---------------------------------------------------------------- what became of them


@pytest.fixture(scope="module")
def preferring(folder, runs):
    """Two steps of preferences."""
    path = folder / "dpo"
    flags = []
    for key in FILES:
        flags.append(f"--config.{key.replace('__', '.')}={folder / 'dpo.jsonl'}")
    flags += [
        "--config.task.name=dpo",
        f"--config.train.init_from={runs['sft']}",
        "--config.train.steps=2",
    ]
    flags += [
        "--config.optim.name=adamw",
        "--config.eval.max_tokens=8",
        "--config.log.tensorboard=False",
    ]
    flags += [
        "--config.data.path=",
        "--config.train.batch_size=2",
        "--config.eval.generate=1",
        "--config.data.seq_len=64",
    ]
    out = program(
        "jaxlm.train", "--config=configs/quickstart.py", f"--workdir={path}", *flags
    ).stdout
    assert f"starts from {runs['sft']}" in out
    return path


def test_a_model_of_labels_writes_no_text(runs):
    lm = jaxlm.load(runs["classify"])
    for call in (lm.generate, lm.loss):
        with pytest.raises(UserError, match=r"use lm\.answer"):
            call("a fine day")
    assert lm.answer("a fine day") == lm.answer(["a fine day"])


def test_a_model_of_preferences_answers(preferring, tmp_path):
    (answer,) = jaxlm.load(preferring).answer(["a fine day"], max_tokens=8)
    shown = program(
        "jaxlm.generate",
        f"--workdir={preferring}",
        "--prompt=a fine day",
        "--temperature=0",
        "--max_tokens=8",
    )
    assert shown.stdout == answer + "\n"
    files = (
        f"--answers={tmp_path / 'answers.jsonl'}",
        f"--json={tmp_path / 'figures.json'}",
        "--max_tokens=8",
    )
    program("jaxlm.evaluate", f"--workdir={preferring}", *files)
    answers = []
    for line in (tmp_path / "answers.jsonl").read_text().splitlines():
        answers.append(json.loads(line))
    assert [row["prompt"] for row in answers] == TEXTS
    assert answers[0]["answer"] == answer
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"loss", "accuracy", "margin", "chrf"} <= set(figures)
    assert figures["pairs"] == 3
    rows = []
    for line in (preferring / "metrics.jsonl").read_text().splitlines():
        rows.append(json.loads(line))
    assert any("eval/chrf" in row for row in rows)


def test_without_its_reference_a_model_of_preferences_says_what_it_lacks(
    preferring, folder, tmp_path
):
    (folder / "sft").rename(tmp_path / "moved")
    try:
        run = refused("jaxlm.evaluate", f"--workdir={preferring}")
        assert run.returncode == 4
        assert "config.task.teacher" in run.stderr
        assert "Traceback" not in run.stderr
        assert len(jaxlm.load(preferring).answer(["a fine day"], max_tokens=4)) == 1
    finally:
        (tmp_path / "moved").rename(folder / "sft")


def test_a_pupil_answers_without_its_teacher(folder, runs, tmp_path):
    c = settings(folder, task__teacher=runs["classify"], task__distill=0.5)
    assert inherit(c) == []
    lm = jaxlm.load(make_run(tmp_path / "pupil", c))
    assert lm.config.task.distill == 0
    assert set(lm.answer(["a fine day"])[0]) == {"bad", "good"}
    run = program("jaxlm.evaluate", f"--workdir={tmp_path / 'pupil'}", "--bootstrap=0")
    assert "accuracy" in run.stdout


# ---------------------------------------------------------------- a schedule that is changed at a resume


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({"train__steps": 500}, {"train__steps": 1000}, "train.steps 500 -> 1000"),
        (
            {"optim__schedule": "constant"},
            {"optim__schedule": "linear"},
            "optim.schedule constant -> linear",
        ),
        ({"optim__warmup_steps": 0}, {"optim__warmup_steps": 800}, "optim.warmup_steps 0 -> 800"),
        ({"optim__end_factor": 0.1}, {"optim__end_factor": 0.5}, "optim.end_factor 0.1 -> 0.5"),
        ({}, {"optim__learning_rate": 1e-3}, "optim.learning_rate 0.01 -> 0.001"),
        (
            {"optim__name": "muon"},
            {"optim__name": "muon", "optim__adam_learning_rate": 1e-3},
            "Adam's part",
        ),
        ({}, {}, None),
        (
            {"train__steps": 600},
            {"train__steps": 1000, "train__stop_at": 500},
            None,
        ),  # no step is left
        (
            {"optim__schedule": "constant", "train__steps": 500},
            {"optim__schedule": "constant"},
            None,
        ),
        (
            {"optim__end_factor": 0.1},
            {"optim__end_factor": 0.1001},
            None,
        ),  # by a thousandth: no jump
        ({}, {"optim__adam_learning_rate": 1e-3}, None),  # which adamw doesn't follow
    ],
    ids=str,
)
def test_a_learning_rate_that_jumps_at_a_resume_is_told(before, after, named):
    usual = {"train__steps": 1000, "optim__warmup_steps": 25}
    old, new = (small_config(**usual | settings) for settings in (before, after))
    line = rate_jump(new, {"config": json.loads(json.dumps(flatten(old)))}, 500, 0)
    if named is None:
        assert line == ""
        return
    assert named in line
    assert "\n" not in line
    assert rate_jump(new, {}, 500, 0) == "", "a new run"
    if "Adam" in named:
        key = "adam_learning_rate"
    else:
        key = "learning_rate"
    was, now = (float(schedule(config, config.optim[key])(500)) for config in (old, new))
    assert f"at step 501 was {was:.2e} under the checkpoint's config, and is {now:.2e} now" in line


def test_steps_that_were_dropped_do_not_count_for_the_rate_that_is_told():
    old = small_config(train__steps=500)
    new = small_config(train__steps=1000)
    line = rate_jump(new, {"config": flatten(old)}, 500, 100)
    assert f"was {float(schedule(old, old.optim.learning_rate)(400)):.2e}" in line
