"""Every recipe for a pod compiles there and fits, with the figures of its docstring. launch/test.sh runs one or all."""

import json
import os
import re
import runpy
from pathlib import Path

import pytest
from conftest import program

ROW = re.compile(
    r"^ *(?P<arg>\w\S*,\S+) +(?P<needs>[\d.]+) of \d+ GiB +(?P<step>[\d.]+) s +(?P<mfu>[\d.]+)%",
    re.MULTILINE,
)
RECIPES = ("llama", "mixtral")
TOLD = [
    (recipe, row)
    for recipe in RECIPES
    for row in ROW.finditer(Path(f"configs/{recipe}.py").read_text())
]


def test_every_pod_is_in_its_recipes_docstring():
    pods = set()
    for recipe in RECIPES:
        for arg in runpy.run_path(f"configs/{recipe}.py")["PODS"]:
            pods.add((recipe, arg))
    assert {(recipe, row["arg"]) for recipe, row in TOLD} == pods


def recipes():
    turn = int(os.environ.get("JAXLM_TEST_TURN", "0")) % len(TOLD)
    for number, (recipe, row) in enumerate(TOLD):
        marks = [pytest.mark.pods]
        if number == turn:
            marks.append(pytest.mark.in_turn)
        yield pytest.param(recipe, row, marks=marks, id=f"{recipe}:{row['arg']}")


@pytest.mark.parametrize("recipe, row", list(recipes()))
def test_a_pod_recipe_fits_and_is_as_its_docstring_says(recipe, row, tmp_path):
    """8b,v5p-1024x2: two slices of v5p-1024."""
    chip, _, slices = row["arg"].split(",")[1].partition("x")
    flags = f"--config=configs/{recipe}.py:{row['arg']} --topology={chip} --slices={slices or 1}".split()
    run = program("jaxlm.plan", *flags, f"--json={tmp_path / 'plan.json'}")
    print(run.stdout)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"]
    assert found["compile_seconds"] < 480
    assert found["memory"]["needed"] / 2**30 == pytest.approx(float(row["needs"]), rel=0.03)
    assert found["time"]["step"] == pytest.approx(float(row["step"]), rel=0.03)
    assert 100 * found["mfu"] == pytest.approx(float(row["mfu"]), rel=0.03)
