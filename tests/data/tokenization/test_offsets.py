"""Laws of offsets: which characters a token stands for, and that answers and tags are found by them."""

import io
import json
import unicodedata

import numpy as np
import pytest
import sentencepiece
from conftest import program, small_config

from jaxlm.data.answers import answer_text
from jaxlm.data.examples import Encoder, Examples
from jaxlm.data.tokenization import base as base_tokenizer
from jaxlm.data.tokenization import tokenizer, vocabulary
from jaxlm.data.transforms import EXAMPLES, START, STOP, Vocabulary
from jaxlm.generate.answer import longest_answer

TEXTS = [
    "",
    " ",
    "\n\n",
    "the king, (1990-1992) and the 3.14",
    "  two leading spaces, two  inside, trailing \n",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002",
    "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e \u0939\u093f\u0928\u094d\u0926\u0940",
    "e\u0301 \u00e9 \ufb01 \u2460 \uff21 \u330d x",
    "\U0001f600\U0001f469\u200d\U0001f4bb a\U0001f1e9\U0001f1ea b",
    "\u2581a \u2581\u2581 b\u2581",
    "a\ud800b",
    "\u0130stanbul \ufeff\u200b\0 \u3000 wide",
]


def trained(**options) -> tokenizer.Tokenizer:
    """A sentencepiece model as others make them: with a space in front, normalised."""
    file = io.BytesIO()
    text = ["the king saw the moon and the old king, and the kings"] * 20
    given = {
        "model_type": "bpe",
        "vocab_size": 300,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    } | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=file, **given
    )
    return tokenizer.from_bytes("sentencepiece", file.getvalue())


def hugging_face(kind: str) -> tokenizer.Tokenizer:
    library = pytest.importorskip("tokenizers")
    pre = library.pre_tokenizers
    models = library.models
    trainers = library.trainers
    if kind == "byte-level":
        model = library.Tokenizer(models.BPE())
        model.pre_tokenizer = pre.ByteLevel(add_prefix_space=True)
        model.post_processor = library.processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
        )
    elif kind == "word-piece":
        model = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        model.normalizer = library.normalizers.BertNormalizer()
        model.pre_tokenizer = pre.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=90, special_tokens=["[UNK]"], show_progress=False
        )
    else:
        model = library.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        model.normalizer = library.normalizers.Sequence(
            [library.normalizers.Prepend("\u2581"), library.normalizers.Replace(" ", "\u2581")]
        )
        tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=tokens, show_progress=False)
    model.train_from_iterator(["the king saw the moon", "the old king"] * 5, trainer)
    return tokenizer.from_bytes("huggingface", model.to_str().encode())


PLAIN = "".join(TEXTS).replace("\ud800", "\ufffd")
MAKE = {
    "bytes": lambda: tokenizer.Bytes(),
    "chars": lambda: vocabulary.chars_from(PLAIN),
    "words": lambda: vocabulary.make("words", [PLAIN], 1000),
    "words between spaces": lambda: tokenizer.Words(json.dumps({"words": PLAIN.split()}).encode()),
    "sentencepiece": lambda: vocabulary.train_sentencepiece(
        ["the king (1990-1992) \u6771\u4eac\u306f"] * 20, 330
    ),
    "llama": lambda: trained(
        byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="identity"
    ),
    "t5": lambda: trained(model_type="unigram", vocab_size=40),
    "suffix": lambda: trained(treat_whitespace_as_suffix=True, byte_fallback=True),
    "byte-level": lambda: hugging_face("byte-level"),
    "word-piece": lambda: hugging_face("word-piece"),
    "fallback": lambda: hugging_face("fallback"),
}
LOSSLESS = ("bytes", "chars", "sentencepiece", "llama")


@pytest.fixture(scope="module", params=list(MAKE))
def kind(request):
    return request.param, MAKE[request.param]()


def test_offsets_never_decrease_and_lie_in_the_text(kind):
    for text in TEXTS:
        ids, offsets = kind[1].encode_with_offsets(text)
        assert ids.dtype == np.int32 and offsets.shape == (len(ids), 2), text
        np.testing.assert_array_equal(ids, kind[1].encode(text))
        assert (np.diff(offsets, axis=0) >= 0).all(), text
        assert (offsets >= 0).all()
        assert (offsets <= len(text)).all()
        assert (offsets[:, 0] <= offsets[:, 1]).all()


