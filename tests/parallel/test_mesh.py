"""Meshes: the same step on every one of them, the collectives that it should have, and no dimension lost in silence."""

import functools
import re
from functools import partial

import jax
import numpy as np
import pytest
from conftest import StateMaker, mesh_of, random_batch, small_config

from jaxlm.config import recipe as configs
from jaxlm.config.check import check
from jaxlm.config.keys import MESH_AXES, STRATEGIES
from jaxlm.config.recipe import pipeline_microbatches
from jaxlm.errors import ConfigError
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel.hosts import to_global
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.pipeline_parallel import bubble_fraction, pipeline
from jaxlm.step.costs import bytes_per_device
from jaxlm.step.state import abstract_state, check_sharding, state_shardings, train_step
from jaxlm.verify import laws
from jaxlm.verify.laws import STEPS, Run, compare, difference, train_on

MODELS = {
    "dense": {"model__num_heads": 8, "model__num_kv_heads": 8},
    "grouped-query": {"model__num_heads": 8, "model__num_kv_heads": 2, "model__qk_norm": True},
    "sliding-window": {
        "model__layers": "SL",
        "model__window": 12,
        "model__num_layers": 8,
        "model__num_kv_heads": 4,
        "model__embed_ngrams": 3,
        "model__buckets": 256,
    },
    "experts": {
        "model__num_experts": 4,
        "model__num_kv_heads": 4,
        "model__router_z_loss": 1e-3,
        "model__mlp": "relu2",
        "optim__eps": 1e-3,  # or Adam makes steps of mere rounding, which choose experts
    },
}
MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"fsdp": 8},
    "tensor=8": {"tensor": 8},
    "fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2},
    "sequence=8 ring": {"sequence": 8},
    "sequence=4 tensor=2 all-gather": {"sequence": 4, "tensor": 2},
    "fsdp=2 sequence=2 tensor=2": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "stage=4 fsdp=2": {"stage": 4, "fsdp": 2},
    "stage=2 fsdp=2 tensor=2 two rounds": {"stage": 2, "fsdp": 2, "tensor": 2},
    "expert=4 data=2": {"expert": 4, "data": 2},
    "expert=2 fsdp=2 tensor=2": {"expert": 2, "fsdp": 2, "tensor": 2},
}
FAST = [  # nearly each mesh with one model; all of them with --all
    ("dense", "data=8"),
    ("dense", "tensor=8"),
    ("dense", "fsdp=8"),
    ("grouped-query", "fsdp=4 tensor=2"),
    ("sliding-window", "sequence=8 ring"),
    ("grouped-query", "sequence=4 tensor=2 all-gather"),
    ("experts", "fsdp=2 sequence=2 tensor=2"),
    ("sliding-window", "stage=4 fsdp=2"),
    ("experts", "expert=4 data=2"),
]


def config_of(model: str, mesh: str = ""):
    settings = {
        "model__num_layers": 4,
        "model__embed_dim": 64,
        "model__head_dim": 8,
        **MODELS[model],
    }
    if "all-gather" in mesh:
        settings["model__context_parallel"] = "all_gather"
    if "two rounds" in mesh:
        settings["model__pipeline_rounds"] = 2
    c = small_config(**settings)
    c.mesh.update(dict.fromkeys(MESH_AXES, 1) | MESHES.get(mesh, {}))
    return c


class Batches:
    """Packed batches with uneven weights."""

    def __getitem__(self, k):
        return random_batch(np.random.default_rng(k))


@functools.cache
def state_maker(model):
    return StateMaker()


@functools.cache
def alone(model):
    """Batch that it begins with -> the run on one device."""
    return functools.cache(partial(train_on, config_of(model), mesh_of(1), Batches()))


def cases():
    for model in MODELS:
        for mesh in MESHES:
            if check(
                config_of(model, mesh), 8
            ):  # experts on a dense model, heads that tensor does not divide
                continue
            if (model, mesh) in FAST:
                marks = ()
            else:
                marks = pytest.mark.slow
            yield pytest.param(model, mesh, marks=marks, id=f"{model}-{mesh}")


