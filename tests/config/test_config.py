"""Configs: every problem at once, with the nearest right thing; recipes that are sound; types that hold."""

import errno
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import program, refused, small_config

from jaxlm import cli
from jaxlm.config import recipe as configs
from jaxlm.config.check import check, mixture
from jaxlm.config.problems import require
from jaxlm.errors import ConfigError
from jaxlm.plan import topology

RECIPES = [
    "shakespeare_char.py:cpu", "shakespeare_char.py:gpu", "quickstart.py", "gpt2.py", "llama.py:8b", "llama.py:1b",
    "mixtral.py:8x7b", "mixtral.py:small", "shakespeare_char.py:lstm", "shakespeare_char.py:masked",
    "shakespeare_char.py:ngram", "sst2.py", "sst2.py:lstm", "multi30k.py:cpu", "multi30k.py:lstm", "multi30k.py:gpu",
    "multi30k.py:2017", "qa.py", "summarize.py", "dialogue.py", "vectors.py", "vectors.py:glove",
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_sound(recipe):
    assert check(configs.load(f"configs/{recipe}")) == []


def pods():
    """(recipe, devices): configs/NAME.py:SIZE,TOPOLOGY[xSLICES]."""
    llama = runpy.run_path("configs/llama.py")["PODS"]
    for recipe in [*(f"llama.py:{name}" for name in llama), "mixtral.py:8x7b,v5p-128"]:
        name, _, slices = recipe.split(",")[1].partition("x")
        yield pytest.param(recipe, math.prod(topology.parse(name)[1]), int(slices or 1), id=recipe)


@pytest.mark.parametrize(("recipe", "devices", "slices"), list(pods()))
def test_every_pod_recipe_is_sound_on_its_pod(recipe, devices, slices):
    c = configs.load(f"configs/{recipe}")
    c.mesh.slices = slices
    assert check(c, devices * slices) == []


def test_every_recipe_is_tested():
    assert {p.name for p in Path("configs").glob("*.py")} == {
        name.partition(":")[0] for name in RECIPES
    }


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [("1e-3", 0.1, 1e-3), ("3", 0.1, 3.0), ("1e6", 5, 1_000_000), ("1_000", 5, 1000), ("false", True, False),
     ("SSSL", "L", "SSSL"), ("[('a', 1.0)]", (("b", 0.0),), (("a", 1.0),))],
)  # fmt: skip
def test_text_becomes_the_type_of_the_default(text, default, value):
    got = configs.parse(text, default)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("key", "text"), [("seed", "1.5"), ("seed", "x"), ("model.scan", "maybe"), ("optim.b1", "")]
)
def test_text_of_another_type_is_named(key, text):
    (problem,) = configs.override(configs.base(), [(key, text)])
    assert f"config.{key}={text}" in problem


