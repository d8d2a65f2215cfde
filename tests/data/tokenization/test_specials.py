"""Laws of begin and end of text: what is said wins over what is guessed, it is told, and a run keeps what it had."""

import json

import pytest
from conftest import small_config
from test_fidelity import BYTE_PIECES, EXACT, piece_model
from test_prepare import jsonl, run
from test_tokenizer import template

from jaxlm.data import prepare, store, transforms
from jaxlm.data.batches import open_stores
from jaxlm.data.examples import Encoder
from jaxlm.data.tokenization import specials, tokenizer, vocabulary
from jaxlm.errors import ConfigError, DataError
from jaxlm.run.checkpoint import describe_run, tokenizer_of

WORDS = ["<s>", "</s>", "<go>", "<stop>", "one", "two"]


def content(special: list[str], processor: dict | None = None) -> dict:
    """A tokenizer.json of WORDS, of which `special` are marked."""
    library = pytest.importorskip("tokenizers")
    model = library.Tokenizer(
        library.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="one")
    )
    model.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(special)
    return {**json.loads(model.to_str()), "post_processor": processor}


def folder(path, files: dict, special: list[str], processor: dict | None = None):
    """A folder as downloaded from a hub."""
    path.mkdir(exist_ok=True)
    files = {"tokenizer": content(special, processor), **files}
    for name, value in files.items():
        (path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def begin_and_end(loaded) -> tuple:
    ids = (loaded.bos_id, loaded.eos_id)
    return tuple(None if id_ is None else loaded.token(id_) for id_ in ids)


SAID = ("<go>", "<stop>")


@pytest.mark.parametrize(
    "files, expected",
    [
        (
            {
                "tokenizer_config": {
                    "bos_token": "<go>",
                    "eos_token": "<stop>",
                    "add_bos_token": False,
                }
            },
            SAID,
        ),
        (
            {
                "tokenizer_config": {
                    "bos_token": {"content": "<go>"},
                    "eos_token": {"content": "<stop>"},
                }
            },
            SAID,
        ),
        (
            {
                "special_tokens_map": {
                    "bos_token": "<go>",
                    "eos_token": {"content": "<stop>", "lstrip": False},
                }
            },
            SAID,
        ),
        ({"generation_config": {"bos_token_id": 2, "eos_token_id": [3, 1]}}, SAID),
        ({"config": {"bos_token_id": 2, "eos_token_id": 3, "model_type": "llama"}}, SAID),
        (
            {"config": {"bos_token_id": 0}, "tokenizer_config": {"bos_token": "<go>"}},
            ("<go>", "</s>"),
        ),
        ({"tokenizer_config": {"bos_token": None, "eos_token": "<stop>"}}, (None, "<stop>")),
        (
            {"tokenizer_config": {"bos_token": None}, "generation_config": {"bos_token_id": 2}},
            ("<go>", "</s>"),
        ),
        ({"tokenizer_config": {"model_max_length": 512}}, ("<s>", "</s>")),
        ({}, ("<s>", "</s>")),
    ],
)
def test_the_files_beside_a_tokenizer_say_what_begins_and_ends_a_text(tmp_path, files, expected):
    path = folder(tmp_path, files, WORDS[:4])
    for given in (path, path / "tokenizer.json"):
        loaded = tokenizer.load(given)
        assert begin_and_end(loaded) == expected
        assert loaded.notes == []


def test_files_beside_win_over_the_post_processor_and_that_over_names(tmp_path):
    processor = template(["<go>"], ["<stop>"])
    path = folder(tmp_path, {"special_tokens_map": {"eos_token": "</s>"}}, WORDS[:4], processor)
    loaded = tokenizer.load(path)
    assert begin_and_end(loaded) == ("<go>", "</s>")
    assert (loaded.bos_from, loaded.eos_from) == (
        specials.POST_PROCESSOR,
        "special_tokens_map.json",
    )


@pytest.mark.parametrize(
    "files, note",
    [
        (
            {"tokenizer_config": {"eos_token": "<end>"}},
            "tokenizer_config.json says that eos is '<end>', which",
        ),
        (
            {"generation_config": {"eos_token_id": 99}},
            "eos is token 99, which this tokenizer doesn't have",
        ),
        ({"config": {"eos_token_id": 4}}, "eos is token 4, 'one', which is no special token"),
    ],
)
def test_what_the_files_say_in_vain_is_told(tmp_path, files, note):
    loaded = tokenizer.load(folder(tmp_path, files, WORDS[:4]))
    assert begin_and_end(loaded) == ("<s>", "</s>")
    (told,) = loaded.notes
    assert note in told


def test_a_broken_file_beside_is_named(tmp_path):
    path = folder(tmp_path, {"generation_config": '{"eos_token_id": '}, WORDS[:4])
    with pytest.raises(
        DataError, match=r"generation_config\.json, beside the tokenizer, is not JSON"
    ):
        tokenizer.load(path)


def test_a_folder_without_a_tokenizer_says_what_to_make(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"it has vocab\.json, but none of tokenizer\.json.*save_pretrained"
    ):
        tokenizer.load(tmp_path)


def test_a_sentencepiece_model_is_found_in_its_folder_with_what_lies_beside(tmp_path):
    made = vocabulary.train_sentencepiece(["some text, some more"] * 5, 300)
    (tmp_path / "spiece.model").write_bytes(made.to_bytes())
    loaded = tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.eos_from) == (1, 1, specials.OWN)
    # Ids of another library are another numbering: only those of control tokens are taken.
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 2}')
    loaded = tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id) == (1, 1)
    assert len(loaded.notes) == 2
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    assert tokenizer.load(tmp_path).eos_id == 0


