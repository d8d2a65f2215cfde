"""A trained model in Python and through the programs: the same figures, on any mesh; generation that repeats itself."""

import json
import math
import pydoc
import shutil

import jax
import numpy as np
import pytest
from conftest import mesh_of, program, refused, small_config

import jaxlm
from jaxlm.config.recipe import base, resolve
from jaxlm.data.batches import fingerprint
from jaxlm.data.prepare import prepare
from jaxlm.data.store import Store
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.data.tokenization import vocabulary
from jaxlm.data.transforms import Vocabulary
from jaxlm.errors import CheckpointError, ConfigError, UserError
from jaxlm.evaluate.__main__ import gzip_bits_per_byte
from jaxlm.evaluate.evaluator import Evaluator, predicted_bytes
from jaxlm.evaluate.report import comparison
from jaxlm.generate.decode import sample
from jaxlm.generate.lm import LM
from jaxlm.parallel.mesh import make_mesh
from jaxlm.run.checkpoint import Checkpoints, describe_run
from jaxlm.step.state import abstract_state, init_state, state_shardings


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, text_dir):
    """A short run: 8 devices as fsdp=4 x tensor=2, two checkpoints, in float32, with an average of the parameters."""
    path = tmp_path_factory.mktemp("run")
    overrides = {
        "data.path": text_dir,
        "data.seq_len": 32,
        "train.batch_size": 8,
        "train.steps": 60,
        "checkpoint.every": 30,
        "model.num_layers": 2,
        "model.embed_dim": 32,
        "model.num_heads": 4,
        "eval.every": 0,
        "mesh.data": 1,
        "mesh.fsdp": 4,
        "mesh.tensor": 2,
        "log.tensorboard": False,
        "train.ema": 0.5,
    }
    settings = (f"--config.{key}={value}" for key, value in overrides.items())
    program(
        "jaxlm.train", "--config=configs/quickstart.py", f"--workdir={path}", *settings, devices=8
    )
    return path


def test_help_shows_the_real_load():
    page = pydoc.plain(pydoc.render_doc("jaxlm.load"))
    assert "load(path: str | " in page
    assert "step: str | int = 'latest', mesh: dict[str, int] | None = None)" in page
    assert "Raises CheckpointError where there is no checkpoint" in page
    assert "load(path: str | " in pydoc.plain(pydoc.render_doc(jaxlm))
    assert "load" in dir(jaxlm)


@pytest.fixture(scope="module")
def lm(workdir):
    return jaxlm.load(workdir)


def test_load_gives_what_was_trained(lm, workdir):
    assert lm.step == 60
    assert lm.config.model.num_layers == 2
    assert lm.tokenizer.name == "bytes"
    assert dict(lm.mesh.shape)["fsdp"] == 4
    assert dict(lm.mesh.shape)["tensor"] == 2
    assert jaxlm.load(workdir, step=30).step == 30


