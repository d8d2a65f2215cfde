"""Laws of the words of a text: punctuation is apart, what belongs together is not, and a text reads well again."""

import json

import numpy as np
import pytest

from jaxlm.data import prepare
from jaxlm.data.store import Store
from jaxlm.data.tokenization import tokenizer, vocabulary
from jaxlm.data.tokenization.words import SPLITS, text_of, word_spans, words_in
from jaxlm.errors import DataError

KING = "JULIET: The king, (the king!) spoke.\nROMEO: O king; O Juliet...\n"
FAMILY = "\U0001f469\u200d\U0001f4bb"
FLAG = "\U0001f1e9\U0001f1ea"
HINDI = "\u0939\u093f\u0928\u094d\u0926\u0940"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("king, JULIET: (king)", "king , JULIET : ( king )"),
        (
            "don't well-known \u2019tis l\u2019eau O'Neill's",
            "don't well-known \u2019 tis l\u2019eau O'Neill's",
        ),
        ("3.14, 1,000.50 10:30. $5 5%", "3.14 , 1,000.50 10:30 . $ 5 5 %"),
        ("(1990-1992) mid-1990s 20-year", "( 1990 - 1992 ) mid-1990s 20-year"),
        ("see https://a.b/c?d=1, or me@x.org.", "see https://a.b/c?d=1 , or me@x.org ."),
        ("U.S., e.g. a.b", "U.S. , e.g. a . b"),
        ("wait... what--ever?!", "wait ... what -- ever ? !"),
        ("it 's _so_ snake_case <unk>", "it 's _ so _ snake_case <unk>"),
        (f"e\u0301te\u0301, {HINDI}!", f"e\u0301te\u0301 , {HINDI} !"),
        (f"ok{FAMILY}{FLAG}\u2764\ufe0f!", f"ok {FAMILY} {FLAG} \u2764\ufe0f !"),
        ("\u6771\u4eac\u3002\u65e5\u672c", "\u6771\u4eac \u3002 \u65e5\u672c"),
        ("\ufeffa\u200bb \x00", "a b \x00"),
        (" \n\t", ""),
    ],
)
def test_punctuation_is_apart(text, words):
    assert words_in(text, "punctuation") == words.split(" ") * bool(words)
    assert [text[begin:end] for begin, end in word_spans(text, "punctuation")] == words_in(
        text, "punctuation"
    )
    assert words_in(text, "spaces") == text.split()


def test_characters_of_scripts_without_spaces_are_apart():
    assert (
        words_in("Tokyo \u6771\u4eac\u306f1992\u5e74", "characters")
        == "Tokyo \u6771 \u4eac \u306f 1992 \u5e74".split()
    )
    thai = "\u0e01\u0e23\u0e38\u0e07"
    assert words_in(thai, "characters") == ["\u0e01", "\u0e23\u0e38", "\u0e07"], (
        "marks stay with their letter"
    )


@pytest.mark.parametrize(
    "text",
    [
        'The king, JULIET: don\'t (3.14) spoke; the "well-known" one said: 1990-1992!',
        "It's 5%, or $5 and/or more... [see https://a.b/c?d=1]",
        "\u201cHi,\u201d she said. \u00abNon!\u00bb \u00bfQu\u00e9?",
        f"{HINDI} {FAMILY} {FLAG}, \u0643\u062a\u0627\u0628\u060c",
    ],
)
def test_a_text_reads_as_it_was(text):
    words = words_in(text, "punctuation")
    assert text_of(words, "punctuation") == text
    assert words_in(text_of(words, "punctuation"), "punctuation") == words


def test_a_text_grows_at_its_end_alone():
    """A model's answer is what follows the text of its prompt."""
    rng = np.random.default_rng(0)
    known = [
        "a",
        "1990",
        "-",
        "'",
        '"',
        ",",
        "(",
        ")",
        "--",
        "...",
        "'s",
        "\u6771",
        "\u3002",
        "/",
        ".",
    ]
    for split in SPLITS:
        for _ in range(300):
            words = [str(word) for word in rng.choice(known, 8)]
            cut = int(rng.integers(9))
            assert text_of(words, split).startswith(text_of(words[:cut], split))


def test_prepared_text_has_the_words_themselves(tmp_path):
    (tmp_path / "a.txt").write_text(KING * 30)
    prepare.prepare(
        [str(tmp_path / "a.txt")], tmp_path / "out", tokenizer="words", vocab_size=100, workers=1
    )
    made = tokenizer.load(tmp_path / "out")
    known = {"king", ",", "JULIET", ":", "..."}
    assert known <= set(made.words)
    assert not {"king,", "JULIET:", "(the"} & set(made.words)
    store = Store(tmp_path / "out", "train")
    assert 0 not in store.read(0, store.num_tokens), "made and encoded alike: nothing is unknown"
    assert (
        made.decode(made.encode("The king, (the king!) spoke.")) == "The king, (the king!) spoke."
    )


def test_files_of_earlier_versions_split_at_spaces(tmp_path):
    old = {"jaxlm": "words", "words": ["king,", "king"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(old))
    made = tokenizer.load(tmp_path / "tokenizer.json")
    assert made.to_bytes() == json.dumps(old).encode(), "and keep their fingerprint"
    assert made.encode("king, king king;").tolist() == [1, 2, 0]
    assert made.decode([1, 2]) == "king, king"
    assert vocabulary.make("words", ["king, king"], 9).words == ["<unk>", "king", "king,"], (
        "made from examples"
    )


def test_a_split_of_a_later_version_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"jaxlm": "words", "words": [], "split": "syllables"})
    )
    with pytest.raises(DataError, match="tokenizer"):
        tokenizer.load(tmp_path / "tokenizer.json")
