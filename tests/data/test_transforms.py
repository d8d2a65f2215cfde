"""Laws of what is learned: nothing is lost, what is hidden is hidden as the papers say, chance follows from the key."""

import json
import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import WORDS, small_config

from jaxlm.config.keys import CHOICES, base
from jaxlm.config.tasks import TASKS
from jaxlm.data.answers import answer_text
from jaxlm.data.batches import train_batches, validation_batches
from jaxlm.data.examples import Encoder
from jaxlm.data.tokenization import vocabulary
from jaxlm.data.tokenization.tokenizer import Bytes, Words
from jaxlm.data.transforms import (
    ALLOWED,
    EXAMPLES,
    MODES,
    SENTINELS,
    SPECIALS,
    START,
    STOP,
    TOKENS,
    Vocabulary,
    chat,
    corrupt,
    spans,
    two_sided,
)

BYTES = vocabulary.make("bytes", [], 0)
PIECES = vocabulary.make("sentencepiece", [" ".join(WORDS)] * 20, 320)


def task(**changes):
    return SimpleNamespace(**(base().task.to_dict() | changes))


def piece_of(name, ids, seed, tokenizer=BYTES, **changes):
    ids = np.asarray(ids, np.int32)
    inputs = np.concatenate([[256], ids[:-1]])
    return TOKENS[name](
        ids, inputs, np.random.default_rng(seed), task(**changes), Vocabulary(tokenizer, name)
    )


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


# ---------------------------------------------------------------- vocabulary


def test_special_ids_do_not_collide_and_tasks_agree_on_them():
    for tokenizer in (BYTES, PIECES, Words(b'{"words": ["a", "b"]}')):
        seen = {}
        for name in CHOICES["task.name"]:
            vocab = Vocabulary(tokenizer, name)
            spans_too = name in ("span_corruption", "ul2")
            ids = {}
            for special in SPECIALS:
                ids[special] = getattr(vocab, special)
            if spans_too:
                ids |= {mode: getattr(vocab, mode) for mode in MODES}
                ids |= {f"sentinel {i}": vocab.sentinel(i) for i in range(SENTINELS)}
            assert len(set(ids.values())) == len(ids)
            assert min(ids.values()) == tokenizer.vocab_size
            assert all(seen.setdefault(key, value) == value for key, value in ids.items())
            if vocab.size > tokenizer.vocab_size:
                assert max(ids.values()) == vocab.size - 1
        with pytest.raises(AttributeError):
            Vocabulary(tokenizer, "lm").nothing  # noqa: B018


# ---------------------------------------------------------------- of a stream of tokens


def test_masks_are_15_percent_and_of_these_80_10_10():
    ids = text(200_000)
    piece = piece_of("mlm", ids, 1)
    chosen = piece["weights"] > 0
    tokens = piece["tokens"]
    mask = Vocabulary(BYTES, "mlm").mask
    assert chosen.mean() == pytest.approx(0.15, abs=0.005)
    np.testing.assert_array_equal(piece["targets"], ids)
    np.testing.assert_array_equal(tokens[~chosen], ids[~chosen])
    hidden = (tokens == mask)[chosen].mean()
    kept = (tokens == ids)[chosen].mean()
    assert hidden == pytest.approx(0.8, abs=0.01)
    assert kept == pytest.approx(0.1, abs=0.01)
    assert tokens.max() == mask


def test_the_end_of_a_document_is_not_asked_for():
    assert not any(
        piece_of("mlm", [7, 8, 256], seed, mask_rate=0.9)["weights"][2] for seed in range(50)
    )


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "words"])
def test_whole_words_are_hidden_whole(kind):
    words = []
    for word in np.random.default_rng(0).choice(WORDS, 3000):
        words.append(str(word))
    tokenizer = {"sentencepiece": PIECES, "bytes": BYTES}.get(kind) or vocabulary.make(
        "words", WORDS, 100
    )
    pieces = []
    for i, word in enumerate(words):
        pieces.append(tokenizer.encode(" " * bool(i) + word))
    chosen = piece_of("mlm", np.concatenate(pieces), 3, tokenizer, whole_words=True)["weights"] > 0
    parts = np.split(chosen, np.cumsum([len(piece) for piece in pieces])[:-1])
    assert all(part.all() or not part.any() for part in parts)
    assert np.mean([part[0] for part in parts]) == pytest.approx(0.15, abs=0.03)