@pytest.mark.parametrize(
    "mesh", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_any_mesh_restores_the_same_bits_and_computes_the_same(workdir, lm, mesh):
    other = jaxlm.load(workdir, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, lm.params, other.params)
    tokens = np.arange(64).reshape(2, 32)
    np.testing.assert_allclose(other.logits(tokens), lm.logits(tokens), atol=1e-4)


def test_logits_are_float32_of_every_position_and_honour_segments(lm):
    tokens = np.random.default_rng(0).integers(0, 257, (3, 20))
    got = lm.logits(tokens)
    assert got.shape == (3, 20, 257)
    assert got.dtype == np.float32
    segments = np.repeat([[1, 2]], 10, axis=1).repeat(3, 0)
    positions = np.tile(np.arange(10), (3, 2))
    packed = lm.logits(tokens, segments=segments, positions=positions)
    np.testing.assert_allclose(packed[:, 10:], lm.logits(tokens[:, 10:]), atol=1e-5)


def test_greedy_generation_is_the_argmax_without_a_cache_for_200_tokens(lm):
    """Also far beyond the training length of 32."""
    (text,) = lm.generate("the cat ", max_tokens=200, temperature=0)
    ids = [lm.tokenizer.bos_id, *lm.tokenizer.encode("the cat ")]
    length = len(ids)
    out = []
    row = np.zeros((1, 256), np.int32)
    row[0, :length] = ids
    for i in range(200):
        token = int(lm.logits(row)[0, length + i - 1].argmax())
        if token == lm.tokenizer.eos_id:
            break
        out.append(token)
        row[0, length + i] = token
    assert text == lm.tokenizer.decode(np.array(out))
    assert len(out) > 20


def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(lm):
    one = lm.generate("the ", max_tokens=30, seed=3)
    assert (
        one
        == lm.generate("the ", max_tokens=30, seed=3)
        != lm.generate("the ", max_tokens=30, seed=4)
    )
    many = lm.generate(["the ", "a longer prompt by far "], max_tokens=30, seed=3)
    assert many[0] == one[0]
    assert len(many) == 2


def test_samples_differ_and_stop_strings_end_a_text(lm):
    texts = lm.generate("the ", max_tokens=40, num_samples=3)
    assert len(set(texts)) == 3
    stop = texts[0][5:8]
    assert (
        lm.generate("the ", max_tokens=40, num_samples=3, stop=stop)[0]
        == texts[0][: texts[0].find(stop)]
    )


def test_sampling_keeps_to_top_k_and_top_p():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)).repeat(2000, 0)
    keys = jax.random.split(jax.random.key(0), 2000)

    def draw(*options):
        return np.bincount(sample(logits, keys, *options), minlength=4) / 2000

    np.testing.assert_allclose(draw(1.0, 0, 0.0), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    np.testing.assert_allclose(draw(1.0, 2, 0.0), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(draw(1.0, 0, 0.6), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(draw(1.0, 0, 0.01), [1, 0, 0, 0])
    assert draw(0, 0, 0.0)[0] == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"num_samples": 0}, "num_samples=0"),
    ],
)
def test_senseless_options_are_named(lm, options, named):
    with pytest.raises(ConfigError, match=named):
        lm.generate("x", **options)


def test_senseless_tokens_are_named(lm):
    with pytest.raises(UserError, match="257"):
        lm.logits([[1, 999]])
    with pytest.raises(UserError, match="batch, length"):
        lm.logits([1, 2])


def test_the_loss_of_texts_is_that_of_their_logits(lm):
    texts = ["the cat sat on a mat.\n" * 3, "zq", "é"]
    for text, got in zip(texts, lm.loss(texts)):
        ids = lm.tokenizer.encode(text)
        nats = 0.0
        T = lm.config.data.seq_len
        inputs = np.concatenate([[lm.tokenizer.bos_id], ids[:-1]])
        for start in range(0, len(ids), T):
            logits = lm.logits(inputs[None, start : start + T])[0].astype(np.float64)
            log_z = np.log(np.exp(logits).sum(-1))
            nats += (log_z - logits[np.arange(len(logits)), ids[start : start + T]]).sum()
        assert got.tokens == len(ids)
        assert got.nats_per_token == pytest.approx(nats / len(ids), rel=1e-5)
        assert got.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert math.isnan(lm.loss([""])[0].nats_per_token)


@pytest.mark.parametrize(
    ("task", "named"),
    [
        ("mlm", "use lm.answer"),
        ("classify", "use lm.answer"),
        ("seq2seq", "reads a source first; use lm.answer"),
        ("ul2", "reads a source first$"),
        ("skipgram", "use lm.neighbors"),
    ],
)
def test_what_writes_no_text_says_what_it_does_instead(task, named):
    c = resolve(base())
    c.task.name = task
    for ask in (LM(c, {}, None, None, 0).generate, LM(c, {}, None, None, 0).loss):
        with pytest.raises(UserError, match=named):
            ask("a")


def test_a_masked_model_says_what_may_stand_at_each_mask():
    c = small_config(task__name="mlm", model__name="encoder", model__vocab_size=384)
    mesh = mesh_of(1)
    masked = LM(c, init_state(c, mesh).params, tokenizers.Bytes(), mesh, 0)
    (holes,) = masked.answer("ab[MASK]c[MASK]")
    mask = Vocabulary(masked.tokenizer, "mlm").mask
    logits = masked.logits([[97, 98, mask, 99, mask]])[
        0, [2, 4], : masked.tokenizer.vocab_size
    ].astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for said, likely in zip(holes, chances, strict=True):
        best = np.argsort(-likely)[:5]
        assert [token for token, _ in said] == [masked.tokenizer.decode([i]) for i in best]
        np.testing.assert_allclose([chance for _, chance in said], likely[best], atol=1e-6)
    with pytest.raises(UserError, match=r"has no \[MASK\]"):
        masked.answer(["nothing"])


