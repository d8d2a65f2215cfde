"""Whole lives of models, on small made data, by the real program: what each step of one is for, in figures (see -s)."""

import json

import jax
import numpy as np
import pytest
from conftest import body_logits, program

import jaxlm
from jaxlm.config.tasks import TASKS
from jaxlm.data.prepare import prepare
from jaxlm.data.tokenization import vocabulary
from jaxlm.run.checkpoint import name_of

pytestmark = pytest.mark.slow
SETTINGS = {
    "model.name": "encoder",
    "model.num_layers": 2,
    "model.embed_dim": 64,
    "model.num_heads": 4,
    "model.qk_norm": True,
    "data.path": "",
    "data.tokenizer": "words",
    "data.seq_len": 32,
    "train.batch_size": 8,
    "train.steps": 100,
    "optim.name": "adamw",
    "optim.learning_rate": 3e-3,
    "optim.end_factor": 0.0,
    "optim.weight_decay": 0.01,
    "eval.every": 1000,
    "log.every": 1,
    "log.tensorboard": False,
}


def train(workdir, **settings):
    """{key: [its values, in order]} of the metrics of a run of jaxlm.train; keys with __ for the dot."""
    flags = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    if flags["data.path"]:
        del flags["data.tokenizer"]
    task = flags.get("task.name", "lm")
    flags = [f"--config.{key}={value}" for key, value in flags.items()]
    program("jaxlm.train", "--config=configs/quickstart.py", f"--workdir={workdir}", *flags)
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        for key, value in json.loads(line).items():
            found.setdefault(key, []).append(value)
    told = {key.removeprefix("eval/") for key in found if key.startswith("eval/")}
    assert told <= {*TASKS[task].metrics}, "what eval.metric may be"
    return found