def original(piece, vocab):
    """The text that source and target of a denoiser are of."""
    source = [
        i for i in piece["enc_tokens"][:-1] if i not in [getattr(vocab, mode) for mode in MODES]
    ]
    assert piece["enc_tokens"][-1] == vocab.end
    assert piece["targets"][-1] == vocab.end
    assert piece["tokens"][0] == vocab.begin
    np.testing.assert_array_equal(piece["tokens"][1:], piece["targets"][:-1])
    hidden = {}
    order = []
    for i in piece["targets"][:-1]:
        if i >= vocab.sentinel(0):
            order.append(i - vocab.sentinel(0))
            hidden[i] = []
        else:
            hidden[vocab.sentinel(order[-1])].append(i)
    assert order == list(range(len(order)))
    assert [i - vocab.sentinel(0) for i in source if i >= vocab.sentinel(0)] == order, "in order"
    return [token for i in source for token in (hidden[i] if i >= vocab.sentinel(0) else [i])]


@pytest.mark.parametrize("name", ["span_corruption", "ul2"])
def test_source_and_target_give_back_the_text(name):
    vocab = Vocabulary(BYTES, name)
    for seed in range(300):
        ids = text(1 + seed % 60 if seed < 200 else 900, seed)
        assert original(piece_of(name, ids, seed), vocab) == list(ids)


def test_spans_have_the_rate_and_the_mean_length_that_are_asked_for():
    for rate, mean in ((0.15, 3.0), (0.5, 3.0), (0.15, 32.0)):
        hidden = []
        for seed in range(100):
            hidden.append(spans(500, rate, mean, np.random.default_rng(seed)))
        begins = sum((np.diff(h.astype(int), prepend=0) == 1).sum() for h in hidden)
        assert np.mean(hidden) == pytest.approx(rate, abs=0.01)
        assert np.sum(hidden) / begins == pytest.approx(mean, rel=0.2)
    assert (
        len({tuple(spans(50, 0.15, 3.0, np.random.default_rng(seed))) for seed in range(20)}) > 15
    )


def test_ul2_says_which_of_its_three_modes_it_is():
    vocab = Vocabulary(BYTES, "ul2")
    ids = text(200)
    modes = {}
    for seed in range(200):
        piece = piece_of("ul2", ids, seed)
        modes.setdefault(piece["enc_tokens"][0], []).append(len(piece["tokens"]))
    assert set(modes) == {getattr(vocab, mode) for mode in MODES}
    assert all(len(lengths) > 40 for lengths in modes.values())
    assert np.mean(modes[vocab.span_mode]) < np.mean(modes[vocab.long_mode])
    assert min(modes[vocab.tail_mode]) >= 0.1 * 200
    assert max(modes[vocab.tail_mode]) <= 0.5 * 200 + 4


def test_the_most_spans_there_may_be_are_as_many_as_sentinels():
    hidden = spans(5000, 0.5, 1.0, np.random.default_rng(0))
    vocab = Vocabulary(BYTES, "span_corruption")
    assert corrupt(text(5000), hidden, vocab)["enc_tokens"].max() < vocab.size


def test_a_prefix_is_seen_whole_and_never_the_target():
    for seed in range(100):
        ids = text(1 + seed % 20, seed)
        piece = piece_of("prefix_lm", ids, seed)
        place = np.arange(len(ids))
        reach = piece["reach"]
        counts = np.asarray(piece["weights"]) > 0
        assert (reach >= place).all()
        assert counts[-1]
        assert (reach[counts] == place[counts]).all(), "what is foretold has not been seen"
        before = reach > place
        assert len(set(reach[before])) <= 1
        assert not before.any() or reach[0] == before.sum()
        np.testing.assert_array_equal(piece["targets"], ids)


def test_prefix_suffix_and_middle_give_back_the_text():
    vocab = Vocabulary(BYTES, "fim")
    moved = 0
    for seed in range(400):
        ids = text(3 + seed % 40, seed)
        piece = piece_of("fim", ids, seed, fim_rate=0.5)
        if piece["tokens"][0] != vocab.prefix:
            np.testing.assert_array_equal(piece["targets"], ids)
            continue
        moved += 1
        whole = [*piece["tokens"], piece["targets"][-1]]
        at = []
        for i in (vocab.prefix, vocab.suffix, vocab.middle, vocab.end):
            at.append(whole.index(i))
        prefix, suffix, middle = (whole[a + 1 : b] for a, b in pairwise(at))
        assert prefix + middle + suffix == list(ids)
        assert whole[-1] == vocab.end
    assert moved / 400 == pytest.approx(0.5, abs=0.08)


def test_skipgrams_stay_in_their_window_and_document():
    distances = set()
    for seed in range(200):
        ids = np.arange(1 + seed % 30)
        piece = piece_of("skipgram", ids, seed, window=4)
        counts = np.asarray(piece["weights"]) > 0
        distance = np.abs(piece["targets"] - piece["tokens"])[counts]
        assert ((distance >= 1) & (distance <= 4)).all()
        assert len(ids) < 2 or counts.any()
        distances |= set(distance.tolist())
    assert distances == {1, 2, 3, 4}