def test_words_of_sentencepiece_are_meant_with_the_space_before_them():
    tokenizer = vocabulary.make(
        "sentencepiece", ["the king saw the old king and the old moon\n"] * 50, 300
    )
    king = tokenizer.encode(" king")
    assert len(king) == 1
    assert len(tokenizer.encode("king")) > 1
    size = Vocabulary(tokenizer, "mlm").size
    c = small_config(task__name="mlm", model__name="encoder", model__vocab_size=size)
    mesh = mesh_of(1)
    masked = LM(c, init_state(c, mesh).params, tokenizer, mesh, 0)
    assert masked.neighbors("king") == masked.neighbors(" king")
    assert masked.answer("the [MASK] moon") == masked.answer("the[MASK] moon")


def test_evaluation_is_the_mean_over_every_token_once(lm, text_dir, tmp_path, workdir):
    run = program(
        "jaxlm.evaluate", f"--workdir={workdir}", f"--json={tmp_path / 'e.json'}", "--gzip"
    )
    result = json.loads((tmp_path / "e.json").read_text())
    store = Store(text_dir, "val")
    assert result["tokens"] == store.num_tokens
    assert result["bytes"] == store.num_bytes
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    bits = result["loss"] * store.num_tokens / math.log(2) / store.num_bytes
    assert result["bits_per_byte"] == pytest.approx(bits)
    assert result["gzip_bits_per_byte"] == pytest.approx(gzip_bits_per_byte([store], lm.tokenizer))
    assert "bits_per_byte" in run.stdout
    c = lm.config.copy_and_resolve_references()
    c.train.batch_size = 24  # another batch, 8 devices instead of 1: the same figure
    with jax.set_mesh(lm.mesh):
        assert Evaluator(c, lm.mesh)(lm.params)["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_several_runs_make_one_table_of_figures(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    flags = f"--workdir={workdir}", f"--workdir={copy}"
    run = program("jaxlm.evaluate", *flags, f"--json={tmp_path / 'both.json'}")
    head, *rows = [line.split() for line in run.stdout.splitlines()]
    assert head == [workdir.name, "copy"]
    assert [row[0] for row in rows[:3]] == [
        "model",
        "task",
        "parameters",
    ]
    results = json.loads((tmp_path / "both.json").read_text())
    assert results[str(workdir)] == results[str(copy)]
    assert all(one == other for _, one, other in rows)
    wrong = refused("jaxlm.evaluate", *flags, "--gzip")
    assert wrong.returncode == 2
    assert "give one --workdir" in wrong.stderr


def test_a_table_of_runs_has_the_interval_of_each():
    lines = comparison(
        {"runs/a": {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6]}, "runs/b": {"loss": 2.0}}
    )
    assert [line.split() for line in lines[:2]] == [["a", "b"], ["accuracy", "0.5000"]]
    assert lines[2].split() == ["95%", "interval", "0.4000", "to", "0.6000"]
    assert lines[3].split() == ["loss", "2.0000"]
    for data, names in (
        ("/x/v.tsv", "v.tsv"),
        ("x/a=0.7,/y/b=0.3", "a=0.7,b=0.3"),
        ("x/mine/", "mine/"),
    ):
        assert comparison({"runs/a": {"data": data}, "runs/b": {}})[1].split() == ["data", names]
    lines = comparison(
        {"runs/a": {"data": "x/v.de+y/v.en", "classes": [{"name": "bad", "f1": 0.5}]}, "runs/b": {}}
    )
    assert [line.split() for line in lines[1:]] == [
        ["data", "v.de+v.en"],
        ["f1", "of", "bad", "0.5000"],
    ]


def test_the_generate_program_prints_prompt_and_text(workdir):
    args = (
        "jaxlm.generate",
        f"--workdir={workdir}",
        "--prompt=the dog",
        "--max_tokens=20",
        "--seed=1",
    )
    run = program(*args)
    assert run.stdout.startswith("the dog")
    assert run.stdout == program(*args).stdout


@pytest.mark.parametrize("program_name", ["jaxlm.generate", "jaxlm.evaluate"])
def test_a_workdir_without_checkpoints_is_exit_4(tmp_path, program_name):
    run = refused(program_name, f"--workdir={tmp_path / 'none'}")
    assert run.returncode == 4
    assert "is not a directory" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_step_that_is_not_there_lists_those_that_are(workdir):
    with pytest.raises(CheckpointError, match="it has 30, 60"):
        jaxlm.load(workdir, step=45)