@pytest.mark.parametrize(("model", "mesh"), list(cases()))
def test_any_mesh_is_one_device(model, mesh, monkeypatch):
    """5 steps in float32 on packed rows: losses within 2e-5, the first step's gradients within 1e-4."""
    monkeypatch.setattr(laws, "STEPS", 5)
    monkeypatch.setattr(laws, "init_state", state_maker(model))
    c = config_of(model, mesh)
    _, found, _ = compare(c, make_mesh(c), Batches(), alone(model))
    assert found.ok, found


def test_a_tie_between_experts_is_told_from_an_error():
    run = Run(np.full(STEPS, 2.0), np.full((STEPS, 3, 4), 8.0), {"kernel": np.ones(2)}, 0, 0.0)
    later = np.arange(STEPS) >= 7
    loads = run.loads.copy()
    loads[7:, 1] += [1, -1, 0, 0]  # a token took expert 0 instead of 1
    other = run._replace(losses=np.where(later, 2.001, 2.0))
    assert difference(run, run).ok
    assert not difference(run, run).tied
    assert not difference(other, run).ok
    assert not difference(other, run).tied
    tied = difference(other._replace(loads=loads), run)
    assert tied.tied
    assert not tied.ok
    assert not difference(
        other._replace(loads=loads, losses=np.full(STEPS, 2.001)), run
    ).tied  # it differed before
    assert not difference(
        other._replace(loads=run.loads + (loads - run.loads) * 9), run
    ).tied  # more than a tie


# ---------------------------------------------------------------- the compiled step


def compiled_step(c, devices=8, **sizes):
    """(compiled train step of c on this mesh, its abstract state, its shardings), nothing being run."""
    c.mesh.update(dict.fromkeys(MESH_AXES, 1) | sizes)
    mesh = make_mesh(c, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        (shapes, _), places = abstract_state(c), state_shardings(c, mesh)
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
        )
        batch = to_global(
            random_batch(np.random.default_rng(0), c.train.batch_size, c.data.seq_len),
            mesh,
            c.train.batch_size,
        )
        step = jax.jit(
            partial(train_step, config=c), donate_argnums=0, out_shardings=(places, None)
        )
        return step.lower(state, batch).compile(), shapes, places


KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")


def collectives(compiled) -> list[tuple[str, tuple[int, ...]]]:
    """[(operation, shape of one of its results)] of the optimized program."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w\d+\[([\d,]*)\]", match[1])
            found += [(match[2], tuple(int(n) for n in shape.split(",") if n)) for shape in shapes]
    return found


def test_with_tensor_parallel_no_whole_activation_is_all_reduced():
    """What the tensor axis sums is reduce-scattered over positions; B, T, D and F are all different here."""
    c = small_config(
        model__embed_dim=48, model__head_dim=8, model__mlp_dim=96, model__num_kv_heads=4
    )
    compiled, _, _ = compiled_step(c, fsdp=4, tensor=2)
    made = collectives(compiled)
    # of the batch on a device
    rows = 4
    T = 32
    D = 48
    assert ("reduce-scatter", (rows, T // 2, D)) in made
    assert not [
        shape for kind, shape in made if kind == "all-reduce" and np.prod(shape) >= rows * T * D
    ]


@pytest.mark.parametrize(
    "sizes", [{"data": 4, "sequence": 2}, {"data": 8}, {"fsdp": 4, "tensor": 2}], ids=str
)
def test_what_an_mlp_computes_stays_where_it_is(sizes):
    """Nothing of its hidden width is gathered but a kernel; B, T, D and F are all different here."""
    c = small_config(
        model__embed_dim=48, model__head_dim=8, model__mlp_dim=112, model__num_kv_heads=4
    )
    widths = {112 // sizes.get("tensor", 1), 112}
    gathered = []
    for kind, shape in collectives(compiled_step(c, **sizes)[0]):
        if kind == "all-gather":
            gathered.append(shape)
    assert not [
        shape for shape in gathered if shape[-1] in widths and len(shape) > 1 and shape[-2] != 48
    ]


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}], ids=str
)
def test_with_fsdp_gradients_are_reduce_scattered(sizes):
    """All-reduced are shards (over data), norms' scales and scalars alone."""
    c = small_config(model__num_kv_heads=4)
    compiled, shapes, places = compiled_step(c, **sizes)
    made = collectives(compiled)
    for name, leaf in shapes.params["layers"]["block_0"]["mlp"].items():
        shard = places.params["layers"]["block_0"]["mlp"][name]["kernel"].shard_shape(
            leaf["kernel"].shape
        )[1:]
        assert ("reduce-scatter", shard) in made, name
        if "data" in sizes:
            assert ("all-reduce", shard) in made, name
    if "data" not in sizes:
        limit = 32 * 32 // 2
    else:
        limit = 32 * 128 // 4
    assert not [shape for kind, shape in made if kind == "all-reduce" and np.prod(shape) > limit]