def test_every_character_has_a_token(kind):
    """But for white space (which U+2581 is to sentencepiece) and what a normalisation drops."""
    for text in TEXTS:
        covered = np.zeros(len(text) + 1, bool)
        for begin, end in kind[1].encode_with_offsets(text)[1]:
            covered[begin:end] = True
        for place, character in enumerate(text):
            shown = not character.isspace() and unicodedata.category(character)[0] not in "MC"
            shown = shown and character != "\u2581"
            assert covered[place] or not shown, (text, place)


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_token_stands_for_its_own_characters(name):
    made = MAKE[name]()
    for text in TEXTS:
        text = base_tokenizer.replace_surrogates(text)[0]
        ids, offsets = made.encode_with_offsets(text)
        starts = np.unique(offsets[:, 0])
        for begin in starts:  # tokens of one character are decoded together
            mine = offsets[:, 0] == begin
            end = offsets[mine, 1].max(initial=begin)
            said = made.decode(ids[mine])
            meant = text[begin:end]
            assert said.strip(" ") == meant.strip(" "), (text, begin)


def test_lower_case_that_is_longer_keeps_the_places():
    text = "\u0130\u0130x \u0130"
    for name in ("bytes", "sentencepiece", "words between spaces"):
        ids, offsets = Encoder(MAKE[name](), True).with_offsets(text)
        np.testing.assert_array_equal(ids, Encoder(MAKE[name](), True)(text))
        assert offsets.max() == len(text)
        assert (np.diff(offsets, axis=0) >= 0).all()
    x = Encoder(tokenizer.Bytes(), True).with_offsets(text)
    assert x[1][x[0] == ord("x")].tolist() == [[2, 3]]


# ---------------------------------------------------------------- answers


def learned(example: dict, made, lowercase=False) -> str:
    """What the gold first and last token give back."""
    encode = Encoder(made, lowercase)
    piece = EXAMPLES["qa"](example, encode, Vocabulary(made, "qa"), ())
    (first,), (last,) = (np.flatnonzero(piece["targets"] & bit) for bit in (START, STOP))
    said = answer_text(example, encode, first, last)
    assert piece["exact"] == (said == example["answer"].strip())
    return said


CONTEXTS = [
    ("\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002", "\u65e5\u672c"),
    ("\u5317\u4eac\u662f\u4e2d\u56fd\u7684\u9996\u90fd\u3002", "\u4e2d\u56fd"),
    (
        "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e \u0e40\u0e1b\u0e47\u0e19",
        "\u0e40\u0e1b\u0e47\u0e19",
    ),
    ("He was king (1990-1992), then not.", "1992"),
    ("It cost $5,000.", "5,000"),
    ("call open('a.txt'), then close", "a.txt"),
    ("  spaces\n\n and   new\tlines,\u3000all kinds ", "new\tlines"),
    ("an emoji \U0001f600\U0001f469\u200d\U0001f4bb! here", "\U0001f469\u200d\U0001f4bb"),
    ("\u0130stanbul is \u0130zmir's rival", "\u0130zmir"),
    ("whole", "whole"),
    ("the end.", " end"),
]


@pytest.mark.parametrize(("context", "answer"), CONTEXTS)
@pytest.mark.parametrize("name", ["bytes", "chars", "pieces", "fallback pieces", "byte-level"])
def test_the_answer_is_its_own_characters(name, context, answer):
    made = {
        "bytes": tokenizer.Bytes,
        "chars": lambda: vocabulary.chars_from("q \u0307i" + context + context.lower()),
        "pieces": lambda: vocabulary.train_sentencepiece([f"{context} {answer.strip()}"] * 20, 300),
        "fallback pieces": MAKE["llama"],
        "byte-level": MAKE["byte-level"],
    }[name]()
    start = context.index(answer)
    for lowercase in (False, True):
        said = learned(
            {"question": "q", "context": context, "answer": answer, "start": start}, made, lowercase
        )
        if name in ("bytes", "chars"):
            assert said == answer.strip()
        assert answer.strip() in said
        assert len(said) < len(context) + (answer == context)


