"""Every loss equals one written by hand in float64, and its gradient that one's finite differences; and torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config

from jaxlm.data.examples import Examples
from jaxlm.data.transforms import ALLOWED, START, STOP
from jaxlm.step import forward, losses

B = 3
T = 10
D = 4
V = 7
C = 3
M = 3
SEGMENTS = np.array(
    [[1, 1, 1, 2, 2, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]
)
POSITIONS = np.array([[np.sum(row[:i] == s) for i, s in enumerate(row)] for row in SEGMENTS])


class Given:
    """A model whose final hidden states are among its parameters: what is left is the loss."""

    def __init__(self, section):
        self.config = section

    def apply(self, variables, tokens, *_, **__):
        return (variables["params"]["x"], None), {}


def parameters(seed, rows=B):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape)

    return {
        "x": draw(rows, T, D),
        "embed": {"tokens": draw(V, D)},
        "head": {"kernel": draw(D, C), "bias": draw(C)},
    }


@pytest.fixture
def run(monkeypatch):
    """(task, batch, settings) -> (sums, gradients of the objective) of `parameters(0)`, the teacher's being (1)."""

    def one(name, batch, rows=B, **settings):
        monkeypatch.setattr(forward, "build_section", Given)
        given = settings | {
            "data__examples_per_row": M,
            "model__num_labels": C,
            "model__vocab_size": V,
        }
        c = small_config(task__name=name, **given)
        c.task.teacher_model = tuple(c.model.items())

        def to_jax(tree):
            return jax.tree.map(
                lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None), tree
            )

        params = to_jax(parameters(0, rows))
        teacher = to_jax(parameters(1, rows))
        batch = to_jax(batch)

        def objective(params):
            if name == "qa":  # of which the head has two outputs
                params = params | {"head": jax.tree.map(lambda x: x[..., :2], params["head"])}
            sums = losses.loss_of(c)(Given(c.model), params, batch, c, None, teacher)
            return sums["objective"], sums

        gradients, sums = jax.grad(objective, has_aux=True)(params)
        return {name: np.asarray(x) for name, x in sums.items() if name != "routing"}, gradients

    return one


def finite_differences(f, params, h=1e-6):
    """Central, of a function of a tree of float64 arrays."""

    def of(x):
        slopes = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            x[i], old = x[i] + h, x[i]
            above = f(params)
            x[i] = old - h
            slopes[i] = (above - f(params)) / (2 * h)
            x[i] = old
        return slopes

    return jax.tree.map(of, params)


def require_equal(got, reference, rows=B):
    """got: of `run`. reference: parameters -> objective."""
    sums, gradients = got
    params = parameters(0, rows)
    np.testing.assert_allclose(sums["objective"], reference(params), rtol=1e-5)
    slopes = finite_differences(reference, params)
    assert max(np.abs(g).max() for g in jax.tree.leaves(slopes)) > 1e-2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), gradients, slopes
    )


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def token_batch(seed=2, rows=B):
    rng = np.random.default_rng(seed)

    def draw():
        return rng.integers(0, V, (rows, T))

    weights = rng.random((rows, T)) * (rng.random((rows, T)) < 0.7)
    segments, positions = (np.resize(x, (rows, T)) for x in (SEGMENTS, POSITIONS))
    return {
        "tokens": draw(),
        "targets": draw(),
        "weights": weights,
        "segments": segments,
        "positions": positions,
    }


def capped(z, cap):
    if cap:
        return cap * np.tanh(z / cap)
    return z


