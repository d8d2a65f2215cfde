"""Word vectors: co-occurrences by brute force, losses by hand, planted classes and parallelograms found again."""

import json
from collections import defaultdict
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, small_config
from test_losses import Given

from jaxlm.config import recipe as configs
from jaxlm.config.check import check
from jaxlm.data import pairs
from jaxlm.data.batches import fingerprint, open_sources, train_batches
from jaxlm.data.prepare import prepare
from jaxlm.data.store import Store
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.data.tokenization import vocabulary
from jaxlm.data.transforms import TOKENS, Vocabulary
from jaxlm.errors import ConfigError, DataError, UserError
from jaxlm.generate.lm import LM
from jaxlm.generate.neighbors import Neighbors
from jaxlm.models.vectors import word_vectors
from jaxlm.step.losses import loss_of
from jaxlm.step.state import init_state, jit_train_step

CLASSES = 10
MEMBERS = 20


def prepared(path, documents, tokenizer="words", **options):
    path.mkdir()
    (path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents)
    )
    prepare([str(path / "text.jsonl")], path / "tokens", tokenizer=tokenizer, workers=1, **options)
    return path / "tokens"


def random_documents(seed, count=60):
    rng = np.random.default_rng(seed)
    letters = list("abcdefgh")
    return [" ".join(rng.choice(letters, rng.integers(1, 15))) for _ in range(count)]


# ---------------------------------------------------------------- counts


def by_hand(store, window):
    """{(i, j): sum of 1 / distance}, one place after the other."""
    ids = store.read(0, store.num_tokens)
    starts = [*store.document_starts(0, store.num_tokens), store.num_tokens]
    found = defaultdict(float)
    for start, stop in pairwise(starts):
        words = [i for i in ids[start:stop].tolist() if i != store.eos_id]
        for here, i in enumerate(words):
            for there, j in enumerate(words):
                if 0 < abs(here - there) <= window:
                    found[i, j] += 1 / abs(here - there)
    return found


@pytest.mark.parametrize(
    "tokenizer", ["words", "bytes"]
)  # bytes: documents end with a token that is no word
@pytest.mark.parametrize(
    ("window", "block", "held"), [(1, 7, 1000), (4, 1000, 1000), (4, 30, 40), (20, 50, 64)]
)
def test_counts_are_those_of_brute_force_in_any_blocks(tmp_path, tokenizer, window, block, held):
    """Also where they don't fit into memory and go through files."""
    store = Store(
        prepared(tmp_path / "data", random_documents(window), tokenizer, vocab_size=None), "train"
    )
    parts = list(pairs.count_pairs(store, window, tmp_path, block, held))
    keys = np.concatenate([part[0] for part in parts])
    counts = np.concatenate([part[1] for part in parts])
    assert (np.diff(keys) > 0).all()
    want = by_hand(store, window)
    got = {
        divmod(int(key), store.vocab_size): count for key, count in zip(keys, counts, strict=True)
    }
    assert got.keys() == want.keys()
    for pair, count in want.items():
        assert got[pair] == pytest.approx(count)
        assert got[pair] == pytest.approx(got[pair[::-1]])
    spilled = bool(list(tmp_path.glob("keys-*.npy")))
    assert spilled == (len(parts) > 1) == (held < 1000)


def glove_config(data, **more):
    return small_config(task__name="glove", model__name="vectors", data__path=str(data), **more)


def test_an_epoch_of_pairs_has_every_pair_once_with_its_count(tmp_path, capsys):
    data = prepared(tmp_path / "data", random_documents(0))
    c = glove_config(data, task__window=3, data__seq_len=16, train__batch_size=2)
    (source,) = open_sources(c, "train")
    assert "counted" in capsys.readouterr().err
    want = by_hand(Store(data, "train"), 3)
    batches = train_batches(c)
    assert not capsys.readouterr().err, "what is counted is kept"
    found = {}
    for k in range(source.num_rows):  # twice as many rows: two epochs
        batch = batches[k]
        there = batch["weights"] > 0
        words = np.stack([batch["tokens"][there], batch["targets"][there]], axis=1)
        for pair, count in zip(words.tolist(), batch["counts"][there].tolist(), strict=True):
            found.setdefault(tuple(pair), []).append(count)
    assert found.keys() == want.keys()
    for pair, counts in found.items():
        assert counts == [pytest.approx(want[pair], rel=1e-6)] * 2
    again = train_batches(c)
    for name, value in batches[3].items():
        np.testing.assert_array_equal(again[3][name], value)