def examples(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokens(path, texts, words):
    """Prepared text, a document each; words: the texts that the tokenizer knows the words of."""
    (path.with_suffix(".json")).write_bytes(vocabulary.make("words", words, 10_000).to_bytes())
    examples(path.with_suffix(".jsonl"), [{"text": text} for text in texts])
    prepare(
        [str(path.with_suffix(".jsonl"))], path, tokenizer=str(path.with_suffix(".json")), workers=1
    )
    return path


# ---------------------------------------------------------------- pretraining, then few labels

TOPICS = 8
WORDS = 60


def sentence(rng, topic, length):
    """Words of a topic, one in ten of another."""
    topics = np.where(rng.random(length) < 0.9, topic, rng.integers(0, TOPICS, length))
    return " ".join(f"t{t}w{rng.integers(WORDS)}" for t in topics)


def labelled(rng, count):
    """Short texts of topics in turn, of which every other one is good."""
    return [
        {"text": sentence(rng, i % TOPICS, 4), "label": ("bad", "good")[i % 2]}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder: `mlm`, a run on text without labels; 24 labelled texts for each of three seeds, 400 to measure on."""
    path = tmp_path_factory.mktemp("words")
    rng = np.random.default_rng(0)
    every = []
    for t in range(TOPICS):
        for i in range(WORDS):
            every.append(f"t{t}w{i}")
    text = []
    for _ in range(4000):
        text.append(sentence(rng, rng.integers(TOPICS), 12))
    data = tokens(path / "text", text, every)
    run = train(
        path / "mlm",
        task__name="mlm",
        task__mask_rate=0.3,
        data__path=data,
        data__seq_len=64,
        train__batch_size=16,
        train__steps=500,
    )
    print(f"\nmasked words: loss {run['loss'][0]:.2f} -> {run['eval/loss'][-1]:.2f}")
    for seed in range(3):
        examples(path / f"train{seed}.jsonl", labelled(rng, 24))
    examples(path / "val.jsonl", labelled(rng, 400))
    return path


def tune(folder, workdir, seed, **settings):
    """The accuracy of a classifier of 24 texts."""
    given = {
        "data__train": folder / f"train{seed}.jsonl",
        "data__val": folder / "val.jsonl",
        "seed": seed,
    }
    given |= {"task__name": "classify", "optim__learning_rate": 1e-3}
    run = train(workdir, **given | settings)
    return run["eval/accuracy"][-1]


def test_pretraining_makes_few_labels_go_far(pretrained, tmp_path):
    start = {
        "scratch": {"data__tokenizer": pretrained / "mlm"},
        "pretrained": {"train__init_from": pretrained / "mlm"},
    }
    mean = {}
    for name, more in start.items():
        each = []
        for seed in range(3):
            each.append(tune(pretrained, tmp_path / f"{name}{seed}", seed, **more))
        mean[name] = np.mean(each)
        print(
            f"\n24 labels, {name}: accuracy {mean[name]:.3f} of {', '.join(f'{x:.3f}' for x in each)}"
        )
    assert mean["pretrained"] > mean["scratch"] + 0.05


def test_adapters_learn_with_few_parameters_beside_frozen_ones(pretrained, tmp_path):
    more = {
        "train__init_from": pretrained / "mlm",
        "model__lora_rank": 4,
        "optim__learning_rate": 1e-2,
    }
    accuracy = tune(pretrained, tmp_path / "lora", 0, **more)
    before = jaxlm.load(pretrained / "mlm")
    run = jaxlm.load(tmp_path / "lora")
    start = {}
    for path, x in jax.tree.leaves_with_path(before.params):
        start[name_of(path)] = np.asarray(x)
    now = {}
    for path, x in jax.tree.leaves_with_path(run.params):
        now[name_of(path)] = np.asarray(x)
    frozen = []
    for name in start:
        if np.array_equal(start[name], now[name]):
            frozen.append(name)
    trained = sum(x.size for name, x in now.items() if name not in frozen)
    part = trained / sum(x.size for x in now.values())
    assert set(frozen) == set(start)
    assert part < 0.05
    program("jaxlm.lora", f"--workdir={tmp_path / 'lora'}", f"--output={tmp_path / 'merged'}")
    merged = jaxlm.load(tmp_path / "merged")
    ids = np.random.default_rng(0).integers(0, 400, (2, 16))
    apart = np.abs(body_logits(merged, ids) - body_logits(run, ids)).max()
    print(
        f"\nadapters: {part:.1%} of the parameters, accuracy {accuracy:.3f}; merged: logits within {apart:.1e}"
    )
    assert apart < 1e-5
    assert np.abs(body_logits(run, ids) - body_logits(before, ids)).max() > 1e-2
    assert accuracy > 0.8


# ---------------------------------------------------------------- preferences


def test_preferences_are_learned(tmp_path):
    """A model that says numbers upwards as readily as downwards comes to prefer upwards, of other numbers too."""
    rng = np.random.default_rng(0)
    rows = {"sft": [], "train": [], "val": []}
    for i in range(1400):
        numbers = np.sort(rng.choice(30, 4, replace=False))

        def say(order):
            return " ".join(f"n{n}" for n in order)

        prompt = say(rng.permutation(numbers))
        up = say(numbers)
        down = say(numbers[::-1])
        rows["sft"].append({"prompt": prompt, "response": (up, down)[i % 2]})
        rows["val" if i < 200 else "train"].append(
            {"prompt": prompt, "chosen": up, "rejected": down}
        )
    files = {}
    for name in rows:
        files[name] = examples(tmp_path / f"{name}.jsonl", rows[name])
    train(
        tmp_path / "sft",
        task__name="sft",
        model__name="decoder",
        data__train=files["sft"],
        data__seq_len=64,
        train__steps=150,
        eval__every=0,
    )
    run = train(
        tmp_path / "dpo",
        task__name="dpo",
        train__init_from=tmp_path / "sft",
        data__train=files["train"],
        data__val=files["val"],
        data__seq_len=64,
        train__steps=150,
        optim__learning_rate=1e-3,
        eval__every=50,
    )
    margins = [float(np.mean(run["margin"][i : i + 10])) for i in (0, 70, 140)]
    accuracy = run["eval/accuracy"][-1]
    print(
        f"\npreferences: margin in training {margins}, on held-out pairs {run['eval/margin']}; accuracy {accuracy:.3f}"
    )
    assert margins == sorted(margins)
    assert run["eval/margin"] == sorted(run["eval/margin"])
    assert accuracy > 0.95


# ---------------------------------------------------------------- distillation


def test_a_pupil_comes_nearer_to_its_teacher(tmp_path):
    """On little text: a teacher tells all words that may follow, the text one of them."""
    rng = np.random.default_rng(0)
    follows = rng.dirichlet(np.full(60, 0.1), 60)

    def text():
        words = [rng.integers(60)]
        for _ in range(15):
            words.append(rng.choice(60, p=follows[words[-1]]))
        return " ".join(f"w{word}" for word in words)

    every = [f"w{word}" for word in range(60)]
    much, little = (
        tokens(tmp_path / str(n), [text() for _ in range(n)], every) for n in (3000, 120)
    )
    given = {
        "model__name": "decoder",
        "data__path": much,
        "train__batch_size": 16,
        "data__seq_len": 64,
    }
    teacher = train(tmp_path / "teacher", **given, train__steps=300)
    given |= {
        "task__teacher": tmp_path / "teacher",
        "data__path": little,
        "train__steps": 200,
        "eval__every": 50,
    }
    given |= {"train__batch_size": 8}
    pupil = train(tmp_path / "pupil", **given, task__distill=1.0)
    alone = train(
        tmp_path / "alone", **given, task__distill=1e-9
    )  # so little that it is measured, no more
    for name, run in (("pupil", pupil), ("alone", alone)):
        print(
            f"\n{name}: divergence {run['eval/divergence']}, loss on other text {run['eval/loss'][-1]:.3f}"
        )
    print(f"\nthe teacher: loss {teacher['eval/loss'][-1]:.3f}")
    assert pupil["eval/divergence"][-1] < 0.5 * pupil["eval/divergence"][0]
    assert pupil["eval/divergence"][-1] < 0.2 * min(alone["eval/divergence"])
    assert pupil["eval/loss"][-1] < min(alone["eval/loss"]) - 0.5


# ---------------------------------------------------------------- uneven classes


def test_rare_classes_are_found_when_they_count_as_much(tmp_path):
    """19 in 20 texts are of one class; after few steps a model says nothing else, unless told that both count alike."""
    rng = np.random.default_rng(0)

    def text(rare):
        own = rng.random(8) < 0.5
        return " ".join(
            f"{'xy'[rare]}{rng.integers(40)}" if mine else f"z{rng.integers(40)}" for mine in own
        )

    def rows(count):
        return [
            {"text": text(i % 20 == 0), "label": ("often", "rare")[i % 20 == 0]}
            for i in range(count)
        ]

    given = {"data__train": examples(tmp_path / "train.jsonl", rows(1000))}
    given |= {"data__val": examples(tmp_path / "val.jsonl", rows(1000)), "task__name": "classify"}
    f1 = {}
    given |= {"train__steps": 30, "train__batch_size": 32, "optim__learning_rate": 3e-4}
    ways = {
        "none": {},
        "weights": {"task__class_weights": "balanced"},
        "sampling": {"task__balanced_sampling": True},
    }
    for name, more in ways.items():
        run = train(tmp_path / name, **given | more)
        f1[name] = run["eval/f1"][-1]
        print(
            f"\n95 to 5, {name}: macro F1 {f1[name]:.3f}, accuracy {run['eval/accuracy'][-1]:.3f}"
        )
    assert f1["weights"] > f1["none"] + 0.1
    assert f1["sampling"] > f1["none"] + 0.1