def divergence(mine, theirs, temperature):
    """KL(theirs || mine) of softened distributions, times temperature squared."""
    p = log_softmax(theirs / temperature)
    q = log_softmax(mine / temperature)
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize(
    ("smoothing", "distill", "temperature", "z", "cap"),
    [
        (0, 0, 1, 0, 0),
        (0.2, 0, 1, 0, 0),
        (0, 0, 1, 0.1, 3),
        (0, 0.7, 1, 0, 0),
        (0.1, 0.5, 2, 0, 0),
        (0, 1, 3, 0, 2),
    ],
)
def test_tokens(run, smoothing, distill, temperature, z, cap):
    batch = token_batch()

    def reference(params, seen=None):
        logits = capped(params["x"] @ params["embed"]["tokens"].T, cap)
        teacher = parameters(1)
        theirs = capped(teacher["x"] @ teacher["embed"]["tokens"].T, cap)
        total = 0.0
        for b, t in np.ndindex(B, T):
            log_p = log_softmax(logits[b, t])
            target = batch["targets"][b, t]
            aim = np.full(V, smoothing / V)
            aim[target] += 1 - smoothing
            apart = divergence(logits[b, t], theirs[b, t], temperature)
            learned = (1 - distill) * -(aim * log_p).sum() + distill * apart
            total += batch["weights"][b, t] * (
                learned + z * np.log(np.exp(logits[b, t]).sum()) ** 2
            )
        return total

    settings = {
        "task__label_smoothing": smoothing,
        "task__distill": distill,
        "task__temperature": temperature,
    }
    got = run("lm", batch, train__z_loss=z, model__logit_softcap=cap, **settings)
    require_equal(got, reference)
    assert got[0]["weight"] == pytest.approx(batch["weights"].sum(), rel=1e-6)


def test_chunks_of_the_divergence_change_nothing(monkeypatch):
    sides = []
    for p in map(parameters, (0, 1)):
        sides.append((p["x"].astype(np.float32), p["embed"]["tokens"].astype(np.float32), 0.0))
    whole = losses.divergence(*sides, 2.0)
    monkeypatch.setattr("jaxlm.kernels.cross_entropy.AUTO_CHUNK_BYTES", {"cpu": 4 * 2 * B * V * 2})
    np.testing.assert_allclose(losses.divergence(*sides, 2.0), whole, atol=1e-6)


# ---------------------------------------------------------------- labels


def examples():
    """(row, place, positions in the row) of each example."""
    return [
        (b, m, np.flatnonzero(SEGMENTS[b] == m + 1))
        for b in range(B)
        for m in range(M)
        if m + 1 in SEGMENTS[b]
    ]


def label_batch(kind):
    rng = np.random.default_rng(3)
    labels = {"classify": rng.integers(0, C, (B, M)), "regress": rng.normal(size=(B, M))}
    labels["multilabel"] = (rng.random((B, M, C)) < 0.5).astype(float)
    weights = np.zeros((B, M))
    for b, m, _ in examples():
        weights[b, m] = rng.random() + 0.2
    tokens = rng.integers(0, V, (B, T))
    batch = {"tokens": tokens, "segments": SEGMENTS, "positions": POSITIONS, "weights": weights}
    return batch | {"labels": labels[kind]}


POOL = {
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.max(0),
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
}


def nats_of_classes(z, label, smoothing, focal):
    log_p = log_softmax(z)
    learned = -(1 - smoothing) * log_p[label] - smoothing * log_p.mean()
    return learned * (1 - np.exp(log_p[label])) ** focal


@pytest.mark.parametrize("pooling", POOL)
@pytest.mark.parametrize(
    ("smoothing", "focal", "distill"), [(0, 0, 0), (0.2, 0, 0), (0, 2, 0), (0, 0, 0.6)]
)
def test_classes(run, pooling, smoothing, focal, distill):
    batch = label_batch("classify")

    def outputs(params, b, places):
        return (
            POOL[pooling](params["x"][b, places]) @ params["head"]["kernel"]
            + params["head"]["bias"]
        )

    def reference(params):
        total = 0.0
        for b, m, places in examples():
            z = outputs(params, b, places)
            theirs = outputs(parameters(1), b, places)
            learned = nats_of_classes(z, batch["labels"][b, m], smoothing, focal)
            learned = (1 - distill) * learned + distill * divergence(z, theirs, 2.0)
            total += batch["weights"][b, m] * learned
        return total

    settings = {"task__label_smoothing": smoothing, "task__focal": focal, "task__distill": distill}
    got = run("classify", batch, model__pooling=pooling, task__temperature=2.0, **settings)
    require_equal(got, reference)
    for b, m, places in examples():
        want = np.exp(log_softmax(outputs(parameters(0), b, places)))
        np.testing.assert_allclose(got[0]["scores"][b, m], want, atol=1e-6)


@pytest.mark.parametrize("focal", [0, 1.5])
def test_labels_that_hold_together(run, focal):
    batch = label_batch("multilabel")

    def reference(params):
        total = 0.0
        for b, m, places in examples():
            z = params["x"][b, places].mean(0) @ params["head"]["kernel"] + params["head"]["bias"]
            p = 1 / (1 + np.exp(-z))
            right = np.where(batch["labels"][b, m] > 0, p, 1 - p)
            total += batch["weights"][b, m] * ((1 - right) ** focal * -np.log(right)).sum()
        return total

    require_equal(run("multilabel", batch, task__focal=focal), reference)


