"""What generation compiles: a program for each size, which gives the same texts whatever the size is."""

import jax
import numpy as np
import pytest
from conftest import mesh_of, small_config

from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.errors import ConfigError
from jaxlm.generate.answer import scores_of
from jaxlm.generate.decode import (
    as_float32,
    beam_search,
    generate_tokens,
    pad_prompts,
    sample,
    sampled,
    searched,
    size_for,
)
from jaxlm.generate.lm import LM, forward_logits
from jaxlm.step.state import init_state


def untrained(**more):
    """An LM of bytes with random parameters."""
    settings = {
        "model__vocab_size": 384,
        "model__num_layers": 1,
        "model__tie_embeddings": False,
    } | more
    c = small_config(**settings)
    mesh = mesh_of(1)
    return LM(c, init_state(c, mesh).params, tokenizers.Bytes(), mesh, 0)


@pytest.fixture(scope="module")
def lm():
    return untrained()


SETTINGS = [
    ("a", {"temperature": 0}), ("", {}), ("abc", {"temperature": 1.3, "top_p": 0.9}), ("ab", {"top_k": 5}),
    ("a b c d e", {"max_tokens": 1}), ("a", {"max_tokens": 64, "top_p": 0.3}), ("b" * 14, {"top_k": 10**6}),
    ("é", {"top_p": 1}), ("c", {"seed": -1, "temperature": 1e-4}), ("d", {"stop": "e", "max_tokens": 33}),
]  # fmt: skip


def test_one_program_serves_all_settings(lm):
    before = sampled._cache_size()
    for prompt, options in SETTINGS:
        (text,) = lm.generate(prompt, **{"max_tokens": 8} | options)
        assert isinstance(text, str)
    assert sampled._cache_size() == before + 1


def ids_of(lm, prompts, max_tokens, seeds, **more):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 0.9} | more
    padded, lengths = pad_prompts([np.array(prompt) for prompt in prompts])
    seeds = np.array(seeds, np.uint32)
    return generate_tokens(
        lm.model, lm.params, padded, lengths, seeds, max_tokens=max_tokens, eos_id=256, **options
    )


def test_a_text_does_not_depend_on_sizes(lm):
    """Of room for new tokens, of prompts beside it, of rows."""
    prompt = [1, 2, 3]
    (alone,) = ids_of(lm, [prompt], 20, [7])
    beside = ids_of(lm, [[5] * 20, prompt, [6]], 70, [1, 7, 2])
    assert beside.shape == (3, 70)
    assert len(set(alone)) > 5
    np.testing.assert_array_equal(beside[1, :20], alone)


def test_one_search_serves_all_lengths(lm):
    prompts, lengths = pad_prompts([np.array([1, 2]), np.array([3]), np.array([4])])
    options = {"beams": 3, "length_penalty": 0.6, "eos_id": 256}
    before = searched._cache_size()
    found = {}
    for count, max_tokens in ((3, 5), (3, 9), (4, 9)):
        rows = []
        for x in (prompts, lengths):
            rows.append(np.resize(x, (count, *x.shape[1:])))
        found[count, max_tokens] = beam_search(
            lm.model, lm.params, *rows, max_tokens=max_tokens, **options
        )
        assert found[count, max_tokens][0].shape == (count, 3, max_tokens)
    assert searched._cache_size() == before + 1
    np.testing.assert_array_equal(found[3, 9][0], found[4, 9][0][:3])


def test_only_tokens_are_written(lm):
    """A model may have more rows than its tokenizer has tokens: those of no token are never drawn."""
    for more in (
        {"temperature": 0.0},
        {"temperature": 1e30, "top_p": 0.0},
        {"top_k": 384, "top_p": 0.0},
        {},
    ):
        assert ids_of(lm, [[1, 2, 3]], 40, [1], vocab_size=257, **more).max() < 257


@pytest.mark.slow
def test_only_tokens_are_found(lm):
    padded, lengths = pad_prompts([np.array([1, 2, 3]), np.array([4])])
    options = {"max_tokens": 3, "length_penalty": 0.6, "eos_id": 256, "vocab_size": 2}
    found, scores = beam_search(lm.model, lm.params, padded, lengths, beams=4, **options)
    assert found[:, 0].max() < 2
    assert np.isfinite(scores[:, 0]).all()