# ---------------------------------------------------------------- of examples


def example(name, example, tokenizer=BYTES, labels=()):
    return EXAMPLES[name](example, Encoder(tokenizer, False), Vocabulary(tokenizer, name), labels)


def test_only_what_the_assistant_says_and_its_end_is_learned():
    said = [
        ("system", "be brief"),
        ("user", "hi?"),
        ("assistant", "hello"),
        ("user", "bye"),
        ("assistant", "so long"),
    ]
    messages = []
    for role, content in said:
        messages.append({"role": role, "content": content})
    vocab = Vocabulary(BYTES, "sft")
    for given in (messages, json.dumps(messages)):
        piece = example("sft", {"messages": given})
        parts = np.split(piece["targets"], np.flatnonzero(np.diff(piece["weights"])) + 1)
        learned = []
        for part in parts:
            if BYTES.decode(part) in ("hello", "so long"):
                learned.append(part)
        assert [part[-1] for part in learned] == [vocab.end] * 2
        assert piece["weights"].sum() == sum(map(len, learned)) == len("hello") + len("so long") + 2
    short = example("sft", {"prompt": "hi?", "response": "hello"})
    np.testing.assert_array_equal(
        short["targets"][short["weights"] > 0], learned_of("hello", vocab)
    )


def test_a_weight_that_is_none_is_no_weight_and_others_are_shown_as_they_are():
    messages = [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "hello"}]
    plain = example("sft", {"messages": messages})
    weighed = example("sft", {"messages": [message | {"weight": None} for message in messages]})
    np.testing.assert_array_equal(weighed["weights"], plain["weights"])
    for wrong in ("0", 0.5, [1]):
        with pytest.raises(ValueError, match=re.escape(f"is 0 (not learned) or 1, not {wrong!r}")):
            example("sft", {"messages": [messages[0], messages[1] | {"weight": wrong}]})


def learned_of(answer, vocab):
    return [*BYTES.encode(answer), vocab.end]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "bot", "content": "x"}], "'bot' is not system, user or assistant"),
        ([{"from": "human", "value": "x"}], '"role": ..., "content"'),
        ([{"role": "user", "content": "x"}], "nothing to learn"),
        ([{"role": "assistant", "content": None}], "is text, not None"),
        ("[1", "delimiter"),
        ({"role": "user"}, "a list of messages"),
    ],
)
def test_a_dialogue_that_cannot_be_learned_says_why(messages, said):
    with pytest.raises(ValueError, match=said):
        example("sft", {"messages": messages})


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "sentencepiece"])
def test_the_gold_span_gives_back_the_answer(tokenizer):
    rng = np.random.default_rng(0)
    known = ["the", "the", "Zürich", "日本", "naïve", "😀", "a.", "(b)", "U.S.", "\u2581"]
    for _ in range(300):
        words = rng.choice(known, rng.integers(1, 12))
        gaps = rng.choice([" ", "  ", "\n", "\u00a0"], len(words))
        context = "".join(rng.choice(["", " "]) + word + gap for word, gap in zip(words, gaps))
        tokens = context.split()
        at = 0
        places = []
        for word in tokens:
            at = context.index(word, at)
            places.append((at, at + len(word)))
            at += len(word)
        first = int(rng.integers(len(tokens)))
        last = int(rng.integers(first, len(tokens)))
        start = places[first][0]
        answer = context[places[first][0] : places[last][1]]
        given = {"question": "which one?", "context": context, "answer": answer, "start": start}
        piece = example("qa", given, tokenizer)
        bits = piece["targets"]
        (begin,), (end,) = np.flatnonzero(bits & START), np.flatnonzero(bits & STOP)
        assert bits[begin] & ALLOWED
        assert bits[end] & ALLOWED
        assert piece["weights"].sum() == 1
        assert answer_text(given, Encoder(tokenizer, False), begin, end) == answer
        del given["start"]  # where it is first found
        (begin,), (end,) = (
            np.flatnonzero(example("qa", given, tokenizer)["targets"] & bit)
            for bit in (START, STOP)
        )
        assert answer in answer_text(given, Encoder(tokenizer, False), begin, end)


def test_no_answer_is_the_first_token():
    for answer in ("", [], " "):
        given = {"question": "q", "context": "some words", "answer": answer, "start": ""}
        piece = example("qa", given)
        assert piece["targets"][0] == ALLOWED | START | STOP
        assert piece["weights"][0] == 1
        assert answer_text(given, Encoder(BYTES, False), 0, 0) == ""


def test_an_answer_that_is_not_there_is_refused():
    given = {"question": "q", "context": "some words", "answer": "wards"}
    with pytest.raises(ValueError, match="'wards' is not in its context"):
        example("qa", given)
    with pytest.raises(ValueError, match=r"character start=2 .*'me wo'"):
        example("qa", given | {"answer": "words", "start": "2"})


