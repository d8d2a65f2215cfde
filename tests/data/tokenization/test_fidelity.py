"""Laws of what a tokenizer keeps: unknown text is a share and refused, what does not come back is told, and pieces of
a document are its tokens, wherever it is cut."""

import io
import json
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
from test_prepare import jsonl, run

from jaxlm.data import prepare, readers, store
from jaxlm.data import shard_jobs as parts
from jaxlm.data.tokenization import fidelity, tokenizer, vocabulary
from jaxlm.errors import DataError

ENGLISH = "the cat sat on the mat, and the dog ran to the old house by the sea. "
CHINESE = "\u4eca\u5929\u5929\u6c14\u5f88\u597d"
TEXT = (
    "  def f(x):\n\tif x:  # two  spaces\n        return {'a': 12}\n\nthe cat sat  on the mat\n" * 3
)


def piece_model(**options) -> tokenizer.Tokenizer:
    """A sentencepiece model as others train them."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([ENGLISH, *TEXT.split("\n")] * 20),
        model_writer=file,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 120, "model_type": "bpe", **options},
    )
    return tokenizer.from_bytes("sentencepiece", file.getvalue())


BYTE_PIECES = {"vocab_size": 400, "byte_fallback": True}
EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def json_model(**parts_) -> tokenizer.Tokenizer:
    """A tokenizer.json of a BPE over ENGLISH and TEXT with these normalizer, pre_tokenizer and decoder."""
    library = pytest.importorskip("tokenizers")
    model = library.Tokenizer(library.models.BPE())
    for name, value in parts_.items():
        setattr(model, name, value(library))
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=[*alphabet, *TEXT],
        special_tokens=["<s>"],
        show_progress=False,
    )
    model.train_from_iterator([ENGLISH, TEXT], trainer)
    return tokenizer.from_bytes("huggingface", model.to_str().encode())


def llama(lib) -> dict:
    replace = lib.normalizers.Replace
    return lib.normalizers.Sequence([lib.normalizers.Prepend("\u2581"), replace(" ", "\u2581")])


def llama_decoder(lib):
    decoders = lib.decoders
    return decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def metaspace(scheme):
    return {
        "pre_tokenizer": lambda lib: lib.pre_tokenizers.Metaspace(prepend_scheme=scheme),
        "decoder": lambda lib: lib.decoders.Metaspace(prepend_scheme=scheme),
    }


PREFIXED = {
    "sentencepiece": lambda: piece_model(**BYTE_PIECES, **EXACT),
    "sentencepiece that strips": lambda: piece_model(),
    "llama": lambda: json_model(normalizer=llama, decoder=llama_decoder),
    "metaspace always": lambda: json_model(**metaspace("always")),
    "metaspace first": lambda: json_model(**metaspace("first")),
    "words of metaspace": lambda: json_model(
        pre_tokenizer=lambda lib: lib.pre_tokenizers.Sequence(
            [lib.pre_tokenizers.WhitespaceSplit(), lib.pre_tokenizers.Metaspace()]
        ),
        decoder=lambda lib: lib.decoders.Metaspace(),
    ),
    "byte level": lambda: json_model(
        pre_tokenizer=lambda lib: lib.pre_tokenizers.ByteLevel(add_prefix_space=True),
        decoder=lambda lib: lib.decoders.ByteLevel(),
    ),
    "made here": lambda: vocabulary.train_sentencepiece([ENGLISH, TEXT], 400),
}
KEEP_ALL = set(PREFIXED) - {"sentencepiece that strips", "words of metaspace"}


@pytest.mark.parametrize("kind", PREFIXED)
def test_a_text_is_the_same_wherever_it_is_cut(kind):
    model = PREFIXED[kind]()
    rng = np.random.default_rng(0)
    whole = model.decode(model.encode(TEXT))
    if kind in KEEP_ALL:
        assert fidelity.same(TEXT, whole)
    for _ in range(20):
        cuts = np.unique([0, len(TEXT), *rng.integers(1, len(TEXT), 4)])
        ids = []
        before = ""
        for start, stop in pairwise(cuts):
            ids.append(model.encode(TEXT[start:stop], after=before))
            before = TEXT[:stop]
        assert model.decode(np.concatenate(ids)) == whole


@pytest.mark.parametrize(
    "kind", ["sentencepiece", "sentencepiece that strips", "llama", "byte level"]
)
@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_long_documents_are_written_as_they_are(tmp_path, monkeypatch, kind, form):
    """In pieces, and in parts that begin anywhere: at a line, or between two characters."""
    monkeypatch.setattr(readers, "PIECE_BYTES", 100)
    monkeypatch.setattr(parts, "PIECE_BYTES", 20)
    monkeypatch.setattr(parts, "PART_BYTES", 300)
    model = PREFIXED[kind]()
    text = (TEXT + ENGLISH) * 5
    file = tmp_path / f"a.{form}"
    if form == "txt":
        file.write_text(text)
        assert len(parts.plan(readers.find([str(file)]))) > 3
    else:
        jsonl(file, [text])
    (tmp_path / model.filename).write_bytes(model.to_bytes())
    given = str(tmp_path / model.filename)
    prepare.prepare(
        [str(file)], tmp_path / "out", given, val_fraction=0, workers=1, allow_unknown=True
    )
    data = store.Store(tmp_path / "out", "train")
    assert data.num_documents == 1
    back = model.decode(data.read(0, data.num_tokens))
    assert back == model.decode(model.encode(text))
    if kind in KEEP_ALL:
        assert fidelity.same(text, back)


def test_the_sign_that_sentencepiece_writes_a_space_as_comes_back():
    model = PREFIXED["sentencepiece"]()
    text = "a \u2581 b\u2581c\u2581"
    assert model.decode(model.encode(text)) == text


def word_model(unknown: str | None = "<unk>") -> tokenizer.Tokenizer:
    library = pytest.importorskip("tokenizers")
    words = sorted(set(ENGLISH.replace(",", " ").replace(".", " ").split()))
    ids = {}
    for i, word in enumerate([",", ".", *words, *([unknown] if unknown else [])]):
        ids[word] = i
    model = library.Tokenizer(
        library.models.WordLevel(ids, **({"unk_token": unknown} if unknown else {}))
    )
    model.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return tokenizer.from_bytes("huggingface", model.to_str().encode())


def letters_model() -> tokenizer.Tokenizer:
    """A BPE without an unknown token, which leaves out what it does not know."""
    library = pytest.importorskip("tokenizers")
    model = library.Tokenizer(
        library.models.BPE({letter: i for i, letter in enumerate(sorted(set(ENGLISH)))}, [])
    )
    return tokenizer.from_bytes("huggingface", model.to_str().encode())


LOSES = {"pieces": piece_model, "words": word_model, "letters": letters_model}


def prepared(tmp_path, model, docs, **options):
    """(manifest, lines of the summary) of documents in this tokenizer."""
    jsonl(tmp_path / "a.jsonl", docs)
    file = tmp_path / f"given-{model.filename}"
    file.write_bytes(model.to_bytes())
    arguments = {"val_fraction": 0, "workers": 1, "overwrite": True, **options}
    manifest = prepare.prepare(
        [str(tmp_path / "a.jsonl")], tmp_path / "out", str(file), **arguments
    )
    return manifest, prepare.summary(manifest, tmp_path / "out").splitlines()


@pytest.mark.parametrize("kind", LOSES)
def test_text_that_a_tokenizer_lacks_is_told_as_a_share_and_refused(tmp_path, kind):
    model = LOSES[kind]()
    docs = [ENGLISH, CHINESE * 10]
    share = 60 / (60 + len(ENGLISH))
    with pytest.raises(
        DataError, match=rf"{share:.2%} of the text \(60 of .*\u4eca.*--allow_unknown"
    ):
        prepared(tmp_path, model, docs)
    assert not (tmp_path / "out").exists()
    manifest, lines = prepared(tmp_path, model, docs, allow_unknown=True)
    assert manifest["counts"]["unknown_characters"] == 60
    (line,) = [line for line in lines if "of the text" in line]
    assert line.startswith("note: ")
    assert f"{share:.2%} of the text (60 of" in line
    assert "\u4eca" in line


@pytest.mark.parametrize("kind", LOSES)
def test_up_to_a_hundredth_is_told_alone_and_nothing_where_all_is_known(tmp_path, kind):
    model = LOSES[kind]()
    _, lines = prepared(tmp_path, model, [ENGLISH] * 20 + [CHINESE])
    assert [
        line for line in lines if line.startswith("note: ") and "0.43% of the text (6 of" in line
    ]
    manifest, lines = prepared(tmp_path, model, [ENGLISH] * 20)
    assert not [line for line in lines if "of the text" in line]
    assert manifest["counts"]["unknown_tokens"] == manifest["counts"]["unknown_characters"] == 0


def test_the_refusal_is_one_error_with_exit_code_3(tmp_path):
    (tmp_path / "t.model").write_bytes(piece_model().to_bytes())
    jsonl(tmp_path / "a.jsonl", [CHINESE])
    arguments = (
        "--input",
        tmp_path / "a.jsonl",
        "--output",
        tmp_path / "out",
        "--tokenizer",
        tmp_path / "t.model",
    )
    result = run(*arguments, "--val_fraction=0")
    assert result.returncode == 3
    assert "Traceback" not in result.stderr
    assert "error: 1 of 3 tokens" in result.stderr
    assert "100.00% of the text" in result.stderr


def test_words_that_are_made_here_may_lack_the_rare_ones(tmp_path):
    jsonl(tmp_path / "a.jsonl", [ENGLISH, "seldom rare"])
    manifest = prepare.prepare(
        [str(tmp_path / "a.jsonl")], tmp_path / "out", "words", vocab_size=8, workers=1
    )
    assert "of the text (" in prepare.summary(manifest, tmp_path / "out")
    assert manifest["counts"]["unknown_characters"] > 10


def test_what_a_tokenizer_cannot_write_at_all_is_an_error_with_the_text(tmp_path):
    with pytest.raises(DataError, match=f"can't write '{CHINESE}'"):
        prepared(tmp_path, word_model(unknown=None), [CHINESE])


def lower(lib):
    steps = [lib.normalizers.NFD(), lib.normalizers.Lowercase(), lib.normalizers.StripAccents()]
    return lib.normalizers.Sequence(steps)


def byte_level(**more) -> tokenizer.Tokenizer:
    return json_model(
        pre_tokenizer=lambda lib: lib.pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=lambda lib: lib.decoders.ByteLevel(),
        **more,
    )


@pytest.mark.parametrize(
    "model, docs, told",
    [
        (
            lambda: piece_model(),
            ["the cat\tsat on"] + ["the cat"] * 3,
            "tabs are lost ('a\\tb' comes back as 'a b')",
        ),
        (
            lambda: piece_model(),
            ["the cat\nsat"] + ["the cat"] * 3,
            "newlines are lost ('a\\nb' comes back as 'a b')",
        ),
        (
            lambda: piece_model(),
            ["cat  sat"] + ["a cat"] * 3,
            "runs of spaces shrink ('a  b' comes back as 'a b')",
        ),
        (
            lambda: byte_level(normalizer=lower),
            ["The Cat", *["cat"] * 3],
            "capital letters are lost ('Ab' comes back",
        ),
        (
            lambda: byte_level(normalizer=lower),
            ["caf\u00e9", *["cat"] * 3],
            "accents are lost ('\u00e9' comes back",
        ),
        (
            lambda: byte_level(normalizer=lambda lib: lib.normalizers.NFKC()),
            ["\uff21\ufb01", *["cat"] * 3],
            "compatibility characters are replaced ('\ufb01' comes back as 'fi')",
        ),
        (
            lambda: byte_level(normalizer=lambda lib: lib.normalizers.Replace("cat", "dog")),
            ["a cat sat", *["a dog"] * 3],
            "'a cat sat' comes back as 'a dog sat'",
        ),
    ],
)
def test_what_does_not_come_back_is_told_in_one_line(tmp_path, model, docs, told):
    _, lines = prepared(tmp_path, model(), docs)
    (line,) = [line for line in lines if "give the text back" in line]
    assert line.startswith("note: this tokenizer doesn't give the text back: ")
    assert told in line
    assert "in 25% of the documents (4 were looked at)" in line


def test_no_example_is_given_of_words_that_are_unknown(tmp_path):
    (tmp_path / "a.txt").write_text("the cat\nsat on the mat\n" * 20)
    manifest = prepare.prepare([str(tmp_path / "a.txt")], tmp_path / "out", "words", workers=1)
    said = prepare.summary(manifest, tmp_path / "out")
    assert "newlines are lost; in" in said


@pytest.mark.parametrize("kind", sorted(KEEP_ALL))
def test_nothing_is_told_where_all_comes_back_but_for_the_first_space(tmp_path, kind):
    _, lines = prepared(tmp_path, PREFIXED[kind](), [TEXT, ENGLISH, "  two spaces"])
    assert not [line for line in lines if "give the text back" in line or "of the text" in line]


def test_only_texts_with_unknown_tokens_are_looked_at_closer():
    model = piece_model()
    kept = fidelity.Kept(model)
    asked = []
    lost = model.lost
    model.lost = lambda text: asked.append(text) or lost(text)
    for text in (ENGLISH, CHINESE, "the cat"):
        kept.inspect(text, model.encode(text))
    assert asked == [CHINESE]
    assert json.loads(json.dumps(kept.record()))["unknown_characters"] == 6


def test_newlines_are_told_of_texts_with_unknown_text_too(tmp_path):
    _, lines = prepared(
        tmp_path, piece_model(), [f"the cat\n{CHINESE}", CHINESE], allow_unknown=True
    )
    (line,) = [line for line in lines if "give the text back" in line]
    assert "newlines are lost" in line
    assert "in 50% of the documents" in line
