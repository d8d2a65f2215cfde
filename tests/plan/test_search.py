"""search: arithmetic prunes, what remains is compiled; what it suggests helps by its own count."""

from types import SimpleNamespace

import pytest

from jaxlm.config.recipe import load
from jaxlm.plan.search import changed, estimate, faster, options, remedies, search
from jaxlm.plan.topology import Topology


@pytest.fixture(scope="module")
def pod():
    return Topology("v5e:4x4", "v5e", (4, 4), 1, list(range(16)), False)


@pytest.fixture(scope="module")
def config():
    c = load("configs/llama.py:1b")
    c.data.seq_len = 2048
    c.train.batch_size = 32
    return c


@pytest.fixture(scope="module")
def found(config, pod):
    return list(options(config, pod))


def compiler(limit):
    """(compile, what it was asked for): a plan fits where remat keeps little."""
    asked = []

    def compile(config):
        asked.append((config.mesh.tensor, config.model.remat, config.train.grad_accumulation))
        return SimpleNamespace(memory={"needed": config.model.remat in limit, "available": 0})

    return compile, asked


def test_options_are_valid_and_different(found):
    overrides = []
    for option in found:
        overrides.append(tuple(option.overrides.items()))
    assert len(overrides) == len(set(overrides)) > 20
    assert all(32 % option.overrides["train.grad_accumulation"] == 0 for option in found)


def test_arithmetic_knows_what_a_setting_is_for(config, pod):
    """Keeping more costs memory and saves time; microbatches save memory; tensor parallelism sends more."""

    def at(**overrides):
        return estimate(config, {key.replace("__", "."): n for key, n in overrides.items()}, pod)

    full = at()
    none = at(model__remat="none")
    parts = at(train__grad_accumulation=2)
    assert full.memory < none.memory
    assert none.seconds < full.seconds
    assert parts.seconds > full.seconds
    assert (
        at(train__batch_size=512, train__grad_accumulation=2).memory
        < at(train__batch_size=512).memory
    )
    assert at(mesh__tensor=8).seconds > full.seconds
    assert at(mesh__tensor=3) is None  # 16 devices cannot be split so


def test_the_fastest_that_should_fit_are_compiled(config, pod, found):
    compile, asked = compiler(limit=())
    plans = search(config, pod, compile, 3)
    fits = sorted((o for o in found if o.memory <= 1.1 * pod.spec.memory), key=lambda o: o.seconds)
    assert [overrides for overrides, _ in plans] == [option.overrides for option in fits[:3]]
    assert len(asked) == 3


def test_what_does_not_fit_rules_out_what_needs_more(config, pod, found):
    compile, asked = compiler(limit=("none",))
    memory = {}
    for option in found:
        memory[tuple(option.overrides.values())] = option.memory
    plans = search(config, pod, compile, 6)
    limit = float("inf")
    for (_, plan), key in zip(plans, asked):
        assert memory[key] < limit
        if plan.memory["needed"]:
            limit = memory[key]
        else:
            limit = limit


def test_remedies_need_less_and_come_in_order(config, pod):
    big = changed(config, {"train.batch_size": 2048, "model.remat": "dots"})
    now = estimate(big, {}, pod).memory
    found = list(remedies(big, pod, int(4 * pod.spec.memory)))
    assert found[0] == {"model.remat": "full"}
    assert {
        "train.grad_accumulation",
        "train.batch_size",
    } <= {key for overrides in found for key in overrides}
    assert all(estimate(big, overrides, pod).memory < now for overrides in found)


def test_a_faster_setting_is_suggested_only_where_there_is_room(config, pod):
    rows = faster(config, pod)
    assert rows
    assert all(saves >= 0.05 and needs < pod.spec.memory for _, saves, needs in rows)
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)
    for overrides, saves, _ in rows:
        assert estimate(config, overrides, pod).seconds == pytest.approx(
            (1 - saves) * estimate(config, {}, pod).seconds
        )
    assert faster(changed(config, {"train.batch_size": 2048}), pod) == []