def test_numbers(run):
    batch = label_batch("regress")

    def reference(params):
        said = []
        for b, _, places in examples():
            said.append(
                params["x"][b, places].mean(0) @ params["head"]["kernel"] + params["head"]["bias"]
            )
        errors = [(z[0] - batch["labels"][b, m]) ** 2 for z, (b, m, _) in zip(said, examples())]
        return sum(batch["weights"][b, m] * error for error, (b, m, _) in zip(errors, examples()))

    require_equal(run("regress", batch), reference)


def test_tags(run):
    batch = token_batch()
    batch["targets"] %= C

    def reference(params):
        z = params["x"] @ params["head"]["kernel"] + params["head"]["bias"]

        def nats(b, t):
            return nats_of_classes(z[b, t], batch["targets"][b, t], 0.1, 1.0)

        return sum(batch["weights"][b, t] * nats(b, t) for b, t in np.ndindex(B, T))

    require_equal(run("tag", batch, task__label_smoothing=0.1, task__focal=1.0), reference)


def test_spans(run):
    """Example 0 has no answer (its first token), the others one of two tokens; not all of their tokens are allowed."""
    bits = np.zeros((B, T), int)
    weights = np.zeros((B, T))
    answers = []
    for number, (b, _, places) in enumerate(examples()):
        bits[b, [places[0], *places[2:]]] |= ALLOWED
        first, last = (places[0], places[0]) if number == 0 or len(places) < 4 else places[-2:]
        bits[b, first] |= START
        bits[b, last] |= STOP
        weights[b, first] = 1
        answers.append((b, places, first, last))
    batch = token_batch() | {"targets": bits, "weights": weights}

    def reference(params):
        z = params["x"] @ params["head"]["kernel"] + params["head"]["bias"]
        total = 0.0
        for b, places, *borders in answers:
            allowed = [t for t in places if bits[b, t] & ALLOWED]
            for kind, border in enumerate(borders):
                total -= log_softmax(z[b, allowed, kind])[allowed.index(border)] / 2
        return total

    got = run("qa", batch)
    require_equal(got, reference)
    assert got[0]["weight"] == len(examples())
    inside = (bits & ALLOWED > 0) & (SEGMENTS == 1)
    np.testing.assert_allclose(
        np.where(inside, np.exp(got[0]["scores"][..., 0]), 0).sum(1), 1, rtol=1e-5
    )


# ---------------------------------------------------------------- preferences


def pair_batch():
    """Pairs of which the chosen and the rejected have the same segments, as if both were equally long."""
    flat = token_batch(rows=2 * B)
    batch = {}
    for name, x in flat.items():
        batch[name] = x.reshape(B, 2, T)
    return batch | {
        name: np.repeat(x[:, None], 2, 1)
        for name, x in (("segments", SEGMENTS), ("positions", POSITIONS))
    }


@pytest.mark.parametrize("smoothing", [0, 0.2])
def test_preferences(run, smoothing):
    batch = pair_batch()
    beta = 0.3

    def margins(params):
        """{(row, example): beta times the gain of the chosen over that of the rejected}."""
        mine, theirs = (
            log_softmax(p["x"] @ p["embed"]["tokens"].T) for p in (params, parameters(1, 2 * B))
        )
        found = {}
        for b, m, places in examples():
            gain = [0.0, 0.0]
            for side in range(2):
                for t in places:
                    here = (2 * b + side, t, batch["targets"][b, side, t])
                    gain[side] += batch["weights"][b, side, t] * (mine[here] - theirs[here])
            found[b, m] = beta * (gain[0] - gain[1])
        return found

    def reference(params):
        def sigmoid(z):
            return 1 / (1 + np.exp(-z))

        each = (
            (1 - smoothing) * np.log(sigmoid(z)) + smoothing * np.log(sigmoid(-z))
            for z in margins(params).values()
        )
        return -sum(each)

    settings = {"task__beta": beta, "task__label_smoothing": smoothing, "train__init_from": "x"}
    got = run("dpo", batch, rows=2 * B, **settings)
    require_equal(got, reference, rows=2 * B)
    want = margins(parameters(0, 2 * B))
    assert got[0]["weight"] == len(want)
    assert got[0]["accuracy"] == sum(z > 0 for z in want.values())
    assert got[0]["margin"] == pytest.approx(sum(want.values()), abs=1e-5)
    for (b, m), z in want.items():
        assert got[0]["scores"][b, m] == pytest.approx(z, abs=1e-5)