@pytest.mark.parametrize(
    "bos, eos, expected",
    [
        ("<go>", "<stop>", ("<go>", "<stop>")),
        ("2", "3", ("<go>", "<stop>")),
        ("none", None, (None, "</s>")),
        (None, "none", ("<s>", None)),
        (None, None, ("<s>", "</s>")),
    ],
)
def test_flags_win_and_data_are_written_and_told_with_them(tmp_path, bos, eos, expected):
    files = {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}}
    path = folder(tmp_path / "hub", files, WORDS[:4])
    text = jsonl(tmp_path / "a.jsonl", ["two two", "two"])
    out = tmp_path / "out"
    manifest = prepare.prepare(
        [str(text)], out, str(path), val_fraction=0, workers=1, bos=bos, eos=eos
    )
    loaded = tokenizer.load(out)
    assert begin_and_end(loaded) == expected
    data = store.Store(out, "train")
    if loaded.eos_id is None:
        end = []
    else:
        end = [loaded.eos_id]
    assert data.read(0, data.num_tokens).tolist() == [5, 5, *end, 5, *end]
    line = prepare.summary(manifest, out).splitlines()[4]
    for role, token, flag in (("bos", expected[0], bos), ("eos", expected[1], eos)):
        if flag:
            origin = f"(--{role})"
        else:
            origin = "(tokenizer_config.json)"
        if token is None:
            said = f"no {role} {origin}"
        else:
            said = f"{role} {token} is token {WORDS.index(token)} {origin}"
        assert said in line
    assert ("documents have no end" in line) == (expected[1] is None)
    # What else the same data would be prepared with is refused, not overlooked.
    with pytest.raises(ConfigError, match=r"(?s)eos_id was .*--overwrite"):
        prepare.prepare([str(text)], out, str(path), val_fraction=0, workers=1, bos=bos, eos="one")


def test_a_flag_that_names_no_token_is_refused(tmp_path):
    path = folder(tmp_path / "hub", {}, WORDS[:4])
    text = jsonl(tmp_path / "a.jsonl")
    arguments = ("--input", text, "--output", tmp_path / "out", "--tokenizer")
    result = run(*arguments, path, "--bos=<stpo>", "--eos=17")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "--bos=<stpo>: this tokenizer has no such token; its special" in result.stderr
    assert "did you mean <stop>?" in result.stderr
    assert (
        "--eos=17: this tokenizer has no such token; its special tokens are <s>, </s>, <go>"
        in result.stderr
    )
    result = run(*arguments, "bytes", "--eos=none")
    assert result.returncode == 2
    assert "--tokenizer=bytes has its own" in result.stderr


@pytest.mark.parametrize("marked", [True, False])
def test_a_missing_end_lists_the_special_tokens_that_may_be_chosen(tmp_path, marked):
    names = ["<go>", "<stop>"] if marked else []
    path = folder(tmp_path / "hub", {}, names)
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace("</s>", "</x>").replace("<s>", "<x>"))
    text = jsonl(tmp_path / "a.jsonl", ["two two", "two"])
    manifest = prepare.prepare([str(text)], tmp_path / "out", str(path), val_fraction=0, workers=1)
    if marked:
        listed = "<go>, <stop>"
    else:
        listed = "<x>, </x>, <go>, <stop>"
    said = prepare.summary(manifest, tmp_path / "out")
    assert f"; --eos=TOKEN chooses one of {listed}" in said.splitlines()[4]
    with pytest.raises(ConfigError, match=f"its special tokens are {listed}; none is for no token"):
        prepare.prepare([str(text)], tmp_path / "b", str(path), workers=1, eos="<end>")


