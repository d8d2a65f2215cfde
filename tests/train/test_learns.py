"""A short run of the recipes for answers learns a rule, through the programs: places, summaries, dialogues.

The recipes learn from harder data of the same form; these are small enough for a few seconds.
"""

import json
import random

import pytest
from conftest import program

import jaxlm

NAMES = "anna boris cela dalia elmir anmir bona celtia".split()
TOWNS = "berlin losdem martova oswick vizen berdem".split()
DEEDS = "won gold,lost ships,found books,sold towers,built games,won ships".split(",")

pytestmark = pytest.mark.slow


def question(rng) -> dict:
    """Where is one of two people, each in a town?"""
    facts = list(zip(rng.sample(NAMES, 2), rng.sample(TOWNS, 2)))
    who, where = rng.choice(facts)
    context = " ".join(f"{name} is in {town} ." for name, town in facts)
    return {"question": f"where is {who} ?", "context": context, "answer": where}


def report(rng) -> dict:
    """Old news, and those of today, in either order; the summary is what was done today."""
    news, old = (f"{rng.choice(NAMES)} {rng.choice(DEEDS)}" for _ in range(2))
    sentences = [f"today {news} .", f"long ago {old} ."]
    rng.shuffle(sentences)
    return {"source": " ".join(sentences), "target": news}


def dialogue(rng) -> dict:
    """Who is told is asked for in the second turn."""
    name = rng.choice(NAMES)
    town = rng.choice(TOWNS)
    said = [f"i am {name} from {town}", f"hello {name}"]
    said += rng.choice([["where am i from ?", f"from {town}"], ["who am i ?", f"you are {name}"]])
    roles = ["user", "assistant"] * 2
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said)]}


def trained(folder, recipe, make, steps):
    """The run directory of a recipe that has learned from 1,500 examples of `make`; 100 others are in val.jsonl."""
    rng = random.Random(0)
    for name, count in (("train", 1500), ("val", 100)):
        lines = []
        for _ in range(count):
            lines.append(json.dumps(make(rng)) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    program(
        "jaxlm.train",
        f"--config=configs/{recipe}.py",
        f"--workdir={folder}/run",
        f"--config.data.train={folder}/train.jsonl",
        f"--config.data.val={folder}/val.jsonl",
        f"--config.train.steps={steps}",
        "--config.eval.every=0",
    )
    return folder / "run"


def evaluated(run) -> dict:
    program("jaxlm.evaluate", f"--workdir={run}", f"--json={run}/figures.json", "--bootstrap=0")
    return json.loads((run / "figures.json").read_text())


def test_qa_learns_whose_place_is_asked_for(tmp_path):
    """A model that only finds a town would be right in half of the cases."""
    figures = evaluated(trained(tmp_path, "qa", question, 150))
    assert figures["exact_match"] > 0.9 and figures["f1"] > 0.9, figures


def test_summarize_learns_what_is_news(tmp_path):
    """In its own words: the first is the name of the one who did it today."""
    run = trained(tmp_path, "summarize", report, 150)
    assert evaluated(run)["rougeL"] > 90
    texts = [
        "long ago anna sold towers . today boris won gold .",
        "today cela lost ships . long ago boris won gold .",
    ]
    assert [text.split()[0] for text in jaxlm.load(run).answer(texts)] == ["boris", "cela"]


def test_dialogue_learns_to_remember(tmp_path):
    lm = jaxlm.load(trained(tmp_path, "dialogue", dialogue, 150))
    rng = random.Random(1)
    right = 0
    dialogues = [dialogue(rng)["messages"] for _ in range(50)]
    for said, messages in zip(lm.answer([messages[:-1] for messages in dialogues]), dialogues):
        right += said == messages[-1]["content"]
    assert right > 45, right