# ---------------------------------------------------------------- weights of classes


def data_of(task, tmp_path, lines, **settings):
    (tmp_path / "train.tsv").write_text("\n".join("\t".join(line) for line in lines) + "\n")
    c = small_config(
        task__name=task,
        data__train=str(tmp_path / "train.tsv"),
        data__tokenizer="words",
        **settings,
    )
    return Examples(c, "train")


def test_balanced_weights_make_every_class_weigh_the_same(tmp_path):
    lines = [("a b", "x")] * 12 + [("c d", "y")] * 3 + [("e", "z")]
    source = data_of("classify", tmp_path, lines, task__class_weights="balanced")
    sums = np.bincount([p["label"] for p in source.pieces], [p["weight"] for p in source.pieces])
    np.testing.assert_allclose(sums, 16 / 3)
    tags = data_of(
        "tag", tmp_path, [("a b c", "O O X"), ("a", "O")], task__class_weights="balanced"
    )
    each = (
        np.concatenate([p["targets"] for p in tags.pieces]),
        np.concatenate([p["weights"] for p in tags.pieces]),
    )
    np.testing.assert_allclose(np.bincount(*each), 2)


def test_balanced_sampling_shows_every_class_as_often(tmp_path):
    lines = [(f"a{i}", "x") for i in range(12)] + [("c", "y"), ("d", "y"), ("e", "y"), ("f", "z")]
    source = data_of("classify", tmp_path, lines, task__balanced_sampling=True)
    shown = []
    for row in source.rows:
        for i in row:
            shown.append(i)
    assert np.bincount([source.pieces[i]["label"] for i in shown]).tolist() == [12, 12, 12]
    assert set(shown) == set(range(16))


# ---------------------------------------------------------------- torch


def test_torch_agrees(run):
    """Preferences and distillation, with torch's own functions and autograd."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional

    def leaves(seed, rows):
        return jax.tree.map(
            lambda x: torch.tensor(x, requires_grad=seed == 0), parameters(seed, rows)
        )

    def logits(p):
        return p["x"] @ p["embed"]["tokens"].T

    batch = token_batch()
    pairs = pair_batch()

    def distillation(mine, theirs):
        z = logits(mine)
        weights = torch.tensor(batch["weights"])
        nats = F.cross_entropy(
            z.reshape(-1, V), torch.tensor(batch["targets"]).reshape(-1), reduction="none"
        )

        def soft(x):
            return F.log_softmax(x / 2.0, -1)

        apart = F.kl_div(soft(z), soft(logits(theirs)), reduction="none", log_target=True).sum(-1)
        return (weights * (0.4 * nats.reshape(B, T) + 0.6 * 4.0 * apart)).sum()

    def preferences(mine, theirs):
        targets, weights = (
            torch.tensor(pairs[name]).reshape(2 * B, T) for name in ("targets", "weights")
        )
        said = []
        for p in (mine, theirs):
            said.append(weights * -F.cross_entropy(logits(p).mT, targets, reduction="none"))
        gain = (said[0] - said[1]).reshape(B, 2, T)
        margins = []
        for b, _, places in examples():
            margins.append(gain[b, 0, places].sum() - gain[b, 1, places].sum())
        return -F.logsigmoid(0.3 * torch.stack(margins)).sum()

    distilled = run("lm", batch, task__distill=0.6, task__temperature=2.0)
    preferred = run("dpo", pairs, rows=2 * B, task__beta=0.3, train__init_from="x")
    for reference, rows, (sums, gradients) in (
        (distillation, B, distilled),
        (preferences, 2 * B, preferred),
    ):
        mine = leaves(0, rows)
        objective = reference(mine, leaves(1, rows))
        objective.backward()
        assert sums["objective"] == pytest.approx(objective.item(), rel=1e-5)
        for name in ("x", "embed"):
            got, want = (
                tree[name] if name == "x" else tree[name]["tokens"] for tree in (gradients, mine)
            )
            np.testing.assert_allclose(got, want.grad.numpy(), atol=1e-5)
