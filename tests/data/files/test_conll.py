"""A word a line and a blank line between sentences: one example a sentence, whatever the file is called."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import small_config

from jaxlm.data.examples import Examples, label_names
from jaxlm.data.files.conll import words_of
from jaxlm.data.files.tables import read_examples
from jaxlm.errors import DataError

SENTENCES = [
    (["EU", "rejects", "German", "call"], ["B-ORG", "O", "B-MISC", "O"]),
    (["Peter"], ["B-PER"]),
]


def lines(mark, between=(), sentences=SENTENCES):
    """The sentences with other columns between word and tag."""
    blocks = []
    for words, tags in sentences:
        blocks.append(
            "".join(mark.join([word, *between, tag]) + "\n" for word, tag in zip(words, tags))
        )
    return "\n".join(blocks)


UNIVERSAL = """# sent_id = 1
# text = vámonos al mar
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tvamos\tir\tVERB\tv\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\tp\t_\t1\tobj\t_\t_
2.1\tx\tx\tX\tx\t_\t_\t_\t_\t_

# sent_id = 2
1\tmar\tmar\tNOUN\tn\t_\t0\troot\t_\t_
"""
FORMS = {
    "tabs": lines("\t"),
    "header": "word\ttag\n" + lines("\t"),
    "spaces": lines(" "),
    "of 2003": "-DOCSTART- -X- -X- O\n\n" + lines(" ", ("NN", "B-NP")),
    "documents": lines("\t") + "-DOCSTART-\tO\n\n",
    "windows": "\ufeff" + lines("\t").replace("\n", "\r\n"),
    "many blank lines": lines("\t").replace("\n\n", "\n\n\t\n \n") + "\n\n",
    "comments": "# id a-b\tdomain=x\n"
    + lines(" ", ("_", "_")).replace("\n\n", "\n\n# id c-d\tdomain=y\n"),
    "commas": "word,tag\n" + lines(","),
}


def read(path, content, columns=""):
    path.write_bytes(content.encode())
    return [(e["words"], e["tags"]) for e in read_examples(str(path), "tag", columns)[0]]


def refused(path, content, columns=""):
    with pytest.raises(DataError) as error:
        read(path, content, columns)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.tsv", "a.txt", "a.conll", "eng.train", "a.csv"])
@pytest.mark.parametrize("form", list(FORMS))
def test_each_sentence_is_one_example(tmp_path, form, name, caplog):
    if form == "commas":
        name = "a.csv"
    assert read(tmp_path / name, FORMS[form]) == SENTENCES
    assert "2 sentences, 5 words, read as a word a line" in caplog.text


def test_the_words_and_tags_of_conll_u(tmp_path):
    expected = [(["vamos", "nos"], ["VERB", "PRON"]), (["mar"], ["NOUN"])]
    assert read(tmp_path / "a.conllu", UNIVERSAL) == read(tmp_path / "a.tsv", UNIVERSAL) == expected
    assert read(tmp_path / "a.conllu", UNIVERSAL, "words=form tags=xpos")[0][1] == ["v", "p"]
    untagged = UNIVERSAL.replace("VERB", "_").replace("PRON", "_").replace("NOUN", "_")
    assert 'columns="words=1 tags=4"' in refused(tmp_path / "a.conllu", untagged)
    plus = "# global.columns = ID FORM UPOS\n1\tja\tX\n\n1\tnein\tY\n"
    assert read(tmp_path / "a.conllup", plus) == [(["ja"], ["X"]), (["nein"], ["Y"])]


def test_a_hash_is_a_word_where_its_line_has_the_columns(tmp_path):
    sentences = [(["#", "EU"], ["O", "B-ORG"]), (["#x", "ja"], ["O", "O"])]
    assert read(tmp_path / "a.tsv", lines("\t", sentences=sentences)) == sentences


def test_a_sentence_a_row_is_read_as_before(tmp_path):
    rows = [("a b c", "X Y Z"), ("d e", "X Y"), ("f", "Z")]
    text = "".join(f"{words}\t{tags}\n" for words, tags in rows)
    for content in (text, text.replace("\n", "\n\n"), "words\ttags\n" + text):
        assert read(tmp_path / "a.tsv", content) == rows
    dicts = "".join(
        json.dumps({"words": words.split(), "tags": tags.split()}) + "\n" for words, tags in rows
    )
    assert read(tmp_path / "a.jsonl", dicts) == [
        (words.split(), tags.split()) for words, tags in rows
    ]


def test_columns_by_place_and_by_name(tmp_path):
    path = tmp_path / "a.tsv"
    swapped = lines("\t", sentences=[(tags, words) for words, tags in SENTENCES])
    assert read(path, swapped, "words=1 tags=0") == SENTENCES
    assert read(path, "form\tpos\tner\n" + lines("\t", ("X",)), "words=form tags=ner") == SENTENCES
    assert read(path, lines("\t", ("X",)), "words=0 tags=1")[0][1] == ["X"] * 4


UNCLEAR = [
    (lines("\t", sentences=[(tags, words) for words, tags in SENTENCES]), 'columns="words=1 tags=0"'),
    (lines("\tNN\t", sentences=[(words, words) for words, _ in SENTENCES]), 'columns="words=0 tags=1"'),
    ("1\tEU\tB-ORG\tO\n2\tja\tO\tO\n\n1\tnein\tO\tO\n", 'columns="words=1 tags=2"'),
    ("EU\tB-ORG\nja\n\nnein\tO\n", "a.tsv:2: 1 columns, the other lines of words have 2"),
    ("EU\tB-ORG\nja\tO\nnein\tO\n", "a.tsv:1: each of its 3 rows is one word"),
]  # fmt: skip


# As Kaggle's NER corpus has it: the first word of a sentence has its number, the others an empty cell.
KAGGLE = "Sentence #,Word,POS,Tag\n" + (
    "Sentence: 1,EU,NNP,B-ORG\n,rejects,VBZ,O\n,German,JJ,B-MISC\n,call,NN,O\nSentence: 2,Peter,NNP,B-PER\n"
)
ROWS = [
    (0, "EU", "B-ORG"),
    (0, "rejects", "O"),
    (0, "German", "B-MISC"),
    (0, "call", "O"),
    (1, "Peter", "B-PER"),
]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt"])
def test_sentences_that_are_numbered_in_a_column(tmp_path, name):
    if name == "a.csv":
        kaggle = KAGGLE
    else:
        kaggle = KAGGLE.replace(",", "\t")
    assert read(tmp_path / name, kaggle) == SENTENCES
    assert read(tmp_path / name, kaggle, "tags=POS")[1] == (["Peter"], ["NNP"])
    mark = "," if name == "a.csv" else "\t"
    table = "".join(mark.join(map(str, row)) + "\n" for row in ROWS)
    assert (
        read(tmp_path / name, mark.join(["sentence_id", "word", "ner"]) + "\n" + table) == SENTENCES
    )
    assert "first line names" not in refused(tmp_path / name, table)
    assert "name the columns sentence, word and tag" in refused(
        tmp_path / name, table, "words=1 tags=2"
    )


def test_a_numbered_row_without_a_tag_is_refused_with_its_place(tmp_path):
    assert (
        "a.csv:4: no tag\n"
        in refused(tmp_path / "a.csv", KAGGLE.replace("JJ,B-MISC", "JJ,")) + "\n"
    )
    records = [
        {"sentence_id": 1, "word": "a", "tag": "O"},
        {"sentence_id": 1, "word": "b", "tag": None},
    ]
    said = refused(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    assert "a.jsonl:2: no tag" in said


def test_numbered_sentences_of_records(tmp_path):
    records = []
    for i, word, tag in ROWS:
        records.append({"sentence_id": i, "tokens": word, "ner_tags": tag})
    assert read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records))) == SENTENCES
    columns = {}
    for key in records[0]:
        columns[key] = [record[key] for record in records]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert [e["words"] for e in read_examples(str(tmp_path / "a.parquet"), "tag", "")[0]] == [
        words for words, _ in SENTENCES
    ]
    unnumbered = [{"words": word, "tags": tag} for _, word, tag in ROWS] * 4
    said = refused(tmp_path / "a.jsonl", "\n".join(map(json.dumps, unnumbered)))
    assert "each of its 20 rows is one word: give each sentence one row" in said


def test_a_sentence_a_row_with_its_number_is_read_as_a_sentence(tmp_path):
    content = "sentence_id\twords\ttags\n1\tEU rejects\tB-ORG O\n2\tPeter\tB-PER\n"
    assert read(tmp_path / "a.tsv", content) == [("EU rejects", "B-ORG O"), ("Peter", "B-PER")]


@pytest.mark.parametrize(("content", "said"), UNCLEAR, ids=range(len(UNCLEAR)))
def test_what_is_not_clear_is_refused_with_what_to_type(tmp_path, content, said):
    assert said in refused(tmp_path / "a.tsv", content)


def test_sentences_are_learned_whole(tmp_path):
    (tmp_path / "a.tsv").write_text(lines("\t"))
    config = small_config(
        task__name="tag", data__tokenizer="words", data__train=str(tmp_path / "a.tsv")
    )
    config.data.val = config.data.train
    assert label_names(config) == ("B-MISC", "B-ORG", "B-PER", "O")
    assert [int(piece["weights"].sum()) for piece in Examples(config, "train").pieces] == [4, 1]


def test_words_to_be_tagged():
    tags = ("B-MISC", "B-ORG", "B-PER", "O")
    expected = [words for words, _ in SENTENCES]
    words_alone = "\n".join("".join(f"{word}\n" for word in words) for words in expected)
    for text in (words_alone, lines("\t"), FORMS["of 2003"]):
        assert words_of("a", text, "", {}, tags) == expected
    for text in ("EU rejects a call\nPeter\n", "two words\n\nhere too\n", "one\ntwo\n", ""):
        assert words_of("a", text, "", {}, tags) == []