def test_a_state_survives_a_checkpoint_to_the_last_bit(tmp_path, text_dir):
    c = small_config(
        optim__name="muon", train__ema=0.9, data__path=str(text_dir), model__vocab_size=257
    )
    mesh = make_mesh(c)
    state = init_state(c, mesh)
    checkpoints = Checkpoints(tmp_path, c)
    checkpoints.save(state, describe_run(c, tokenizers.load(text_dir), fingerprint(c)))
    checkpoints.wait()
    c2 = resolve(c)
    c2.mesh.data = 1
    c2.mesh.fsdp = 4
    c2.mesh.tensor = 2
    again = checkpoints.restore(0, abstract_state(c2)[0], state_shardings(c2, make_mesh(c2)))
    jax.tree.map(np.testing.assert_array_equal, state, again)
    other = small_config(
        optim__name="muon", train__ema=0.9, model__vocab_size=257, model__num_layers=3
    )
    with pytest.raises(CheckpointError, match="layers/block_0/attention/key/kernel: saved"):
        checkpoints.restore(0, abstract_state(other)[0], state_shardings(other, mesh))
    with pytest.raises(CheckpointError, match=r"config\.model\.num_layers: 2 -> 3"):
        Checkpoints(tmp_path, other).restore(
            0, abstract_state(other)[0], state_shardings(other, mesh)
        )
    (tmp_path / "checkpoints" / "0" / "params" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="is damaged: its params"):
        Checkpoints(tmp_path, c).restore(0, abstract_state(c)[0], state_shardings(c, mesh))


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_save_and_at_the_end(
    tmp_path, text_dir, monkeypatch
):
    def full(*_, **__):
        raise OSError("No space left on device")

    c = small_config(data__path=str(text_dir), model__vocab_size=257)
    state = init_state(c, make_mesh(c))
    meta = describe_run(c, tokenizers.load(text_dir), fingerprint(c))
    checkpoints = Checkpoints(tmp_path, c)
    monkeypatch.setattr(checkpoints.manager, "save", full)
    for then in (
        lambda: checkpoints.save(state.replace(step=state.step + 1), meta),
        checkpoints.wait,
    ):
        checkpoints.save(state, meta)
        with pytest.raises(OSError, match="No space"):
            then()


def test_a_path_that_is_not_there_names_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "runs" / "reviews").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="did you mean runs/reviews\\?"):
        jaxlm.load("runs/reviws")
    with pytest.raises(CheckpointError, match="did you mean runs\\?"):
        jaxlm.load("rums/reviews")
    with pytest.raises(CheckpointError, match="has no checkpoints") as raised:
        jaxlm.load("runs/reviews")
    assert "did you mean" not in str(raised.value), "it is there"


def test_flags_that_say_nothing_to_a_model_are_refused(workdir):
    run = refused("jaxlm.generate", f"--workdir={workdir}", "--input=there is none.txt")
    assert run.returncode == 2
    assert "there is no such file" in run.stderr
    assert "Traceback" not in run.stderr
    run = refused("jaxlm.evaluate", f"--workdir={workdir}", "--answers=a.jsonl")
    assert run.returncode == 2
    assert "has no examples" in run.stderr
    run = refused("jaxlm.evaluate", f"--workdir={workdir}", "--beams=4")
    assert run.returncode == 2
    assert "--beams: not for a model of task lm" in run.stderr
    run = refused("jaxlm.generate", f"--workdir={workdir}", "--prompt=a", "--beams=4")
    assert run.returncode == 2
    assert "task lm; of these flags it takes --max_tokens" in run.stderr


def test_bits_per_byte_of_chars_leave_out_what_cannot_be_predicted(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": "é" + "b" * (i % 5)}) + "\n" for i in range(50)))
    prepare([str(path)], tmp_path / "out", tokenizer="chars", val_fraction=0.5, workers=1)
    store = Store(tmp_path / "out", "val")
    assert predicted_bytes(store, tmp_path / "out") == store.num_bytes - 2 * store.num_documents


def test_logits_of_wrong_shapes_and_axes_that_do_not_exist_are_named(lm, workdir):
    with pytest.raises(UserError, match="segments must have the shape"):
        lm.logits([[1, 2, 3]], segments=[[1, 1]])
    assert lm.logits([[1, 2]], segments=[[1, 1]], positions=[[0, 1]]).shape == (1, 2, 257)
    with pytest.raises(ConfigError, match="did you mean tensor"):
        jaxlm.load(workdir, mesh={"tenser": 2})
    assert lm.generate([]) == []