@pytest.mark.parametrize("number", [1, 2, 3, 10, 97, 1000, 4096])
def test_a_stride_visits_every_place_once(number):
    places = np.arange(number) * pairs.stride_of(number) % number
    assert len(set(places.tolist())) == number


def test_documents_of_single_words_have_no_pairs(tmp_path):
    data = prepared(tmp_path / "data", list("abcdefghabcdefgh"))
    with pytest.raises(DataError, match="single words"):
        train_batches(glove_config(data))


def test_damaged_counts_are_told_and_overwriting_the_data_drops_them(tmp_path):
    data = prepared(tmp_path / "data", random_documents(0))
    folder = pairs.kept_pairs(Store(data, "train"), 5)
    with open(folder / "counts", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="cut off; delete"):
        open_sources(glove_config(data), "train")
    prepare([str(tmp_path / "data/text.jsonl")], data, tokenizer="words", workers=1, overwrite=True)
    assert not folder.exists()


# ---------------------------------------------------------------- losses, by hand


def drawn_loss(name, batch, biases=False, **settings):
    """(sums, parameters) of a loss of given vectors."""
    rng = np.random.default_rng(0)
    B = 3
    T = 10
    D = 4
    V = 7
    params = {
        "x": rng.normal(size=(B, T, D)),
        "embed": {"tokens": rng.normal(size=(V, D)), "bias": rng.normal(size=V)},
        "unembed": rng.normal(size=(V, D)),
    }
    if biases:
        params["unembed_bias"] = rng.normal(size=V)
    c = small_config(task__name=name, model__name="vectors", model__vocab_size=V, **settings)
    as_jax = {}
    for key, value in batch.items():
        as_jax[key] = jnp.asarray(value)
    return loss_of(c)(Given(c.model), params, as_jax, c), params


def pair_batch(seed=1):
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, 7, (3, 10)),
        "targets": rng.integers(0, 7, (3, 10)),
        "weights": (rng.random((3, 10)) < 0.7).astype(np.float32),
        "segments": np.ones((3, 10), np.int32),
        "positions": np.zeros((3, 10), np.int32),
    }


def test_the_loss_of_glove_is_its_formula():
    batch = pair_batch()
    batch["counts"] = np.float32(np.random.default_rng(2).exponential(8, (3, 10)))
    sums, p = drawn_loss("glove", batch, biases=True, task__x_max=10.0)
    total = 0.0
    for b in range(3):
        for t in range(10):
            i = batch["tokens"][b, t]
            j = batch["targets"][b, t]
            x = float(batch["counts"][b, t])
            f = (x / 10) ** 0.75 if x < 10 else 1.0
            score = p["x"][b, t] @ p["unembed"][j] + p["embed"]["bias"][i] + p["unembed_bias"][j]
            total += batch["weights"][b, t] * f * (score - np.log(x)) ** 2
    assert float(sums["loss"]) == pytest.approx(total, rel=1e-5)
    assert float(sums["weight"]) == batch["weights"].sum()


def test_the_loss_of_negatives_is_its_formula():
    batch = pair_batch()
    batch["negatives"] = np.random.default_rng(3).integers(0, 7, (3, 4, 10))
    assert (batch["negatives"] == batch["targets"][:, None]).any()  # these do not count
    sums, p = drawn_loss("skipgram", batch, task__negatives=4)

    def nats(z):
        return np.log1p(np.exp(-z))

    total = 0.0
    for b in range(3):
        for t in range(10):
            own = p["x"][b, t]
            j = batch["targets"][b, t]
            drawn = []
            for n in batch["negatives"][b, :, t]:
                if n != j:
                    drawn.append(n)
            loss = nats(own @ p["unembed"][j]) + sum(nats(-own @ p["unembed"][n]) for n in drawn)
            total += batch["weights"][b, t] * loss
    assert float(sums["loss"]) == pytest.approx(total, rel=1e-5)


def test_negatives_are_drawn_by_their_counts_and_common_words_passed_over():
    shares = np.array([0.5, 0.3, 0.2, 0.0])
    vocab = Vocabulary(None, "skipgram", shares)
    ids = np.repeat(np.arange(3), 100).astype(np.int32)
    drawn = np.zeros(4)
    shown = np.zeros(3)
    c = small_config(
        task__name="skipgram", model__name="vectors", task__negatives=5, task__subsample=0.05
    )
    for seed in range(100):
        rng = np.random.default_rng(seed)
        piece = TOKENS["skipgram"](rng.permutation(ids), None, rng, c.task, vocab)
        assert piece["negatives"].shape == (5, 300)
        assert len(piece["tokens"]) == 300
        drawn += np.bincount(piece["negatives"].ravel(), minlength=4)
        shown += np.bincount(piece["tokens"], minlength=3)
    np.testing.assert_allclose(drawn / drawn.sum(), shares**0.75 / (shares**0.75).sum(), atol=0.01)
    kept = np.sqrt(0.05 / shares[:3])
    np.testing.assert_allclose(shown / shown.sum(), kept / kept.sum(), atol=0.02)


