"""Laws of the objectives: packed = alone, padding is nothing, any mesh and any accumulation; who sees whom; beams."""

import functools
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OF_2017, fresh_state, mesh_of, small_config
from test_losses import Given

from jaxlm.config.keys import base
from jaxlm.config.recipe import flatten
from jaxlm.config.tasks import TASKS, tasks_using
from jaxlm.data.batches import train_batches
from jaxlm.generate.decode import beam_search, generate_tokens
from jaxlm.kernels.cross_entropy import logits_of
from jaxlm.models import build
from jaxlm.models.transformer import unembedding
from jaxlm.parallel.hosts import to_global
from jaxlm.step import forward
from jaxlm.step.losses import loss_of, total_weight
from jaxlm.step.state import abstract_state, gradients, state_shardings
from jaxlm.verify import tiny
from jaxlm.verify.laws import GRADIENT_TOLERANCE, worst
from jaxlm.verify.packing import unpacked

CASES = {name: {"task__name": name} for name in TASKS} | {
    "lm distilled": {"task__name": "lm", "task__distill": 0.5, "task__temperature": 2.0},
    "seq2seq distilled": {
        "task__name": "seq2seq",
        "task__distill": 0.5,
        "task__label_smoothing": 0.1,
    },
    "classify distilled": {"task__name": "classify", "task__distill": 0.5, "model__pooling": "max"},
    "classify by a decoder": {
        "task__name": "classify",
        "model__name": "decoder",
        "model__pooling": "last",
    },
    "classify by a bag": {"task__name": "classify", "model__name": "bag", "model__buckets": 512},
    "skipgram with negatives": {
        "task__name": "skipgram",
        "model__name": "vectors",
        "task__negatives": 3,
        "task__subsample": 0.01,
    },
    "lm of 2017": {"task__name": "lm", **OF_2017},
    "seq2seq of 2017": {"task__name": "seq2seq", "task__label_smoothing": 0.1, **OF_2017},
}
LOSSES = ("seq2seq distilled", "classify", "qa", "dpo", "glove")  # each with another
LIKE_OTHERS = (
    "fim",
    "ul2",
    "skipgram",
    "multilabel",
    "lm of 2017",
    "seq2seq of 2017",
)  # or in test_models.py
MESHES = {
    "data=8": {"data": 8},
    "fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2},
    "sequence=4 tensor=2": {"sequence": 4, "tensor": 2},
    "stage=2 fsdp=4": {"stage": 2, "fsdp": 4},
}
ONCE = {  # each task with a mesh; LOSSES are tried on all of them
    "data=8": ("regress", "multilabel", "seq2seq distilled"),
    "fsdp=4 tensor=2": (
        "lm distilled",
        "classify",
        "classify by a bag",
        "span_corruption",
        "seq2seq of 2017",
        "glove",
        "skipgram with negatives",
    ),
    "sequence=4 tensor=2": (
        "prefix_lm",
        "mlm",
        "tag",
        "qa",
        "dpo",
        "classify distilled",
        "lm of 2017",
        "seq2seq of 2017",
    ),
    "stage=2 fsdp=4": ("classify by a decoder", "lm of 2017"),
}
FAST = (*LOSSES, "classify by a decoder")
ROWS = 8


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("objectives")
    tiny.make_tokens(path)
    for task in TASKS.values():
        if task.from_examples:
            tiny.make_examples(path / f"{task.name}.jsonl", task.name)
    return path


