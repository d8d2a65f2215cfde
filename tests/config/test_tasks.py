"""The records of tasks: what they name is there, and each problem of a config has the parts that its sentence is of."""

import pytest

from jaxlm.config.check import check
from jaxlm.config.keys import CHOICES, base
from jaxlm.config.problems import Problem
from jaxlm.config.recipe import flatten
from jaxlm.config.tasks import TASKS, less_is_better, task_of
from jaxlm.data.transforms import EXAMPLES, TOKENS
from jaxlm.evaluate.score import MEASURES
from jaxlm.step.losses import LOSSES


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_what_a_record_names_is_there(task):
    assert task.loss in LOSSES
    assert set(task.models) <= set(CHOICES["model.name"])
    assert set(task.keys) <= set(flatten(base()))
    assert set(task.intervals) <= set(task.metrics)
    if task.from_examples:
        assert task.transform in EXAMPLES
        assert set(task.asked_columns) <= set(task.column_names)
    elif not task.is_plain_lm:
        assert task.transform in {*TOKENS, "pairs"}
    if task.has_head:
        assert task.answer in MEASURES


def test_less_is_better_where_the_name_says_so():
    assert less_is_better("loss")
    assert less_is_better("bits_per_byte")
    assert less_is_better("mae")
    assert not less_is_better("accuracy")
    assert not less_is_better("spearman")


def test_an_unknown_task_is_a_problem_and_not_a_crash():
    config = base()
    config.task.name = "clasify"
    assert not task_of(config).from_examples
    (problem,) = check(config)
    assert problem.key == "task.name"
    assert problem.value == "clasify"
    assert problem.hint == "; did you mean classify?"
    assert problem.endswith(problem.hint)


def test_a_problem_is_one_sentence_of_its_parts():
    problem = Problem("model.num_heads", 5, "must divide it", "; did you mean 4?")
    assert problem == "config.model.num_heads=5: must divide it; did you mean 4?"
    assert Problem("mesh", None, "is wrong") == "config.mesh: is wrong"
