"""A config is found by path, by name, or in a run; what a run resolved is resolved again to the same."""

import json
import shutil
import tomllib

import pytest
from conftest import ROOT

from jaxlm.config import recipe, shipped, sources
from jaxlm.errors import ConfigError


def save(folder, flat) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(flat))
    return str(path)


@pytest.mark.parametrize("name", shipped.names())
def test_a_shipped_recipe_has_a_name(name, tmp_path, monkeypatch):
    by_path = recipe.flatten(sources.load(str(ROOT / f"configs/{name}.py")))
    monkeypatch.chdir(tmp_path)
    assert recipe.flatten(sources.load(name)) == by_path


def test_a_wheel_has_its_recipes_beside_the_code(tmp_path, monkeypatch):
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    (goal,) = [
        to
        for source, to in build["targets"]["wheel"]["force-include"].items()
        if source == "configs"
    ]
    shutil.copytree(ROOT / "configs", tmp_path / goal)
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "jaxlm/config/shipped.py"))
    assert shipped.folder() == tmp_path / goal
    assert shipped.names() == sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
    assert recipe.flatten(sources.load("quickstart"))


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = "from jaxlm.config import base\n\n\ndef get_config():\n    return base()\n"
    (tmp_path / "llama").write_text(own)
    with pytest.raises(ConfigError, match=r"\.py file"):
        sources.load("llama")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("lama", "did you mean llama?"),
        ("llama.py", "did you mean llama?"),
        ("llama:9b", "no variant '9b'"),
        ("configs/llama.py", "the recipe comes with jaxlm: --config=llama"),
        ("nowhere/config.json", "nowhere/config.json: No such file"),
    ],
)
def test_what_is_not_there_names_what_is(spec, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        sources.load(spec)


@pytest.mark.parametrize("name", ["quickstart", "sst2", "multi30k:2017", "llama:8b", "vectors"])
def test_a_runs_config_is_the_run_again(name, tmp_path):
    resolved = recipe.resolve(recipe.load(name), 1000)
    path = save(tmp_path, recipe.flatten(resolved))
    for spec in (path, str(tmp_path)):
        again = recipe.resolve(sources.load(spec), 1000)
        assert recipe.flatten(again) == recipe.flatten(resolved)


def test_what_was_derived_follows_what_it_is_derived_from(tmp_path):
    resolved = recipe.resolve(recipe.load("quickstart"), 1000)
    config = sources.load(save(tmp_path, recipe.flatten(resolved)))
    steps = 2 * resolved.train.steps
    assert not recipe.override(config, [("train.steps", str(steps))])
    assert recipe.resolve(config, 1000).train.stop_at == steps


@pytest.mark.parametrize(
    ("flat", "says"),
    [
        ([1], "it has no keys"),
        ({"model.num_layer": 3}, "did you mean model.num_layers?"),
        ({"model.num_layers": "three"}, "num_layers"),
    ],
)
def test_a_file_that_is_no_runs_config_is_refused(flat, says, tmp_path):
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        sources.load(save(tmp_path, flat))


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        sources.load(str(tmp_path))