def test_the_place_counts_not_the_word():
    made = tokenizer.Bytes()
    example = {"question": "q", "context": "1992-1992-1992", "answer": "1992", "start": 5}
    piece = EXAMPLES["qa"](example, Encoder(made, False), Vocabulary(made, "qa"), ())
    assert np.flatnonzero(piece["targets"] & START) == 3 + 5
    assert np.flatnonzero(piece["targets"] & STOP) == 3 + 8


@pytest.mark.parametrize(
    "name", ["bytes", "chars", "sentencepiece", "words between spaces", "byte-level"]
)
def test_spaced_text_is_learned_as_ever(name):
    """Words encoded apart, the space with the word after it: what runs of earlier versions go on from."""
    made = MAKE[name]()
    words = ["the", "king", "the", "(1990-1992),"]
    vocab = Vocabulary(made, "qa")
    pieces = [made.encode(" " * bool(i) + word) for i, word in enumerate(words)]
    question = [vocab.begin, *made.encode("king"), vocab.end]
    ends = len(question) + np.cumsum([len(piece) for piece in pieces])
    for i, word in enumerate(words):
        context = " \n".join(words)
        start = sum(map(len, words[:i])) + 2 * i
        example = {"question": "king", "context": context, "answer": word, "start": start}
        piece = EXAMPLES["qa"](example, Encoder(made, False), vocab, ())
        np.testing.assert_array_equal(piece["tokens"], np.concatenate([question, *pieces]))
        assert np.flatnonzero(piece["targets"] & START) == ends[i] - len(pieces[i])
        assert np.flatnonzero(piece["targets"] & STOP) == ends[i] - 1


@pytest.mark.parametrize("start", ["x", 1.5, {}, "nan"])
def test_a_start_that_is_no_number_is_told(start):
    example = {"question": "q", "context": "ab", "answer": "b", "start": start}
    with pytest.raises(ValueError, match=r"its start .* is not a whole number"):
        learned(example, tokenizer.Bytes())


def test_an_answer_without_a_token_is_told():
    made = hugging_face("word-piece")
    with pytest.raises(ValueError, match="no token for its answer"):
        learned(
            {
                "question": "q",
                "context": "a\u0301 \u0301\u0301 b",
                "answer": "\u0301\u0301",
                "start": 3,
            },
            made,
        )


def test_long_answers_of_small_tokens_can_be_said():
    assert longest_answer(20, 120) == 30, "words: as ever"
    assert longest_answer(1000, 1000) == 180, "characters"
    assert longest_answer(300, 100) == 540, "the bytes of Japanese"
    assert longest_answer(0, 0) == 30


def made_questions(folder, count: int, seed: int) -> list[dict]:
    """Half of them of text without spaces, half of a year between other characters."""
    rng = np.random.default_rng(seed)
    examples = []
    cities = list("\u6771\u5317\u5357\u897f\u5927")
    lands = list("\u65e5\u97d3\u4e2d\u82f1\u72ec")
    for i in range(count):
        city, land = ("".join(rng.choice(kind, 2)) for kind in (cities, lands))
        begin = rng.integers(1000, 1990)
        end = rng.integers(1990, 2020)
        first = bool(rng.integers(2))
        if i % 2:
            context = f"{city}\u5e02\u306f{land}\u56fd\u306e\u9996\u90fd\u3067\u3059\u3002"
            example = {
                "question": "\u5e02" if first else "\u56fd",
                "answer": city if first else land,
            }
        else:
            context = f"He was king ({begin}-{end}), then not."
            example = {
                "question": "from" if first else "to",
                "answer": str(begin if first else end),
            }
        examples.append(example | {"context": context})
    lines = [json.dumps(example) + "\n" for example in examples]
    folder.joinpath(f"{seed}.jsonl").write_text("".join(lines))
    return examples


