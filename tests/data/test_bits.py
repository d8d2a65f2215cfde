"""Bits per byte are given only where the tokenizer knows all of the text: an unknown token would flatter."""

import io
import json
import math

import pytest
from conftest import mesh_of, small_config

from jaxlm.data.bits_per_byte import count_unknown
from jaxlm.data.prepare import prepare
from jaxlm.data.store import Store
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.data.tokenization import vocabulary
from jaxlm.evaluate.evaluator import Evaluator
from jaxlm.evaluate.score import warn_once
from jaxlm.generate.lm import LM
from jaxlm.generate.text_loss import predicted_bytes

KNOWN = ["the cat sat on the mat", "a red moon over the old sea", "two dogs run by the sea"]
CHINESE = "\u4eca\u5929\u5929\u6c14\u5f88\u597d"
LETTERS = "abcdefghilmnorstuvwy "
KINDS = ("words", "sentencepiece", "WordLevel", "BPE", "one for all")


def huggingface(words, unknown, spaced):
    """A tokenizer.json that knows these words, or letters, alone."""
    library = pytest.importorskip("tokenizers")
    vocab = {}
    for number, word in enumerate(dict.fromkeys([unknown, *words])):
        vocab[word] = number
    if spaced:
        made = library.Tokenizer(library.models.WordLevel(vocab, unk_token=unknown))
        made.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    else:
        made = library.Tokenizer(library.models.BPE(vocab, [], unk_token=unknown))
    made.add_special_tokens([unknown])
    return tokenizers.HuggingFace(made.to_str().encode())


def sentencepiece_of_letters():
    """A model without byte_fallback, as the older ones are."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    data = io.BytesIO()
    trainer.train(
        sentence_iterator=iter(KNOWN),
        model_writer=data,
        model_type="char",
        minloglevel=2,
        vocab_size=24,
    )
    return tokenizers.SentencePiece(data.getvalue())


def tokenizer_of(kind):
    if kind == "words":
        return vocabulary.make("words", KNOWN, 8000)
    if kind == "sentencepiece":
        return sentencepiece_of_letters()
    if kind == "WordLevel":
        return huggingface(" ".join(KNOWN).split(), "[UNK]", spaced=True)
    if kind == "BPE":
        return huggingface(LETTERS, "[UNK]", spaced=False)
    return huggingface(
        LETTERS, tokenizers.END_OF_TEXT, spaced=False
    )  # unknown, begin and end are one token


def data_of(folder, tokenizer, texts):
    """A prepared directory of these documents, about half of them in its validation split."""
    path = folder / tokenizer.filename
    path.write_bytes(tokenizer.to_bytes())
    lines = []
    for text in texts:
        lines.append(json.dumps({"text": text}) + "\n")
    (folder / "text.jsonl").write_text("".join(lines))
    prepare(
        [str(folder / "text.jsonl")],
        folder / "data",
        tokenizer=str(path),
        val_fraction=0.5,
        workers=1,
    )
    return folder / "data"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unknown", [0, 1])
def test_an_evaluation_has_bits_per_byte_where_no_token_is_unknown(tmp_path, caplog, kind, unknown):
    texts = [text + f" {text}" * 40 for text in KNOWN] * 8
    texts += [text + " \u732b" * unknown for text in texts]  # a share that prepare takes
    tokenizer = tokenizer_of(kind)
    path = data_of(tmp_path, tokenizer, texts)
    config = small_config(data__path=str(path), model__vocab_size=tokenizer.vocab_size)
    warn_once.cache_clear()
    caplog.clear()
    evaluator = Evaluator(config, mesh_of(1))
    figures = evaluator.figures({"loss": 7.0, "weight": 2.0}, complete=True)
    store = Store(path, "val")
    assert ("bits_per_byte" in figures) == ("bytes" in figures) == (not unknown)
    assert figures["loss"] == 3.5
    assert figures["tokens"] == 2
    assert len(caplog.messages) == unknown
    if unknown:
        found = count_unknown(store, tokenizers.load(path))
        share = 100 * found / store.num_tokens
        (line,) = caplog.messages
        assert f"is left out: {found:,} of {store.num_tokens:,} tokens ({share:.3g}%)" in line
        assert 0 < share < 1


def test_the_size_in_bits_of_a_text_with_unknown_tokens_is_nan(caplog, monkeypatch):
    tokenizer = tokenizer_of("BPE")
    config = small_config(model__vocab_size=tokenizer.vocab_size, data__seq_len=64)
    lm = LM(config, {}, tokenizer, mesh_of(1), 0)
    monkeypatch.setattr(
        "jaxlm.generate.text_loss.row_losses",
        lambda model, params, batch, config: batch["weights"].sum(axis=1),
    )
    known, odd = lm.loss([KNOWN[0], KNOWN[1] + CHINESE])
    predicted = len(KNOWN[0]) - 1  # nothing precedes the first token
    assert known.tokens == predicted
    assert known.nats_per_token == 1
    assert known.bits_per_byte == pytest.approx(1 / math.log(2))
    assert math.isnan(odd.bits_per_byte)
    assert odd.nats_per_token == 1
    (line,) = caplog.messages
    assert line.startswith(
        "bits per byte is left out: 6 of 33 tokens (18.2%) of 1 of the 2 texts are"
    )
    caplog.clear()
    assert lm.loss(KNOWN[:1]) == [known]
    assert not caplog.messages


def dropping():
    """A BPE without an unknown token, which passes over what it has no token for."""
    library = pytest.importorskip("tokenizers")
    vocab = {}
    for number, letter in enumerate(LETTERS):
        vocab[letter] = number
    made = library.Tokenizer(library.models.BPE(vocab, []))
    return tokenizers.HuggingFace(made.to_str().encode())


@pytest.mark.parametrize("odd", [0, 1])
def test_text_that_is_dropped_flatters_as_much(tmp_path, caplog, odd):
    texts = [f"{text} " * 40 + CHINESE[0] * odd for text in KNOWN] * 8
    path = data_of(tmp_path, dropping(), texts)
    config = small_config(data__path=str(path), model__vocab_size=len(LETTERS))
    warn_once.cache_clear()
    figures = Evaluator(config, mesh_of(1)).figures({"loss": 7.0, "weight": 2.0}, complete=True)
    assert ("bits_per_byte" in figures) == (not odd)
    said = []
    for line in caplog.messages:
        if "the tokenizer has no tokens for 24 characters" in line:
            said.append(line)
    assert len(said) == odd


def test_the_size_in_bits_of_a_text_that_is_dropped_in_part_is_nan(caplog):
    whole, part = predicted_bytes(dropping(), [KNOWN[0], KNOWN[0] + CHINESE])
    assert whole == len(KNOWN[0]) - 1
    assert math.isnan(part)
    assert caplog.messages == [
        "bits per byte is left out: the tokenizer has no tokens for 6 characters of these texts, which are lost"
    ]


def test_the_first_word_of_a_text_is_not_among_its_bytes():
    assert predicted_bytes(tokenizer_of("words"), ["the cat", "cat", ""]) == [4, 0, 0]