def test_a_tag_is_that_of_the_first_piece_of_its_word():
    words = ["the", "moonlight", "\u00e9t\u00e9", "x"]
    labels = ("A", "B")
    for given in (words, " ".join(words)):
        piece = example("tag", {"words": given, "tags": ["A", "B", "A", "B"]}, PIECES, labels)
        first = np.flatnonzero(piece["weights"])
        assert len(first) == 4
        assert piece["targets"][first].tolist() == [0, 1, 0, 1]
        assert PIECES.decode(piece["tokens"]) == " ".join(words)
        assert PIECES.decode(piece["tokens"][first[1] : first[2]]) == " moonlight"
    with pytest.raises(ValueError, match="4 words and 1 tags"):
        example("tag", {"words": words, "tags": "A"}, PIECES, labels)
    with pytest.raises(ValueError, match="no words"):
        example("tag", {"words": "", "tags": ""}, PIECES, labels)


def test_the_chosen_and_the_rejected_are_beside_each_other():
    piece = example("dpo", {"prompt": "hi", "chosen": "hello you", "rejected": "no"})
    assert {piece[key].shape[0] for key in ("tokens", "targets", "weights")} == {2}
    first = []
    for weights in piece["weights"]:
        first.append(np.flatnonzero(weights)[0])
    assert first[0] == first[1]
    np.testing.assert_array_equal(*piece["tokens"][:, : first[0] + 1])
    vocab = Vocabulary(BYTES, "dpo")
    for side, answer in enumerate(("hello you", "no")):
        targets = piece["targets"][side][piece["weights"][side] > 0]
        np.testing.assert_array_equal(targets, learned_of(answer, vocab))


def test_two_sides():
    vocab = Vocabulary(BYTES, "seq2seq")
    piece = two_sided(BYTES.encode("ab"), BYTES.encode("c"), vocab)
    assert piece["enc_tokens"].tolist() == [97, 98, vocab.end]
    assert piece["tokens"].tolist() == [vocab.begin, 99]
    assert piece["targets"].tolist() == [
        99,
        vocab.end,
    ]
    assert all(value.dtype == np.int32 for value in two_sided([], [], vocab).values()), (
        "also where there is no text"
    )


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "name", [task.name for task in TASKS.values() if task.transform and not task.from_examples]
)
def test_chance_follows_from_the_seed_and_the_step_on_any_hosts(text_dir, name):
    c = small_config(
        task__name=name,
        data__path=str(text_dir),
        train__batch_size=8,
        data__seq_len=48,
        data__enc_len=32,
    )
    batches = train_batches(c)
    for k in (0, 300):
        whole = batches[k]
        for hosts in (1, 2, 4):
            for host in range(hosts):
                rows = np.arange(host, 8, hosts)
                part = train_batches(c, rows)[k]
                assert set(part) == set(whole)
                for key, value in whole.items():
                    np.testing.assert_array_equal(value[rows], part[key], err_msg=key)
    other = train_batches(small_config(**{"task__name": name, "data__path": str(text_dir), "train__batch_size": 8,
                                          "data__seq_len": 48, "data__enc_len": 32, "seed": 1}))  # fmt: skip
    assert any((other[0][key] != batches[0][key]).any() for key in other[0])


def test_validation_asks_every_model_the_same(text_dir):
    settings = {"task__name": "mlm", "data__path": str(text_dir), "train__batch_size": 8}
    same, other = (validation_batches(small_config(**settings, seed=seed)) for seed in (0, 5))
    for key, value in same[0].items():
        np.testing.assert_array_equal(value, other[0][key])
    small = validation_batches(small_config(**settings | {"train__batch_size": 4}))
    np.testing.assert_array_equal(same[0]["tokens"][4:], small[1]["tokens"])


def test_a_row_is_masked_anew_in_each_epoch(text_dir):
    c = small_config(
        task__name="mlm", data__path=str(text_dir), train__batch_size=8, data__shuffle=False
    )
    batches = train_batches(c)
    rows = []
    for k in range(60):
        batch = batches[k]
        rows += [(tuple(t), tuple(w)) for t, w in zip(batch["targets"], batch["weights"])]
    assert len(set(rows)) == len(rows)


def test_a_message_of_weight_0_is_not_learned():
    vocab = Vocabulary(Bytes(), "sft")
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "good", "weight": 1},
    ]
    ids, learned = chat(talk, vocab.tokenizer.encode, vocab)
    assert vocab.tokenizer.decode(ids[learned][:-1]) == "good"
    with pytest.raises(ValueError, match="weight"):
        chat([talk[0], talk[1] | {"weight": 0.5}], vocab.tokenizer.encode, vocab)