def test_texts_are_of_the_tokenizer_s_tokens(lm, monkeypatch):
    asked = []

    def record(model, params, prompts, *others, vocab_size, **more):
        asked.append(vocab_size)
        return np.zeros((len(prompts), 1), np.int32)

    monkeypatch.setattr("jaxlm.generate.lm.generate_tokens", record)
    lm.generate("a")
    assert asked == [257]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "said"),
    [
        ("abc", 200, "a prompt of 4 tokens and max_tokens=200 are too many; say max_tokens=60"),
        ("abc", 61, "--max_tokens=60"),
        ("a" * 70, 1, "a prompt of 71 tokens leaves none to write"),
    ],
)
def test_a_text_beyond_learned_positions_is_told_what_fits(
    lm, monkeypatch, prompt, max_tokens, said
):
    monkeypatch.setattr(
        lm, "config", small_config(model__positions="learned", model__context_length=64)
    )
    with pytest.raises(ConfigError, match=f"learned positions end at 64: .*{said}"):
        lm.generate(prompt, max_tokens=max_tokens)


def test_an_answer_beyond_learned_positions_is_refused_with_what_fits():
    asked = untrained(task__name="sft", model__positions="learned", model__context_length=64)
    with pytest.raises(ConfigError, match=r"end at 64: a prompt of 6 tokens and max_tokens=60 are"):
        asked.answer("ab", max_tokens=60)
    with pytest.raises(ConfigError, match="say max_tokens=58"):
        asked.answer(["", "ab"], max_tokens=60)
    assert isinstance(asked.answer("ab", max_tokens=2)[0], str)


def test_answers_of_a_classifier_are_compiled_once():
    asked = untrained(task__name="classify", model__name="bag", data__labels=("bad", "good"))
    before = scores_of._cache_size()
    first = asked.answer(["a", "bb", "ccc"])
    again = asked.answer(["a", "bb", "ccc", "dddd"])
    assert first == again[:3]
    assert scores_of._cache_size() == before + 1


def test_masked_texts_of_many_lengths_are_compiled_once():
    masked = untrained(task__name="mlm", model__name="encoder")
    before = forward_logits._cache_size()
    for text in ("[MASK]", "ab[MASK]", "abcdef[MASK]g"):
        masked.answer(text)
    assert forward_logits._cache_size() == before + 1


@pytest.mark.parametrize("kind", ["decoder", "encoder", "lstm"])
def test_logits_of_many_shapes_are_compiled_once_and_those_of_the_shape_alone(kind):
    lm = untrained(task__name="mlm" if kind == "encoder" else "lm", model__name=kind)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 13))
    before = forward_logits._cache_size()
    for rows, length in ((4, 13), (3, 1), (3, 16), (4, 7)):
        found = lm.logits(np.resize(tokens, (rows, length)))
        assert found.shape == (rows, length, 384)
    assert forward_logits._cache_size() == before + 1
    found = lm.logits(tokens[:3])
    alone = forward_logits(lm.model, lm.params, tokens[:3], None, None)
    np.testing.assert_allclose(found, alone, atol=1e-5)


def kept(logits, top_k, top_p):
    """Numbers of the tokens that may be drawn, by a sort in numpy."""
    logits = logits.astype(np.float64)
    order = np.argsort(-logits, kind="stable")
    chances = np.exp(logits[order]) / np.exp(logits).sum()
    before = np.cumsum(chances) - chances
    allowed = np.ones(len(order), bool)
    if top_k:
        allowed &= np.arange(len(order)) < top_k
    if top_p:
        allowed &= before < top_p
    return set(order[allowed].tolist())


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0), (1, 0), (3, 0), (99, 0), (0, 0.4), (0, 1e-60), (5, 0.5), (2, 1)]
)
def test_only_what_top_k_and_top_p_leave_is_drawn(top_k, top_p):
    logits = np.random.default_rng(top_k).normal(size=12).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    temperature, mass = as_float32(1.0, top_p)
    drawn = sample(np.tile(logits, (4000, 1)), keys, temperature, top_k, mass)
    assert set(np.asarray(drawn).tolist()) == kept(logits, top_k, top_p)


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-40, 1e-9, 1e300])
def test_no_temperature_is_too_cold_or_too_hot(temperature):
    logits = np.tile(np.float32([30, 31, -5, 30.9]), (200, 1))
    drawn = sample(
        logits, jax.random.split(jax.random.key(1), 200), as_float32(temperature, 0)[0], 0, 0.0
    )
    if temperature == 1e300:
        expected = {0, 1, 2, 3}
    else:
        expected = {1}
    assert set(np.asarray(drawn).tolist()) == expected


def test_sizes_are_few_and_have_room():
    for least, most in ((1, 64), (16, 1024)):
        sizes = []
        for number in range(1, 5000):
            sizes.append(size_for(number, least, most))
        assert all(size >= number for number, size in enumerate(sizes, 1))
        assert sizes == sorted(sizes)
        assert min(sizes) == least
        assert len(set(sizes)) <= 10 + 5000 // most
        assert all(size < 2 * number or size == least for number, size in enumerate(sizes, 1))