@pytest.mark.parametrize("kind", ["words", "sentencepiece"])
def test_a_tokenizer_made_for_answers_has_their_ends(tmp_path, caplog, kind):
    made_questions(tmp_path, 200, 0)
    changes = {
        "task__name": "qa",
        "data__tokenizer": kind,
        "data__train": str(tmp_path / "0.jsonl"),
    }
    source = Examples(small_config(**changes), "train")
    assert all(piece["exact"] for piece in source.pieces)
    (told,) = caplog.messages
    assert f"data.tokenizer={kind} is made finer" in told
    assert "(0% are left)" in told


def test_answers_that_end_inside_of_a_token_are_told(tmp_path, caplog):
    made_questions(tmp_path, 20, 0)
    (tmp_path / "tokenizer.json").write_bytes(MAKE["words between spaces"]().to_bytes())
    changes = {"task__name": "qa", "data__tokenizer": str(tmp_path / "tokenizer.json")}
    Examples(small_config(**changes, data__train=str(tmp_path / "0.jsonl")), "train")
    (told,) = caplog.messages
    assert "20 of 20 train answers begin or end inside of a token of the words tokenizer" in told


@pytest.mark.parametrize("spaced", ["Anna is in Berlin .", "Anna, (is) in Berlin ."])
def test_words_that_are_answers_as_they_stand_keep_their_tokenizer(tmp_path, spaced, caplog):
    example = {"question": "where?", "context": spaced, "answer": "Berlin"}
    (tmp_path / "a.jsonl").write_text(json.dumps(example) + "\n")
    changes = {
        "task__name": "qa",
        "data__tokenizer": "words",
        "data__train": str(tmp_path / "a.jsonl"),
    }
    source = Examples(small_config(**changes), "train")
    assert source.tokenizer.split == "spaces"
    assert not caplog.messages


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "chars", "sentencepiece"])
def test_answers_without_spaces_are_learned(tmp_path, kind):
    made_questions(tmp_path, 2000, 0)
    made_questions(tmp_path, 200, 1)
    settings = {
        "data.train": tmp_path / "0.jsonl",
        "data.val": tmp_path / "1.jsonl",
        "data.tokenizer": kind,
        "data.seq_len": 128,
        "train.steps": 100,
        "eval.every": 100,
        "log.tensorboard": False,
    }
    flags = []
    for key, value in settings.items():
        flags.append(f"--config.{key}={value}")
    program("jaxlm.train", "--config=configs/qa.py", f"--workdir={tmp_path / 'run'}", *flags)
    rows = []
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        rows.append(json.loads(line))
    print(kind, rows[-1])
    assert rows[-1]["eval/exact_match"] >= 95


# ---------------------------------------------------------------- tags


@pytest.mark.parametrize("name", list(MAKE))
def test_each_word_has_its_tag_once(name):
    made = MAKE[name]()
    words = ["the", "king", "\u6771\u4eac", "(1990-1992),", "xyz", "\U0001f600", "moon"]
    if name == "chars":
        made = vocabulary.chars_from(" ".join(words))
    labels = tuple("ABCDEFG")
    encode = Encoder(made, False)
    piece = EXAMPLES["tag"](
        {"words": words, "tags": list(labels)}, encode, Vocabulary(made, "tag"), labels
    )
    first = np.flatnonzero(piece["weights"])
    assert piece["targets"][first].tolist() == list(range(len(words)))
    ids = piece["tokens"][piece["tokens"] < made.vocab_size]
    np.testing.assert_array_equal(
        ids, made.encode(" ".join(words)), "as the text is encoded elsewhere"
    )
    if name in LOSSLESS:
        parts = np.split(piece["tokens"], first[1:])
        assert [made.decode(part).strip() for part in parts] == words


def test_a_word_that_the_tokenizer_drops_is_still_tagged():
    made = hugging_face("word-piece")
    vocab = Vocabulary(made, "tag")
    words = ["\u0301", "king", "", "\u200b", "the", "\u0301"]
    piece = EXAMPLES["tag"](
        {"words": words, "tags": list("ABABAB")}, Encoder(made, False), vocab, ("A", "B")
    )
    assert piece["targets"][piece["weights"] > 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert (piece["tokens"] == vocab.mask).sum() == 4