def test_unknown_keys_suggest_the_nearest_in_any_section():
    pairs = [
        ("optim.learing_rate", "1"),
        ("lerning_rate", "1"),
        ("train.seq_len", "8"),
        ("model", "3"),
    ]
    problems = configs.override(configs.base(), [*pairs, ("train.seed", "3")])
    assert "optim.learning_rate" in problems[0]
    assert "optim.learning_rate" in problems[1]
    assert "data.seq_len" in problems[2]
    assert "did you mean seed?" in problems[4]
    assert len(problems) == 5


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optim.lr", "optim.learning_rate"),
        ("train.lr", "model.lora_rank or optim.learning_rate"),
        ("train.bs", "train.batch_size"),
        ("data.sl", "data.seq_len"),
        ("optim.wd", "optim.weight_decay"),
        ("train.learning_rate", "optim.learning_rate"),
    ],
)
def test_initials_and_other_sections_are_understood(typed, meant):
    assert configs.nearest_key(typed, configs.flatten(configs.base())) == f"; did you mean {meant}?"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"model__num_layers": -3}, "model.num_layers=-3"),
        ({"model__num_kv_heads": 3}, "model.num_kv_heads=3"),
        ({"model__dropout": 1.0}, "model.dropout=1.0"),
        ({"eval__metric": "perplexty"}, "did you mean perplexity?"),
        (
            {"eval__metric": "acc", "task__name": "classify"},
            "did you mean accuracy?",
        ),  # not auc, which looks nearer
        ({"model__norm": "batch"}, "model.norm=batch"),
        ({"model__layers": "SSX"}, "model.layers='SSX'"),
        ({"model__ngram_weights": "log_count_ratio"}, "set none, or model.name=bag"),
        ({"model__embed_ngrams": 3, "model__name": "lstm"}, "is of decoders and encoders"),
        ({"model__layers": "SSL"}, "must divide config.model.num_layers=2"),
        ({"model__vocab_size": 10}, "the tokenizer of config.data has 64 ids"),
        ({"optim__learning_rate": -1.0}, "optim.learning_rate=-1.0"),
        ({"optim__learning_rate": float("nan")}, "optim.learning_rate=nan"),
        ({"optim__warmup_steps": 50}, "optim.warmup_steps=50"),
        ({"optim__decay": (("[", 1.0),)}, "is not (regular expression, factor)"),
        ({"train__grad_accumulation": 3}, "nearest: 15 or 18"),
        ({"train__loss_chunk": 5}, "nearest: 2 or 4"),
        ({"model__attention": "xla", "model__attention_softcap": 5.0}, "set auto or reference"),
        ({"optim__decay": (("norm", "x"),)}, "is not (regular expression, factor)"),
        ({"seed": -1}, "seed=-1"),
        ({"mesh__stage": 4}, "mesh.stage=4"),
        ({"train__stop_at": 99}, "train.stop_at=99"),
        ({"mesh__tensor": 3}, "data=4 x tensor=2"),
        ({"mesh__data": 4}, "data=8"),
        ({"mesh__data": -1, "mesh__fsdp": -1}, "only one axis may be -1"),
        ({"mesh__tensor": 8}, "config.model.num_heads=4"),
        ({"train__batch_size": 12}, "(nearest: 8 or 16)"),
        (
            {"task__focal": 2.0},
            "task.focal=2.0: task lm does not follow it (but classify, multilabel, tag)",
        ),
        ({"data__word_dropout": 0.1}, "data.word_dropout=0.1: task lm does not follow it"),
        ({"data__labels": ("a", "b")}, "data.labels=('a', 'b'): task lm does not follow it"),
        (
            {"task__name": "qa", "task__distill": 0.5},
            "task.distill=0.5: task qa does not follow it (but lm, mlm",
        ),
        (
            {
                "task__name": "classify",
                "task__class_weights": "balanced",
                "task__balanced_sampling": True,
            },
            "raised twice",
        ),
        ({"task__temperature": 2.0}, "set config.task.distill as well"),
        ({"task__teacher": "runs/a"}, "teaches nothing; set config.task.distill"),
        ({"model__quantize": "fp16"}, "model.quantize=fp16: must be one of none, fp8, int8"),
        (
            {"model__name": "lstm", "model__quantize": "fp8"},
            "model.quantize=fp8: is of Transformers, not of lstm",
        ),
        ({"data__mixture": "a=1,b"}, "'b' is not DIR=WEIGHT"),
        ({"data__mixture": "a=1,b=-2"}, "'b=-2' is not DIR=WEIGHT"),
    ],
)
def test_a_problem_is_named_with_its_value(overrides, named):
    problems = check(small_config(**overrides), devices=8, vocab_size=64)
    assert any(named in problem for problem in problems), problems