def test_a_run_without_the_new_keys_has_the_old_fingerprint(tmp_path):
    """So that it goes on."""
    data = prepared(tmp_path / "data", random_documents(0))
    plain = small_config(task__name="skipgram", data__path=str(data))
    assert not {"negatives", "subsample"} & fingerprint(plain).keys()
    assert (
        fingerprint(small_config(task__name="skipgram", data__path=str(data), task__negatives=3))[
            "negatives"
        ]
        == 3
    )


# ---------------------------------------------------------------- planted classes


def sentences(count=3000):
    """Templates whose places are filled from classes of words that stand nowhere else together."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(count):
        kind = rng.integers(CLASSES)
        words = []
        for n in rng.integers(0, MEMBERS, 2):
            words.append(f"w{kind}x{n}")
        texts.append(f"the f{kind}a {words[0]} g{kind}b and of h{kind}c {words[1]} i{kind}d to")
    return texts


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("planted") / "data", sentences())


def trained(planted, variant, steps):
    """The model of a short run of the recipe."""
    c = configs.load(f"configs/vectors.py:{variant}")
    settings = {"data.path": str(planted), "train.steps": steps, "eval.every": 0}
    settings |= {"model.embed_dim": 24, "optim.learning_rate": 3e-2, "train.batch_size": 8}
    settings["task.subsample"] = 0.0  # of 245 words, all are common
    for key, value in settings.items():
        configs.set_key(c, key, value)
    vocab_size = Store(planted, "train").vocab_size
    assert not check(c, 1, vocab_size)
    c = configs.resolve(c, vocab_size)
    mesh = mesh_of(1)
    step = jit_train_step(c, mesh)
    batches = train_batches(c)
    with jax.set_mesh(mesh):
        state = init_state(c, mesh)
        for k in range(steps):
            state, _ = step(state, batches[k])
    return LM(c, state.params, tokenizers.load(planted), mesh, steps)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "steps"), [("skipgram", 150), ("glove", 300)])
def test_neighbours_are_of_the_same_class(planted, variant, steps):
    lm = trained(planted, variant, steps)
    right = total = 0
    for kind in range(CLASSES):
        for member in range(MEMBERS):
            near = []
            for word, _ in lm.neighbors(f"w{kind}x{member}", 5):
                near.append(word)
            right += sum(word.startswith(f"w{kind}x") for word in near)
            total += len(near)
    assert total == 5 * CLASSES * MEMBERS and right / total >= 0.9, right / total


# ---------------------------------------------------------------- what people ask


def asked(words, vectors, name="decoder"):
    """An LM of given vectors, of a tokenizer of these words."""
    tokenizer = vocabulary.make("words", [" ".join(words)], 1000)
    table = np.zeros((tokenizer.vocab_size, len(vectors[0])), np.float32)
    for word, vector in zip(words, vectors, strict=True):
        table[tokenizer.encode(word)] = vector
    c = small_config(task__name="skipgram", model__name=name)
    return LM(c, {"embed": {"tokens": jnp.asarray(table)}}, tokenizer, mesh_of(1), 0)


WORDS = "man woman king queen boy girl prince princess table chair".split()


@pytest.fixture(scope="module")
def parallelograms():
    """Vectors that are the sum of a sex and a kind; the last two of neither."""
    rng = np.random.default_rng(0)
    sex = rng.normal(size=(2, 16))
    kinds = rng.normal(size=(4, 16))
    others = rng.normal(size=(2, 16))
    return asked(WORDS, [sex[n % 2] + kinds[n // 2] for n in range(8)] + list(others))


def test_an_analogy_completes_a_planted_parallelogram(parallelograms):
    lm = parallelograms
    for a in range(0, 8, 2):
        for c in range(0, 8, 2):
            if a != c:
                assert lm.analogy(WORDS[a], WORDS[a + 1], WORDS[c], 1)[0][0] == WORDS[c + 1]
                assert lm.analogy(WORDS[a + 1], WORDS[a], WORDS[c + 1], 1)[0][0] == WORDS[c]


def test_what_is_asked_is_no_answer_and_similarities_fall(parallelograms):
    near = parallelograms.neighbors("king", 100)
    assert {word for word, _ in near} == {*WORDS} - {"king"}  # nor the unknown word
    similar = [value for _, value in near]
    assert similar == sorted(similar, reverse=True)
    assert -1 <= similar[-1] <= similar[0] <= 1
    assert len(parallelograms.neighbors("king", 3)) == 3
    assert not {"man", "king", "woman"} & {
        word for word, _ in parallelograms.analogy("man", "king", "woman", 100)
    }


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (
            lambda lm: lm.neighbors("kign"),
            "lm.neighbors: 'kign' is not in the vocabulary; did you mean king?",
        ),
        (lambda lm: lm.neighbors("King"), "did you mean king?"),
        (lambda lm: lm.neighbors("zzzz"), "lm.neighbors: 'zzzz' is not in the vocabulary$"),
        (lambda lm: lm.neighbors("king xyzzy"), "'xyzzy' is not in the vocabulary$"),
        (lambda lm: lm.neighbors(""), "lm.neighbors: word='': must be a text that is not empty"),
        (lambda lm: lm.neighbors("  "), "must be a text that is not empty"),
        (
            lambda lm: lm.analogy("man", "qeen", "woman"),
            "lm.analogy: 'qeen' is not .* did you mean queen?",
        ),
    ],
)
def test_a_word_that_is_not_known_is_named_with_the_nearest(parallelograms, ask, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        ask(parallelograms)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda lm: lm.neighbors(5), "lm.neighbors: word=5: must be a text"),
        (lambda lm: lm.neighbors("king", 0), "count=0: must be a whole number, at least 1"),
        (lambda lm: lm.analogy("man", None, ["a"], "x"), r"b=None: .*; c=\['a'\]: .*; count='x'"),
    ],
)
def test_arguments_that_are_no_words_are_refused_by_name(parallelograms, ask, said):
    with pytest.raises(ConfigError, match=said):
        ask(parallelograms)


def test_several_words_are_their_mean_and_that_is_said(parallelograms, caplog):
    near = parallelograms.neighbors("king queen")
    assert not {"king", "queen"} & {word for word, _ in near}
    assert (
        "'king queen' is 2 tokens ('king', 'queen'): the mean of their vectors is taken"
        in caplog.text
    )


def test_of_glove_both_vectors_of_a_word_are_added():
    params = {
        "embed": {"tokens": np.ones((3, 2)), "bias": np.ones(3)},
        "unembed": np.full((3, 2), 2.0),
    }
    np.testing.assert_array_equal(word_vectors(params), np.ones((3, 2)))
    np.testing.assert_array_equal(
        word_vectors(params | {"unembed_bias": np.ones(3)}), np.full((3, 2), 3.0)
    )


def test_ids_beyond_the_tokenizer_are_no_neighbours():
    """A vocabulary may be padded to an even number."""
    tokenizer = vocabulary.make("words", ["a b"], 10)
    near = Neighbors(np.ones((8, 2), np.float32), tokenizer, "lm.neighbors")
    assert {word for word, _ in near.nearest(np.ones(2), [], 10)} == {"a", "b"}


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task.name": "glove"}, "model.name=decoder: task glove needs vectors"),
        (
            {"task.name": "glove", "model.name": "vectors", "data.mixture": "a=1,b=1"},
            "data.mixture: task glove counts",
        ),
        (
            {"task.name": "glove", "model.name": "vectors", "train.z_loss": 0.1},
            "train.z_loss=0.1: is of a softmax",
        ),
        (
            {"task.name": "glove", "model.name": "vectors", "task.negatives": 5},
            "task.negatives=5: task glove does not",
        ),
        (
            {"task.name": "skipgram", "task.negatives": 5},
            "model.name=decoder: config.task.negatives=5 needs two",
        ),
        (
            {"task.name": "skipgram", "task.negatives": -1},
            "task.negatives=-1: must not be negative",
        ),
        (
            {"task.name": "skipgram", "task.subsample": 1.0},
            r"task.subsample=1.0: must be in \[0, 1\)",
        ),
        (
            {
                "task.name": "skipgram",
                "model.name": "vectors",
                "task.negatives": 5,
                "task.label_smoothing": 0.1,
            },
            "task.label_smoothing=0.1: is of a softmax",
        ),
        ({"model.name": "vectors"}, "model.name=vectors: task lm needs"),
        ({"task.negatives": 5}, "task.negatives=5: task lm does not follow it"),
        (
            {"task.name": "skipgram", "model.name": "vectors", "mesh.sequence": 2},
            "no sequence or stage axis",
        ),
    ],
)
def test_what_does_not_go_together_is_told(settings, said):
    c = configs.base()
    for key, value in settings.items():
        configs.set_key(c, key, value)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError("\n".join(check(c, 8, 64)))
