"""Laws of the tokenizers: every text comes back, no id that a model emits makes them raise, broken files say so."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxlm.data.tokenization import tokenizer, vocabulary
from jaxlm.errors import ConfigError, DataError

NASTY = [
    "",
    " ",
    "\n",
    "def f(x):\n\tif x:\r\n        return  {'a': 1234}\n\n\n    # two  spaces \n",
    "   leading, trailing   ",
    "\u2581 is sentencepiece's space \u2581\u2581a",
    "\0 NUL \0\0, \ufeff inside, \u3000 wide, \x85 \u2028 line ends",
    "e\u0301 is not \u00e9, \ufb01 is not fi, \uff21 is not A",
    "emoji \U0001f600\U0001f469\u200d\U0001f4bb, \u4e2d\u6587, \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "<|endoftext|> </s> <unk> <0x41> [CLS]",
    "a" * 5000 + " " * 5000,
]


def hugging_face() -> tokenizer.Tokenizer:
    library = pytest.importorskip("tokenizers")
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    model.train_from_iterator(NASTY, trainer)
    return tokenizer.from_bytes("huggingface", model.to_str().encode())


MAKE = {
    "bytes": lambda: tokenizer.from_bytes("bytes", b""),
    "chars": lambda: vocabulary.chars_from("".join(NASTY) + "\ufffd"),
    "sentencepiece": lambda: vocabulary.train_sentencepiece(NASTY * 5, 600),
    "huggingface": hugging_face,
}


@pytest.fixture(scope="module", params=list(MAKE))
def any_tokenizer(request):
    return MAKE[request.param]()


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_decode_inverts_encode(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert not len(ids) or (ids.min() >= 0 and ids.max() < any_tokenizer.vocab_size)
    assert any_tokenizer.decode(ids) == text


def test_a_lone_surrogate_is_read_as_the_replacement_character(any_tokenizer):
    assert any_tokenizer.decode(any_tokenizer.encode("a\ud800a\udfff")) == "a\ufffda\ufffd"


def test_decode_never_raises_and_special_tokens_are_empty(any_tokenizer):
    ids = [-1, -(2**31), any_tokenizer.vocab_size, 2**31 - 1, *range(any_tokenizer.vocab_size)]
    assert isinstance(any_tokenizer.decode(ids), str)
    special = []
    for i in (any_tokenizer.bos_id, any_tokenizer.eos_id):
        if i is not None:
            special.append(i)
    assert any_tokenizer.decode(special) == any_tokenizer.decode([]) == ""
    assert (any_tokenizer.eos_id is None) == (any_tokenizer.name == "chars")


def test_from_bytes_inverts_to_bytes(any_tokenizer, tmp_path):
    again = tokenizer.from_bytes(any_tokenizer.name, any_tokenizer.to_bytes())
    (tmp_path / any_tokenizer.filename).write_bytes(any_tokenizer.to_bytes())
    loaded = tokenizer.load(tmp_path / any_tokenizer.filename)
    for other in (again, loaded):
        assert other.name == any_tokenizer.name
        assert other.fingerprint == any_tokenizer.fingerprint
        assert (other.vocab_size, other.bos_id, other.eos_id) == (
            any_tokenizer.vocab_size,
            any_tokenizer.bos_id,
            any_tokenizer.eos_id,
        )
        assert np.array_equal(other.encode(NASTY[3]), any_tokenizer.encode(NASTY[3]))


def test_every_truncation_of_a_tokenizer_file_is_refused_by_name(any_tokenizer, tmp_path):
    data = any_tokenizer.to_bytes()
    file = tmp_path / any_tokenizer.filename
    for size in np.linspace(0, len(data) - 1, 15, dtype=int):
        file.write_bytes(data[:size])
        with pytest.raises(DataError, match=any_tokenizer.filename):
            tokenizer.load(file)


@pytest.mark.parametrize(
    "content", [b"\0\1garbage", b"[1]", b'{"jaxlm": "chars"}', b"{}", b"\xff\xfe"]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_garbage_is_refused_by_name(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        tokenizer.load(tmp_path / name)
    with pytest.raises(DataError, match="nowhere"):
        tokenizer.load(tmp_path / "nowhere.model")


def test_chars_names_the_characters_that_it_does_not_know():
    with pytest.raises(DataError, match="'x', 'z'"):
        vocabulary.chars_from("abc").encode("abzx")
    assert vocabulary.chars_from("cab").encode("abc").tolist() == [0, 1, 2]


def test_a_vocabulary_too_large_shrinks_and_one_too_small_is_explained():
    assert 260 < vocabulary.train_sentencepiece(["some text, some more"], 4096).vocab_size < 400
    with pytest.raises(ConfigError, match="--vocab_size="):
        vocabulary.train_sentencepiece(["some text"], 100)
    with pytest.raises(ConfigError, match="too little text"):
        vocabulary.train_sentencepiece([], 400)


def test_spaces_come_back_even_if_the_training_text_had_none():
    model = vocabulary.train_sentencepiece(["abcabc"], 400)
    assert model.decode(model.encode("a  b\t c ")) == "a  b\t c "


def test_indentation_is_few_tokens():
    code = "class A:\n    def f(self):\n        return 1\n\n" * 200
    model = vocabulary.train_sentencepiece([code], 500)
    assert len(model.encode("        return")) <= 3


def test_training_is_silent_and_the_same_every_time():
    script = (
        "from jaxlm.data.tokenization.vocabulary import train_sentencepiece as t\n"
        "print(t(['some text to train on, ' + chr(i) * i for i in range(97, 200)], 500).fingerprint)"
    )
    runs = []
    for n in "12":
        runs.append(
            subprocess.run(
                [sys.executable, "-c", script],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": n},
            )
        )
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) == 65
    assert runs[0].stderr == ""


def test_hugging_face_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install -e \"\.\[hf\]\""):
        tokenizer.from_bytes("huggingface", json.dumps({}).encode())


def named_tokens(words: list[str], special: list[str], processor: dict | None = None) -> tuple:
    """The words that a tokenizer.json of these words, special tokens and post processor has as bos and eos."""
    library = pytest.importorskip("tokenizers")
    vocabulary_ = {}
    for i, word in enumerate(["<unk>", *words]):
        vocabulary_[word] = i
    model = library.Tokenizer(library.models.WordLevel(vocabulary_, unk_token="<unk>"))
    model.add_special_tokens(special)
    content = json.loads(model.to_str())
    content["post_processor"] = processor
    made = tokenizer.from_bytes("huggingface", json.dumps(content).encode())
    known = {i: word for word, i in vocabulary_.items()}
    return known.get(made.bos_id), known.get(made.eos_id)


def template(before: list[str], after: list[str]) -> dict:
    pieces = []
    for word in [*before, *after]:
        pieces.append({"SpecialToken": {"id": word, "type_id": 0}})
    pieces.insert(len(before), {"Sequence": {"id": "A", "type_id": 0}})
    special = {}
    for word in [*before, *after]:
        special[word] = {"id": word, "ids": [1], "tokens": [word]}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": special}


DEEPSEEK = ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}


@pytest.mark.parametrize(
    "processor, expected",
    [
        (template(["<go>"], ["<stop>"]), ("<go>", "<stop>")),
        (template(["<go>"], []), ("<go>", "</s>")),
        (template([], ["<stop>", "<go>"]), ("<s>", "<stop>")),
        ({"type": "BertProcessing", "cls": ["<go>", 3], "sep": ["<stop>", 4]}, ("<go>", "<stop>")),
        (
            {"type": "Sequence", "processors": [BYTE_LEVEL, template(["<go>"], ["<stop>"])]},
            ("<go>", "<stop>"),
        ),
        (BYTE_LEVEL, ("<s>", "</s>")),
        (None, ("<s>", "</s>")),
    ],
)
def test_the_post_processor_says_which_tokens_begin_and_end_a_text(processor, expected):
    words = ["<s>", "</s>", "<go>", "<stop>"]
    assert named_tokens(words, words, processor) == expected


@pytest.mark.parametrize(
    "words, special, expected",
    [
        (["<s>", "</s>", "<bos>", "<eos>"], ["<bos>", "<eos>"], ("<bos>", "<eos>")),
        (["<s>", "</s>", "[PAD]"], ["[PAD]"], (None, None)),
        (["<s>", "</s>"], [], ("<s>", "</s>")),  # nothing is marked
        (DEEPSEEK, None, tuple(DEEPSEEK)),
        (["<|begin_of_text|>", "<|eot_id|>"], None, ("<|begin_of_text|>", "<|eot_id|>")),
        (["<|im_start|>", "<|im_end|>"], None, (None, "<|im_end|>")),
        (["<|im_end|>", "<|endoftext|>"], None, ("<|endoftext|>", "<|endoftext|>")),
    ],
)
def test_names_are_looked_for_among_the_special_tokens_only(words, special, expected):
    assert named_tokens(words, words if special is None else special) == expected


def test_a_sample_is_bounded_even_and_a_function_of_the_stream():
    samples = [vocabulary.Sample(100_000) for _ in range(2)]
    for i in range(300):
        for sample in samples:
            sample.add(f"{i:4}" * 1024)
    assert samples[0].chunks == samples[1].chunks
    assert 40_000 <= sum(map(len, samples[0].chunks)) <= 110_000
    assert int(samples[0].chunks[-1][:4]) > 250
