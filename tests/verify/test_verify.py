"""verify: recipes that have all that any recipe has hold, and what is broken on purpose is found and named."""

import functools
import json
import os
from functools import partial

import jax
import pytest
from conftest import StateMaker, mesh_of, program, refused
from test_config import RECIPES

from jaxlm import cli
from jaxlm.config import recipe as configs
from jaxlm.config.check import check
from jaxlm.config.keys import ATTENDING
from jaxlm.data.batches import train_batches
from jaxlm.errors import ConfigError
from jaxlm.kernels import cpu_attention, cross_entropy
from jaxlm.parallel import context_parallel as ring
from jaxlm.verify import __main__ as verify
from jaxlm.verify import laws
from jaxlm.verify.laws import Result, on_mesh, same_as_one_device, train_on
from jaxlm.verify.packing import packed_as_alone

SIZES = "model.num_heads model.num_kv_heads optim.learning_rate optim.adam_learning_rate".split()


def facts(recipe):
    """What is left of a recipe when it is shrunk: every key with its value, and the task with the model."""
    tiny = configs.flatten(verify.shrink(configs.load(f"configs/{recipe}")))
    settings = set()
    for key, value in tiny.items():
        if key not in SIZES:
            settings.add((key, str(value)))
    return settings | {(tiny["task.name"], tiny["model.name"])}


def cover(recipes):
    """Few of them, which have all that any of them has."""
    known = {recipe: facts(recipe) for recipe in recipes}
    chosen = []
    left = set().union(*known.values())
    while left:
        chosen.append(max(recipes, key=lambda recipe: len(known[recipe] & left)))
        left -= known[chosen[-1]]
    return chosen


# The other is counted, not trained.
TRAINED = [recipe for recipe in RECIPES if recipe != "shakespeare_char.py:ngram"]
COVER = cover(TRAINED)
EVERYWHERE = "mixtral.py:8x7b"  # on every mesh
IN_PROCESSES = (EVERYWHERE, "multi30k.py:2017")  # the laws of real runs; quickstart.py is the third
EACH = 4  # meshes of the others


def shrunk(recipe):
    return verify.shrink(configs.load(f"configs/{recipe}"))


def fitting(tiny):
    """The meshes that a config allows."""
    return [mesh for mesh in verify.MESHES if not check(on_mesh(tiny, mesh), 8)]


def meetings(tiny, mesh):
    """{(kind of model, axis of a mesh or word that says how)}."""
    return {(tiny.model.name, word.partition("=")[0]) for word in mesh.split()}


def rotate():
    """{recipe: its meshes}: each of the next recipe's brings most of what its kind of model has not met."""
    chosen = {}
    met = set()
    for number, recipe in enumerate(COVER):
        tiny = shrunk(recipe)
        fit = fitting(tiny)
        first = number % len(fit)
        in_turn = fit[first:] + fit[:first]
        own = []
        while len(own) < (len(fit) if recipe == EVERYWHERE else EACH):
            left = [mesh for mesh in in_turn if mesh not in own]
            own.append(max(left, key=lambda mesh: len(meetings(tiny, mesh) - met)))
            met |= meetings(tiny, own[-1])
        chosen[recipe] = own
    return chosen


MESHES = rotate()


def test_every_kind_of_model_meets_every_axis():
    found = set()
    wanted = set()
    for recipe in TRAINED:
        tiny = shrunk(recipe)
        for mesh in fitting(tiny):
            wanted |= meetings(tiny, mesh)
        for mesh in MESHES.get(recipe, ()):
            found |= meetings(tiny, mesh)
    assert found == wanted
    assert set(MESHES[EVERYWHERE]) == set(verify.MESHES)


@pytest.mark.parametrize("recipe", COVER)
def test_few_meshes_refuse_a_recipe(recipe):
    """Those along experts are for models that have some, along stages for stacked layers."""
    tiny = shrunk(recipe)
    refused = set(verify.MESHES) - set(fitting(tiny))
    allowed = {"tensor=8", "stage=4 fsdp=2", "stage=2 fsdp=2 tensor=2"}
    if not tiny.model.num_experts:
        allowed |= {mesh for mesh in verify.MESHES if "expert" in mesh}
    if tiny.model.name not in ATTENDING:
        allowed |= {mesh for mesh in verify.MESHES if "sequence" in mesh}
    assert refused <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("recipe", COVER)
def test_verify_passes_on_recipes(recipe, monkeypatch):
    monkeypatch.setattr(laws, "init_state", StateMaker())
    names = [*MESHES[recipe], "packed = alone"]
    if recipe in IN_PROCESSES:
        names += ["resumed = uninterrupted", "hosts 1 = 2"]
    else:
        monkeypatch.setattr(verify, "runs_agree", lambda tiny, folder: [])
    results = verify.verify(configs.load(f"configs/{recipe}"), MESHES[recipe])
    assert [result.name for result in results] == names
    assert all(result.ok for result in results)
    refused = set()
    for result in results:
        if "refused" in result.figures:
            refused.add(result.name)
    assert refused <= {"tensor=8", "packed = alone"}


