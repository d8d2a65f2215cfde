"""tune: what of a space can never run is said before the first trial, all of it at once."""

import pytest
from conftest import ROOT

from jaxlm.config import recipe as configs
from jaxlm.config.check import check
from jaxlm.errors import ConfigError
from jaxlm.tune import __main__ as tune
from jaxlm.tune.feasible import COMBINATIONS, judge
from jaxlm.tune.space import read_space

SENTENCES = [
    f"a {word} film\t{label}" for word, label in (("good", 1), ("bad", 0), ("fine", 1), ("dull", 0))
]


def verdict(texts, recipe="quickstart.py", overrides=()):
    config = configs.load(f"{ROOT}/configs/{recipe}")
    assert not configs.override(config, overrides)
    space, problems = read_space(list(texts), config)
    assert not problems
    return judge(config, space, check)


@pytest.mark.parametrize(
    ("recipe", "space", "says"),
    [
        (
            "sst2.py",
            "model.name=choice:lstm,bilstm",
            ["model.ngram_weights=log_count_ratio: is of a bag"],
        ),
        (
            "sst2.py:lstm",
            "model.name=choice:lstm,ngram",
            ["ngram can never run: config.model.name=ngram: task"],
        ),
        ("quickstart.py", "model.num_heads=int:1:5", ["5 can never run", "embed_dim"]),
        ("quickstart.py", "model.num_heads=choice:3,4,5", ["3 can never run", "5 can never run"]),
        (
            "quickstart.py",
            "train.grad_accumulation=choice:1,3,5",
            ["3 can never run", "5 can never run"],
        ),
        ("quickstart.py", "model.embed_dim=int:96:130:2", ["130 can never run"]),
        ("quickstart.py", "train.batch_size=grid:15,16", ["15 can never run"]),
    ],
)
def test_a_value_that_can_never_run_is_a_problem(recipe, space, says):
    if space.startswith("train.batch_size"):
        overrides = [("train.grad_accumulation", "2")]
    else:
        overrides = []
    problems, _ = verdict([space], recipe, overrides)
    assert len(problems) == len([part for part in says if part != "embed_dim"])
    for part in says:
        assert any(part in problem for problem in problems), problems


def test_values_that_some_others_suit_are_only_noted():
    problems, notes = verdict(["model.num_heads=choice:3,4", "model.embed_dim=choice:96,128"])
    assert not problems
    (note,) = notes
    assert note.startswith("--space: 1 of 4 combinations")
    assert "model.num_heads=3 model.embed_dim=128" in note


def test_refused_values_between_the_ends_are_noted():
    problems, notes = verdict(["model.num_heads=int:1:8"])
    assert not problems
    (note,) = notes
    assert "4 of these 8 values will be refused, such as 3: " in note


def test_the_values_of_the_recipe_do_not_count_where_the_space_has_others():
    assert verdict(["model.num_heads=choice:1,2"], overrides=[("model.num_heads", "3")]) == ([], [])
    assert verdict(["model.embed_dim=choice:96,192"], overrides=[("model.num_heads", "3")]) == (
        [],
        [],
    )


def test_a_space_of_many_keys_is_tried_by_a_sample_that_forbids_nothing():
    sound = []
    for key in ("b1", "b2", "momentum", "end_factor"):
        sound.append(f"optim.{key}=float:0.1:0.9")
    sound += [f"model.{key}=choice:relu2,gelu,swiglu" for key in ("mlp",)]
    sound += [
        "optim.learning_rate=log:1e-4:1e-1",
        "train.batch_size=choice:8,16",
        "data.seq_len=choice:64,128",
    ]
    sound += ["model.num_layers=int:1:4", "train.steps=int:10:500"]
    assert COMBINATIONS < 2**9 * 3
    problems, notes = verdict([*sound, "model.num_heads=choice:3,4"])
    assert not problems
    assert "3 can never run" in notes[0]
    assert verdict(sound) == ([], [])


def test_all_that_is_wrong_is_said_with_exit_code_2_and_nothing_is_made(tmp_path):
    lines = tmp_path / "lines.tsv"
    lines.write_text("\n".join(SENTENCES))
    command = [
        f"--config={ROOT}/configs/sst2.py:lstm",
        f"--config.data.train={lines}",
        f"--config.data.val={lines}",
        f"--workdir={tmp_path}/run",
        "--metric=eval/accuracy",
    ]
    space = [
        "--space=model.name=choice:lstm,ngram",
        "--space=eval.every=choice:0,10",
        "--space=data.seq_len=int:0:64",
    ]
    with pytest.raises(ConfigError) as error:
        tune.main([*command, *space, "--seeds=0"])
    for part in (
        "5 problems",
        "ngram can never",
        "0 can never run: --metric",
        "data.seq_len=0",
        "--seeds=0",
    ):
        assert part in str(error.value)
    assert error.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"nowhere\.tsv"):
        tune.main(
            [*command, f"--space=data.train=choice:{lines},{tmp_path}/nowhere.tsv", "--trials=2"]
        )
    assert not (tmp_path / "run").exists()