def test_data_of_an_earlier_version_stay_as_they_are(tmp_path, capsys):
    path = folder(tmp_path / "hub", {"tokenizer_config": {"eos_token": "<stop>"}}, WORDS[:4])
    text = jsonl(tmp_path / "a.jsonl", ["two two", "two"])
    manifest = prepare.prepare([str(text)], tmp_path / "out", str(path), val_fraction=0, workers=1)
    older = json.loads(json.dumps(manifest))
    del older["kept"], older["options"]["bos_id"], older["options"]["eos_id"]
    older["tokenizer"] = {
        key: older["tokenizer"][key] for key in ("name", "file", "vocab_size", "sha256")
    }
    older["tokenizer"] |= {"bos_id": None, "eos_id": 1}
    (tmp_path / "out" / store.MANIFEST).write_text(json.dumps(older))
    assert (
        prepare.prepare([str(text)], tmp_path / "out", str(path), val_fraction=0, workers=1)
        == older
    )
    assert "eos <stop> is token 3 (tokenizer_config.json); --overwrite" in " ".join(
        capsys.readouterr().err.split()
    )
    assert "no bos, so that a prompt can't be empty, eos is token 1" in prepare.summary(
        older, tmp_path / "out"
    )
    assert tokenizer.load(tmp_path / "out").eos_id == 1


def test_a_run_keeps_what_it_was_trained_with(tmp_path):
    path = folder(
        tmp_path / "hub",
        {"tokenizer_config": {"bos_token": "<go>", "eos_token": "<stop>"}},
        WORDS[:4],
    )
    trained_with = tokenizer.load(path)
    meta = json.loads(json.dumps(describe_run(small_config(), trained_with, {})))
    (tmp_path / "run").mkdir()
    specials.write_tokenizer(tmp_path / "run", trained_with)
    (tmp_path / "run" / "config.json").write_text(json.dumps(meta["config"]))
    for again in (
        tokenizer_of(meta),
        tokenizer.load(tmp_path / "run"),
        tokenizer.load(tmp_path / "run/tokenizer.json"),
    ):
        assert begin_and_end(again) == ("<go>", "<stop>")
        assert again.fingerprint == trained_with.fingerprint


def test_an_older_run_keeps_the_guess_that_it_was_trained_with(tmp_path):
    """It looked for names in the whole vocabulary: here <s>, which is an ordinary token."""
    made = folder(tmp_path, {}, ["<go>"], template(["<go>"], ["<stop>"]))
    meta = json.loads(json.dumps(describe_run(small_config(), tokenizer.load(made), {})))
    for role in specials.ROLES:
        del meta["tokenizer"][f"{role}_id"], meta["tokenizer"][f"{role}_from"]
    assert begin_and_end(tokenizer_of(meta)) == (
        "<go>",
        "<stop>",
    )  # a run of the version before this one
    del meta["config"]["eval.bleu_tokenize"]
    (tmp_path / "config.json").write_text(json.dumps(meta["config"]))
    for again in (tokenizer_of(meta), tokenizer.load(tmp_path)):
        assert begin_and_end(again) == ("<s>", "</s>")


def test_a_mixture_of_data_with_different_ends_is_refused(tmp_path):
    path = folder(tmp_path / "hub", {}, WORDS[:4])
    text = jsonl(tmp_path / "a.jsonl", ["two two", "two"])
    for eos in ("</s>", "<stop>"):
        prepare.prepare(
            [str(text)], tmp_path / eos.strip("</>"), str(path), val_fraction=0, workers=1, eos=eos
        )
    config = small_config(data__path="", data__mixture=f"{tmp_path}/s=0.5,{tmp_path}/stop=0.5")
    with pytest.raises(DataError, match=r"bos 0 and eos 1, bos 0 and eos 3.*--eos"):
        open_stores(config, "train")


def test_words_of_a_sentence_get_no_space_each():
    """A sentencepiece model with a dummy prefix: words that are tagged are the tokens of their sentence."""
    words = ["the", "cat", "sat", "on", "mat"]
    model = piece_model(**BYTE_PIECES, **EXACT)
    encode = Encoder(model, lowercase=False)
    made = transforms.tag(
        {"words": words, "tags": ["a"] * 5}, encode, transforms.Vocabulary(model, "tag"), ("a",)
    )
    assert made["tokens"].tolist() == model.encode(" ".join(words)).tolist()
    assert made["weights"].sum() == 5