@pytest.mark.slow
def test_verify_as_a_program(tmp_path):
    """One mesh and the runs in processes of their own: resumed, and two hosts."""
    flags = (
        "--config=configs/quickstart.py",
        "--meshes=fsdp=4 tensor=2",
        f"--json={tmp_path}/a.json",
    )
    run = program("jaxlm.verify", *flags)
    told = json.loads((tmp_path / "a.json").read_text())
    assert [law["name"] for law in told["laws"]] == [
        "fsdp=4 tensor=2", "packed = alone", "resumed = uninterrupted", "hosts 1 = 2",
    ]  # fmt: skip
    assert told["ok"]
    assert "4 hold (" in run.stdout


def test_fake_devices_have_threads_to_wait_with(monkeypatch):
    """With a thread for each, collectives beside each other can keep them all, and wait forever."""
    for flags, set_by_user, threads in (
        (
            "--xla_force_host_platform_device_count=256 --xla_backend_optimization_level=0",
            None,
            "2048",
        ),
        ("--xla_force_host_platform_device_count=256", "3", "3"),
        ("--xla_force_host_platform_device_count=1", None, None),
        ("", None, None),
    ):
        monkeypatch.setenv("XLA_FLAGS", flags)
        monkeypatch.setenv("PJRT_NPROC", set_by_user or "")
        if not set_by_user:
            monkeypatch.delenv("PJRT_NPROC")
        cli.spare_threads()
        assert os.environ.get("PJRT_NPROC") == threads
    if os.path.exists("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) >= 64  # conftest has called it for these eight


def test_a_mesh_that_does_not_exist_is_named():
    run = refused("jaxlm.verify", "--config=configs/quickstart.py", "--meshes=fspd=8")
    assert run.returncode == 2
    assert "fspd=8" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_model_that_is_counted_has_no_step_to_verify():
    with pytest.raises(ConfigError, match="counted, not trained"):
        verify.main(["--config=configs/shakespeare_char.py:ngram"])


def test_a_broken_law_is_exit_1(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(
        verify, "verify", lambda config, meshes: [Result("fsdp=8", False, {"place": "here"})]
    )
    assert verify.main(["--config=configs/quickstart.py"]) == 1
    assert "FAILED: fsdp=8" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    config = verify.shrink(configs.load("configs/llama.py:1b"))
    verify.make_data(folder, config)
    return config


@pytest.fixture(scope="module")
def batches(tiny):
    return train_batches(configs.resolve(tiny))


@pytest.fixture(scope="module")
def alone(tiny, batches):
    return functools.cache(
        partial(train_on, configs.resolve(on_mesh(tiny, "")), mesh_of(1), batches)
    )


@pytest.mark.slow
def test_a_loss_that_is_summed_twice_over_a_mesh_axis_is_found(tiny, batches, alone, monkeypatch):
    real = cross_entropy.sum_parts

    def twice(y, summed, scattered):
        y = real(y, summed, scattered)
        if summed:
            return y + y
        return y

    monkeypatch.setattr(cross_entropy, "sum_parts", twice)
    result = same_as_one_device(tiny, "fsdp=4 tensor=2", alone, batches)
    assert not result.ok
    assert result.figures["loss_difference"] > 0.01
    assert result.figures["parameter"]
    assert "the loss" in result.figures["place"]


@pytest.mark.slow
def test_a_product_that_is_not_summed_is_found_in_its_layer(tiny, batches, alone, monkeypatch):
    monkeypatch.setattr("jaxlm.parallel.linear.scatter_sum", lambda y, axis, names: jax.lax.dynamic_slice_in_dim(
        y, 0, y.shape[axis] // jax.lax.axis_size(names), axis) if names else y)  # fmt: skip
    result = same_as_one_device(tiny, "fsdp=4 tensor=2", alone, batches)
    assert not result.ok
    assert result.figures["place"] == "the output of embed"


def test_attention_that_ignores_segments_is_found(tiny, batches, monkeypatch):
    real = cpu_attention.visible
    monkeypatch.setattr(
        cpu_attention, "visible", lambda t, s, window: real((t[0], None), (s[0], None), window)
    )
    result = packed_as_alone(tiny, batches)
    assert not result.ok
    assert result.figures["place"].startswith("the output of layer 0 attention depends on")


@pytest.mark.slow
def test_a_ring_that_ignores_segments_is_found(tiny, batches, alone, monkeypatch):
    real = ring.ring

    def careless(q, k, v, at_T, at_S, *rest):
        return real(q, k, v, (at_T[0], None), (at_S[0], None), *rest)

    monkeypatch.setattr(ring, "ring", careless)
    result = same_as_one_device(tiny, "sequence=8 ring", alone, batches)
    assert not result.ok
    assert result.figures["place"] == "the output of layer 0 attention"