def config_of(case, folder=None, **more):
    settings = {
        "data__seq_len": 64,
        "data__enc_len": 72,
        "data__tokenizer": "bytes",
        "data__examples_per_row": 4,
        "train__batch_size": ROWS,
        "model__vocab_size": 376,
        **CASES[case],
        **more,
    }
    task = settings["task__name"]
    record = TASKS[task]
    if record.reads_source:
        settings.setdefault("model__name", "encoder_decoder")
    elif record.has_head or record.answer == "hidden":
        settings.setdefault("model__name", "encoder")
    elif record.loss == "glove":
        settings.setdefault("model__name", "vectors")
    settings.setdefault("model__name", "decoder")
    if record.has_label_names:
        settings["data__labels"] = tiny.LABELS
    if folder:
        key, file = (
            ("data__train", f"{task}.jsonl")
            if TASKS[task].from_examples
            else ("data__path", "tokens")
        )
        settings[key] = str(folder / file)
    c = small_config(**settings)
    if tiny.needs_teacher(c):
        c.task.teacher_model = tuple(c.model.items())
    return c


def far_from_initial(config):
    """Parameters of the model, and of its teacher or None. Drawn by numpy, which compiles nothing."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        return np.float32(("scale" in path[-1].key) + 0.2 * rng.normal(size=x.shape))

    shapes, _ = abstract_state(config)
    return jax.tree.map_with_path(draw, (shapes.params, shapes.teacher))


class Made:
    """A case: its config, a batch, and the sums and gradients of its loss over any batch of as many rows."""

    def __init__(self, case, folder):
        self.config = config_of(case, folder)
        self.batch = train_batches(self.config)[0]
        self.params, self.teacher = far_from_initial(self.config)
        model = build(self.config)
        loss = loss_of(self.config)

        @jax.jit
        def sums(params, batch):
            def objective(params):
                made = loss(model, params, batch, self.config, None, self.teacher)
                return made["objective"], {
                    key: made[key] for key in ("loss", "weight", "objective")
                }

            grads, made = jax.grad(objective, has_aux=True)(params)
            return made, grads

        self.sums = lambda batch: jax.device_get(sums(self.params, batch))


made = functools.cache(Made)


def parts_of(batch, rows):
    """These rows, and padding."""
    return {key: np.concatenate([x[rows], np.zeros_like(x)])[:ROWS] for key, x in batch.items()}


def same(a, b, tolerance=1e-5):
    for key in a[0]:
        np.testing.assert_allclose(a[0][key], b[0][key], rtol=tolerance, err_msg=key)
    assert worst(a[1], b[1])[0] < GRADIENT_TOLERANCE


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c in LIKE_OTHERS)) for c in CASES]
)
def test_packed_is_alone_and_padding_is_nothing(case, folder):
    """By the sums of the loss and their gradients."""
    this = made(case, folder)
    several = this.batch["segments"].reshape(ROWS, -1).max(axis=1)
    packed = case != "glove"  # whose pairs are of no document
    rows = np.argsort(-several, kind="stable")[:2]
    assert several[rows[0]] > 1 or not packed
    alone = unpacked({key: x[rows] for key, x in this.batch.items()})
    assert len(alone["tokens"]) == several[rows].sum() <= ROWS
    same(this.sums(parts_of(this.batch, rows)), this.sums(parts_of(alone, slice(None))))

    whole = this.sums(this.batch)
    halves = []
    for r in (slice(4), slice(4, 8)):
        halves.append(this.sums(parts_of(this.batch, r)))
    assert whole[0]["weight"] > 0
    assert np.isfinite(whole[0]["loss"])
    same(whole, jax.tree.map(np.add, *halves))
    np.testing.assert_allclose(total_weight(this.batch, this.config), whole[0]["weight"], rtol=1e-6)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in LOSSES)) for c in CASES]
)
def test_accumulation_is_one_batch(case, folder):
    this = made(case, folder)
    c = config_of(case, folder, train__grad_accumulation=2)
    with jax.set_mesh(mesh_of(1)):
        f = jax.jit(partial(gradients, config=c))
        grads, means = f(this.params, this.batch, jax.random.key(0), teacher=this.teacher)
    check_gradients(this, grads, means)


def check_gradients(this, grads, means):
    sums, want = this.sums(this.batch)
    np.testing.assert_allclose(means["loss"], sums["loss"] / sums["weight"], rtol=2e-5)
    difference, parameter = worst(
        jax.device_get(grads), jax.tree.map(lambda x: x / sums["weight"], want)
    )
    assert difference < GRADIENT_TOLERANCE, parameter


def fits(case, mesh):
    """Only models with stacked layers have stages, only those that attend split positions."""
    if case in ("classify by a bag", "glove", "skipgram with negatives"):
        return "stage" not in mesh and "sequence" not in mesh
    return not TASKS[CASES[case]["task__name"]].reads_source or "stage" not in mesh


def on_meshes():
    for mesh, case in itertools.product(MESHES, CASES):
        once = case in ONCE[mesh]
        if (once or case in LOSSES) and fits(case, mesh):
            if once and case in FAST:
                marks = ()
            else:
                marks = pytest.mark.slow
            yield pytest.param(case, mesh, marks=marks, id=f"{case}-{mesh}")


@pytest.mark.parametrize(("case", "name"), list(on_meshes()))
def test_any_mesh_is_one_device(case, name, folder):
    this = made(case, folder)
    mesh = mesh_of(8, **MESHES[name])
    c = config_of(case, folder)
    with jax.set_mesh(mesh):
        places = state_shardings(c, mesh)
        params = jax.tree.map(jax.device_put, this.params, places.params)
        if this.teacher is None:
            teacher = None
        else:
            teacher = jax.tree.map(jax.device_put, this.teacher, places.teacher)
        batch = to_global(this.batch, mesh, ROWS)
        f = jax.jit(partial(gradients, config=c), out_shardings=(places.params, None))
        check_gradients(this, *f(params, batch, jax.random.key(0), teacher=teacher))


# ---------------------------------------------------------------- which keys count

SET = {
    "task.mask_rate": 0.4,
    "task.whole_words": True,
    "task.span_length": 9.0,
    "task.fim_rate": 1.0,
    "task.window": 1,
    "task.negatives": 2,
    "task.subsample": 1e-3,
    "task.x_max": 7.0,
    "task.label_smoothing": 0.1,
    "task.class_weights": "balanced",
    "task.balanced_sampling": True,
    "task.focal": 2.0,
    "task.distill": 0.5,
    "task.temperature": 2.0,
    "task.beta": 0.5,
    "model.pooling": "max",
    "data.pack": False,
    "data.examples_per_row": 1,
    "data.word_dropout": 0.5,
    "data.enc_len": 24,
}
OF_TEXT = {
    "data.columns",
    "data.tokenizer",
    "data.vocab_size",
    "data.min_count",
    "data.lowercase",
    "data.labels",
}


@pytest.mark.parametrize("task", TASKS)
def test_a_key_is_followed_where_the_table_says_so(task, folder, monkeypatch):
    """By the first batches, and by what the loss of any hidden states computes: with the key, and without it."""
    monkeypatch.setattr(forward, "build_section", Given)

    def said(**settings):
        c = config_of(task, folder, **{"data__enc_len": 64} | settings)
        c.task.teacher_model = tuple(c.model.items())
        batches = [train_batches(c)[k] for k in range(3)]

        def array(*shape):
            return jax.ShapeDtypeStruct(shape, np.float32)

        V = c.model.vocab_size
        D = 4
        C = max(c.model.num_labels, 1)
        params = {
            "x": array(batches[0]["tokens"].size // 64, 64, D),
            "embed": {"tokens": array(V, D)},
        }
        params["head"] = {"kernel": array(D, C), "bias": array(C)}

        def loss(params, teacher, batch):
            return loss_of(c)(Given(c.model), params, batch, c, None, teacher)

        return batches, str(jax.make_jaxpr(loss)(params, params, batches[0]))

    def same(a, b):
        def equal(x, y):
            return x.keys() == y.keys() and all(np.array_equal(x[key], y[key]) for key in x)

        return a[1] == b[1] and all(map(equal, a[0], b[0]))

    partial = {key for key in flatten(base()) if tasks_using(key)}
    assert set(SET) | OF_TEXT == {key for key in partial if not key.startswith("eval.")}
    plain = said()
    for key, value in SET.items():
        if key in ("task.distill", "task.temperature") and task in ("multilabel", "regress"):
            continue  # which have no distribution over classes: refused, whatever would be computed
        if key == "task.temperature" and task != "dpo":
            set_too = {"task__distill": 0.5}
        else:
            set_too = {}
        changed = said(**{key.replace(".", "__"): value} | set_too)
        before = said(**set_too) if set_too else plain
        assert same(changed, before) == (task not in tasks_using(key)), key


# ---------------------------------------------------------------- who sees whom


def sight(model, params, tokens, **more):
    """A function of a place: which tokens of the table the hidden state there depends on, by its gradient."""

    @jax.jit
    def gradient(place):
        def at(table):
            embed = {**params["embed"], "tokens": table}
            x, _ = model.apply({"params": {**params, "embed": embed}}, tokens, **more)
            return jnp.sin(x[0, place]).sum()

        return jax.grad(at)(params["embed"]["tokens"])

    return lambda place: set(np.flatnonzero(np.abs(gradient(place)).max(axis=1)))


def test_an_encoder_sees_both_directions_of_its_segment():
    c = small_config(model__name="encoder")
    segments = jnp.repeat(jnp.arange(1, 3), 16)[None]
    see = sight(build(c), fresh_state(c).params, jnp.arange(32)[None], segments_BT=segments)
    assert see(3) == set(range(16))
    assert see(20) == set(range(16, 32))


def test_a_prefix_is_seen_as_a_whole_and_the_rest_causally():
    c = small_config()
    segments = jnp.repeat(jnp.arange(1, 3), 16)[None]
    place = jnp.arange(32)
    reach = jnp.where(place < 6, 5, jnp.where((place >= 16) & (place < 20), 19, place))[None]
    see = sight(
        build(c), fresh_state(c).params, jnp.arange(32)[None], segments_BT=segments, reach_BT=reach
    )
    assert see(0) == set(range(6))
    assert see(8) == set(range(9))
    assert see(17) == set(range(16, 20))
    assert see(25) == set(range(16, 26))


def encoder_decoder(**more):
    c = small_config(model__name="encoder_decoder", model__encoder_layers=1, **more)
    return c, build(c), fresh_state(c).params


@pytest.mark.parametrize("layout", [{}, OF_2017], ids=["pre-norm", "2017"])
def test_a_target_is_causal_and_reads_the_source_of_its_own_segment(layout):
    _, model, params = encoder_decoder(**layout)
    source = {
        "enc_tokens": 40 + jnp.arange(20)[None],
        "enc_segments": jnp.repeat(jnp.array([1, 2]), 10)[None],
    }
    segments = jnp.repeat(jnp.array([1, 2]), 16)[None]
    see = sight(model, params, jnp.arange(32)[None], segments_BT=segments, **source)
    assert see(5) == {*range(6), *range(40, 50)}
    assert see(20) == {*range(16, 21), *range(50, 60)}


@pytest.mark.parametrize(
    "layout",
    [{"model__positions": "learned", "model__qk_norm": True}, OF_2017],
    ids=["learned", "2017"],
)
def test_the_cache_of_an_encoder_decoder_changes_nothing(layout):
    _, model, params = encoder_decoder(**layout)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)
    source = {
        "enc_tokens": jax.random.randint(jax.random.key(2), (2, 10), 0, 64),
        "enc_segments": (jnp.arange(10) < jnp.array([[10], [6]])).astype(jnp.int32),
    }
    apply = jax.jit(
        lambda tokens, cache, source: model.apply({"params": params}, tokens, cache=cache, **source)
    )
    segments = jnp.ones((2, 12), jnp.int32)
    whole, _ = jax.jit(lambda source: model.apply({"params": params}, tokens, segments, **source))(
        source
    )
    cache = model.init_cache(2, 16, 10)
    parts = []
    for start, stop in ((0, 6), (6, 12)):
        x, cache = apply(tokens[:, start:stop], cache, source if start == 0 else {})
        parts.append(x)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


# ---------------------------------------------------------------- beams


def small_writer(kind):
    """(model, parameters with something to say, prompts, lengths, source) of a vocabulary of 5."""
    if kind == "n-grams":
        more = {"model__embed_ngrams": 3, "model__buckets": 50}
    else:
        more = {"model__name": kind}
    c = small_config(model__vocab_size=5, model__embed_dim=16, model__tie_embeddings=False, **more)
    params = jax.tree.map(
        lambda x: x + 0.5 * jax.random.normal(jax.random.key(x.size), x.shape),
        fresh_state(c).params,
    )
    prompts = jnp.array([[0, 0, 1], [1, 2, 3]])
    lengths = jnp.array([1, 3])
    source = {
        "enc_tokens": jnp.array([[1, 2, 3, 4], [4, 3, 0, 0]]),
        "enc_segments": jnp.array([[1] * 4, [1, 1, 0, 0]]),
    }
    return build(c), params, prompts, lengths, source if kind == "encoder_decoder" else None


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "n-grams"])
def test_one_beam_is_greedy(kind):
    model, params, prompts, lengths, source = small_writer(kind)
    beams, _ = beam_search(
        model, params, prompts, lengths, source, max_tokens=6, beams=1, length_penalty=0.0, eos_id=0
    )
    greedy = generate_tokens(
        model,
        params,
        prompts,
        lengths,
        np.zeros(2, np.uint32),
        source,
        max_tokens=6,
        temperature=0.0,
        top_k=0,
        top_p=0.0,
        eos_id=0,
    )
    np.testing.assert_array_equal(beams[:, 0], greedy)


@pytest.mark.parametrize(
    ("kind", "penalty"), [("decoder", 0.0), ("encoder_decoder", 1.0), ("n-grams", 1.0)]
)
def test_a_wide_beam_finds_the_best_of_all(kind, penalty):
    """All 4^3 + ... sequences of at most 4 tokens that end with 0 or are cut off, by brute force."""
    model, params, prompts, lengths, source = small_writer(kind)
    M = 4
    V = 5
    found, scores = beam_search(
        model,
        params,
        prompts,
        lengths,
        source,
        max_tokens=M,
        beams=125,
        length_penalty=penalty,
        eos_id=0,
    )
    texts = np.array(list(itertools.product(range(V), repeat=M)))
    for row, length in enumerate(lengths):
        prompt = np.asarray(prompts[row, len(prompts[row]) - length :])
        tokens = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
        more = {
            key: jnp.repeat(x[row : row + 1], len(texts), axis=0)
            for key, x in (source or {}).items()
        }
        apply = jax.jit(partial(model.apply, {"params": params}))
        x, _ = apply(tokens, jnp.ones(tokens.shape, jnp.int32), **more)
        log_p = jax.nn.log_softmax(logits_of(x, unembedding(params), 0.0))[:, length - 1 : -1]
        chosen = np.take_along_axis(np.asarray(log_p), texts[..., None], axis=2)[..., 0]
        best = (-math.inf, None)
        for text, each in zip(texts, chosen):
            if 0 in text:
                size = int(np.argmax(text == 0)) + 1
            else:
                size = M
            if not text[size:].any():  # after the end there is nothing
                best = max(best, (each[:size].sum() / ((5 + size) / 6) ** penalty, tuple(text)))
        assert tuple(np.asarray(found[row, 0])) == best[1]
        np.testing.assert_allclose(scores[row, 0], best[0], rtol=1e-5)