def test_gathered_weights_are_not_kept_for_the_backward_pass():
    """What four more layers add to a device's memory is less than one whole copy of their weights: shards only."""
    temporaries = []
    parameters = []
    for layers in (2, 6):
        c = small_config(model__num_layers=layers, model__embed_dim=1024, model__num_kv_heads=4)
        compiled, shapes, _ = compiled_step(c, fsdp=8)
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        parameters.append(sum(4 * x.size for x in jax.tree.leaves(shapes.params)))
    assert temporaries[1] - temporaries[0] < 0.6 * (parameters[1] - parameters[0])


@pytest.mark.slow
@pytest.mark.parametrize("context_parallel", ["ring", "all_gather"])
def test_activations_of_long_inputs_fall_as_the_sequence_axis_grows(context_parallel):
    """A whole step at 32,768 positions; gathered keys and values are whole on every device, a ring's are not."""
    temporaries = []
    for devices in (1, 2, 4, 8):
        settings = {"model__embed_dim": 128, "model__context_parallel": context_parallel}
        c = small_config(data__seq_len=32768, train__batch_size=1, **settings)
        compiled, _, _ = compiled_step(c, devices, sequence=devices)
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    falls = np.array(temporaries[0]) / temporaries
    assert temporaries[0] < 4 * 32768**2, "not even one head's logits of all positions by all"
    # One device is a program of its own: of 1,001 MB here it needs 68 less than its share of the others.
    limits = {"ring": [1, 1.87, 3.73, 7.45], "all_gather": [1, 1.8, 3.0, 4.5]}
    assert (falls >= limits[context_parallel]).all(), temporaries


def test_zero1_splits_the_optimizer_state_and_leaves_the_parameters_whole():
    c = small_config(mesh__strategy="zero1")
    compiled, shapes, places = compiled_step(c, data=8)

    def moments(tree):
        return (tree[0].mu, tree[0].nu)

    whole = sum(4 * x.size for x in jax.tree.leaves(moments(shapes.opt_state)))
    assert bytes_per_device(moments(shapes.opt_state), moments(places.opt_state)) == whole // 8
    assert all(place.is_fully_replicated for place in jax.tree.leaves(places.params))
    assert (
        compiled.memory_analysis().argument_size_in_bytes < whole / 2 + whole / 8 + 50_000
    )  # with a batch


# ---------------------------------------------------------------- guards


def problems_of(devices, **overrides):
    c = configs.base()
    for key, value in overrides.items():
        configs.set_key(c, key.replace("__", "."), value)
    return check(c, devices)


@pytest.mark.parametrize(
    ("overrides", "expect"),
    [
        ({"mesh__tensor": 3}, ["mesh.tensor=3: 3 of 8 devices", "nearest: data=4 x tensor=2"]),
        ({"mesh__tensor": 5, "mesh__sequence": 3}, ["15 of 8 devices", "sequence=4 x tensor=2"]),
        (
            {"mesh__data": 4, "mesh__fsdp": 2, "train__batch_size": 10},
            ["batch_size=10", "= 8", "8 or 16"],
        ),
        ({"mesh__tensor": 4}, ["num_heads=6", "nearest: 1 or 2"]),
        ({"mesh__sequence": 8, "data__seq_len": 100}, ["seq_len=100", "= 16", "96 or 112"]),
        ({"mesh__stage": 4}, ["num_layers=6", "multiple of 4", "4 or 8"]),
        ({"mesh__stage": 2, "model__scan": False}, ["scan=True"]),
        ({"mesh__expert": 2}, ["no experts"]),
        ({"mesh__expert": 4, "model__num_experts": 6}, ["num_experts=6", "1 or 2"]),
        ({"mesh__slices": 3}, ["slices=3", "mesh.data=8"]),
        ({"mesh__strategy": "fsdb"}, ["did you mean fsdp"]),
        ({"mesh__data": -1, "mesh__fsdp": -1}, ["only one axis"]),
    ],
)
def test_what_does_not_fit_is_named_with_the_nearest_that_does(overrides, expect):
    text = "\n".join(problems_of(8, **overrides))
    assert all(words in text for words in expect), text