def test_all_problems_come_at_once_and_no_traceback():
    run = refused(
        "jaxlm.train", "--config=configs/shakespeare_char.py", "--workdir=/nowhere/x", "--config.optim.learing_rate=1",
        "--config.model.num_heads=7", "--config.mesh.tensor=3",
    )  # fmt: skip
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    for words in (
        "optim.learing_rate",
        "optim.learning_rate?",
        "model.num_heads=7",
        "mesh.tensor=3",
    ):
        assert words in run.stderr


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--confg=configs/gpt2.py"], "did you mean --config?"),
        (["--config=configs/gtp2.py"], "did you mean configs/gpt2.py?"),
        (["--config=configs/llama.py:9b"], "it has: 2-7b, 1b, 8b"),
        (["--config=configs/gpt2.py"], "--workdir"),
        (["--config=configs/gpt2.py:big"], "no variant 'big'"),
        (["--config=README.md"], "get_config"),
        (["--config=configs/gpt2.py", "--config.model.scan", "--workdir=w"], "needs a value"),
        ([], "--config"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(args, named):
    run = refused("jaxlm.train", *args)
    assert run.returncode == 2
    assert named in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "c.optim.warmup = 5",
            "line 5: config.optim.warmup: no such key; did you mean optim.warmup_steps?",
        ),
        ("c.optim.lr = 1e-3", "did you mean optim.learning_rate?"),
        ("c.seq_len = 64", "did you mean data.seq_len?"),
        ("print(c.data.seqlen)", "did you mean data.seq_len?"),
        ("c['trian'].steps = 1", "did you mean train?"),
        (
            "c.model.name, c.train.log_every = 'lstm', 10",
            "train.log_every: no such key; did you mean log.every?",
        ),
        ("c.train.steps = 'many'", "line 5: steps = many: not a value of type int"),
        ("c.train = 5", "train = 5"),
        ("sizes = {}['big']", "line 5: KeyError: 'big'"),
        ("c.train.steps = stepz", "line 5: NameError: name 'stepz' is not defined"),
        ("c.train.steps = = 5", "line 5: SyntaxError"),
        ("import nothing_of_this_name", "line 5: ModuleNotFoundError"),
        ("return", "get_config() gave None"),
        (
            "c.data.path = c.train.steps = None",
            "sets to None: config.data.path, config.train.steps; leave a key out",
        ),
    ],
)
def test_what_is_wrong_in_a_recipe_is_told_with_its_line(line, said, tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        f"from jaxlm.config import base\n\ndef get_config():\n    c = base()\n    {line}\n    return c\n"
    )
    with pytest.raises(ConfigError) as error:
        configs.load(str(recipe))
    assert said in str(error.value)
    assert str(recipe) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_recipe_that_needs_a_variant_asks_for_one(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text("def get_config(size):\n    return size\n")
    with pytest.raises(ConfigError, match=r"mine\.py:VARIANT"):
        configs.load(str(recipe))


def test_require_lists_all():
    with pytest.raises(ConfigError, match="2 problems") as error:
        require(["one", "two"])
    assert "one" in str(error.value)
    assert "two" in str(error.value)


def test_mixture_weights_sum_to_one():
    assert mixture(small_config(data__mixture="a=1, b=3")) == [("a", 0.25), ("b", 0.75)]


def test_warm_up_follows_the_length_of_the_run():
    assert small_config(optim__warmup_steps=-1, train__steps=200).optim.warmup_steps == 10
    c = configs.load("configs/shakespeare_char.py")
    assert configs.override(c, [("train.steps", "20")]) == []
    assert check(c) == []


def test_a_config_survives_json():
    c = small_config(optim__decay=((r"norm", 0.0), (r".*", 0.5)))
    c.task.teacher_model = tuple(c.model.items())  # with tuples in it
    assert configs.unflatten(json.loads(json.dumps(configs.flatten(c)))) == c


def test_dry_run_of_llama_8b_touches_no_data_and_counts_parameters():
    out = program("jaxlm.train", "--config=configs/llama.py:8b", "--dry_run", "--devices=64").stdout
    for words in (
        "8,030,261,248",
        "FLOPs per token",
        "tokens per step",
        "optimizer",
        "gradients",
        "checkpoint",
        "fsdp",
    ):
        assert words in out


def test_print_config_shows_every_key():
    out = program(
        "jaxlm.train", "--config=configs/gpt2.py", "--config.seed=5", "--print_config"
    ).stdout
    assert "seed = 5" in out
    assert all(f"{key} = " in out for key in configs.flatten(configs.base()))


def test_warnings_of_programs_are_plain_lines():
    lines = [
        "import logging",
        "from jaxlm import cli",
        "logging.basicConfig()",  # as some libraries do
        "cli.run(lambda argv: logging.getLogger('jaxlm').warning('so it is'))",
    ]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert run.stderr == "so it is\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [("nofolder/x.json", "there is no directory"), ("", "is a directory")],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(name, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        cli.require_writable("--json", str(tmp_path / name))
    cli.require_writable("--json", str(tmp_path / "x.json"))
    cli.require_writable("--json", None)


def test_a_file_in_a_directory_of_others_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # to root, all is allowed
    with pytest.raises(ConfigError, match="may not write there"):
        cli.require_writable("--output", str(tmp_path / "x.txt"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_told_without_a_traceback(number, capsys, monkeypatch):
    monkeypatch.setattr(
        cli, "warn_plainly", lambda: None
    )  # whose handler would stay for other tests

    def main(argv):
        raise OSError(number, os.strerror(number), "runs/x")

    with pytest.raises(SystemExit) as left:
        cli.run(main)
    assert left.value.code == 1
    assert capsys.readouterr().err == f"error: runs/x: {os.strerror(number)}\n"


def test_json_for_people_has_letters_of_any_script_and_comes_back():
    value = {"label": "хорошо 好", "broken": "half \ud800"}
    assert "хорошо 好" in cli.readable_json(value)
    assert json.loads(cli.readable_json(value)) == value
    cli.readable_json(value).encode("utf-8")