def test_an_axis_that_does_not_divide_the_heads_or_the_vocabulary_shards_the_embedding_dimension():
    c = small_config(
        model__num_heads=8, model__num_kv_heads=2, model__head_dim=8, model__vocab_size=63
    )
    places = state_shardings(c, mesh_of(fsdp=2, tensor=4)).params
    assert places["embed"]["tokens"].spec == jax.P(None, ("fsdp", "tensor"))
    attention = places["layers"]["block_0"]["attention"]
    assert attention["key"]["kernel"].spec == jax.P(None, ("fsdp", "tensor"), None, None)
    assert attention["query"]["kernel"].spec == jax.P(None, "fsdp", "tensor", None)


def test_problems_of_all_sections_are_told_at_once():
    """A bad value leaves out only the rules that would count with it."""
    found = problems_of(
        8,
        mesh__tensor=3,
        train__batch_size=10,
        mesh__fsdp=4,
        mesh__strategy="fdsp",
        model__norm="x",
    )
    keys = []
    for problem in found:
        keys.append(problem.partition("=")[0].partition(":")[0])
    assert keys == [
        "config.model.norm",
        "config.mesh.strategy",
        "config.mesh.fsdp",
        "config.train.batch_size",
    ]


def test_a_strategy_is_one_word():
    for strategy, axis in STRATEGIES.items():
        c = small_config(mesh__strategy=strategy)
        assert make_mesh(c).shape[axis] == 8


def test_slices_lie_along_the_axis_across_them():
    """Each slice is a block of devices in a row; only mesh.across crosses them."""
    c = small_config(mesh__slices=2, mesh__across="fsdp", mesh__fsdp=4, mesh__tensor=2)
    grid = make_mesh(c).devices.reshape(4, 2)
    slices = np.vectorize(lambda device: device.id // 4)(grid)
    assert (slices == [[0, 0], [0, 0], [1, 1], [1, 1]]).all()


def test_many_parameters_left_whole_are_an_error_that_names_the_worst(caplog):
    c = small_config(
        model__embed_dim=34, model__head_dim=8, model__mlp_dim=65, model__vocab_size=63
    )
    with pytest.raises(ConfigError, match="mlp/down/kernel") as error:
        check_sharding(c, mesh_of(fsdp=4, data=2))
    assert len(re.findall(r"^  ", str(error.value), re.MULTILINE)) == 5


def test_a_dimension_left_whole_is_said_in_one_line(caplog):
    meshes.say_unsharded.cache_clear()
    c = small_config(model__num_heads=8, model__num_kv_heads=2, model__head_dim=8)
    check_sharding(c, mesh_of(fsdp=2, tensor=4))
    said = [record.message for record in caplog.records]
    assert said == ["axis kv_heads of 2 is not divided by tensor=4: whole there"]


def test_the_devices_left_by_a_strategy_whose_axis_is_given_are_data():
    assert make_mesh(small_config(mesh__strategy="tensor", mesh__tensor=2)).shape["data"] == 4


def test_rounds_with_fewer_microbatches_than_stages_are_refused():
    x = np.zeros((2, 4, 8), np.float32)
    with pytest.raises(ValueError, match="at least 4 microbatches"):
        pipeline(None, {}, x, {}, stages=4, microbatches=2, rounds=2)


def test_bubble():
    assert bubble_fraction(1, 4, 1) == 0
    assert bubble_fraction(4, 4, 1) == 3 / 7
    assert bubble_fraction(4, 4, 3) == 3 / 15
    model = small_config().model
    assert pipeline_microbatches(model, 32, 4) == 16
    assert pipeline_microbatches(model, 6, 2) == 6
