"""What a checkpoint can't be taken for: a renamed one, one of another version, one without what is asked for."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import fresh_state, mesh_of, one_step, random_batch, small_config

from jaxlm.config.recipe import flatten
from jaxlm.errors import CheckpointError
from jaxlm.run.checkpoint import Checkpoints, config_of, require_checkpoints
from jaxlm.run.saved_run import read_config
from jaxlm.step.state import abstract_state, state_shardings


def saved(workdir, config, steps=1):
    """A state after some steps, and the directory that it is saved in."""
    state = fresh_state(config)
    for _ in range(steps):
        state, _ = one_step(config, state, random_batch(np.random.default_rng(0)))
    checkpoints = Checkpoints(workdir, config)
    checkpoints.save(state, {"config": flatten(config)})
    checkpoints.wait()
    checkpoints.close()
    return state


def restored(workdir, config, step):
    checkpoints = Checkpoints(workdir, config)
    try:
        return checkpoints.restore(
            step, abstract_state(config)[0], state_shardings(config, mesh_of(1))
        )
    finally:
        checkpoints.close()


@pytest.mark.parametrize(
    "settings", [{"train__grad_accumulation": 2}, {"train__ema": 0.9}], ids=str
)
def test_what_a_step_of_bfloat16_parameters_makes_is_restored_to_the_bit(tmp_path, settings):
    config = small_config(model__param_dtype="bfloat16", **settings)
    state = saved(tmp_path, config, steps=2)
    again = restored(tmp_path, config, 2)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), state, again)
    assert jax.tree.all(same)
    batch = random_batch(np.random.default_rng(1))
    went_on, resumed = (one_step(config, each, batch)[1]["loss"] for each in (state, again))
    assert float(went_on) == float(resumed)


def test_a_renamed_checkpoint_is_noticed_and_what_it_keeps_from_being_saved(tmp_path):
    config = small_config()
    saved(tmp_path, config)
    shutil.move(tmp_path / "checkpoints/1", tmp_path / "checkpoints/900")
    with pytest.raises(CheckpointError, match="900 holds step 1"):
        restored(tmp_path, config, 900)
    with pytest.raises(CheckpointError, match="step 2 was not saved"):
        saved(tmp_path, config, steps=2)


def test_an_average_that_is_switched_on_half_way_is_told_as_that(tmp_path):
    saved(tmp_path, small_config())
    with pytest.raises(CheckpointError, match="without an average"):
        restored(tmp_path, small_config(train__ema=0.99), 1)


@pytest.mark.parametrize("key", ["model.hyper_connections", "newer", "rocket.fuel"])
def test_a_key_that_this_version_does_not_know_is_named(tmp_path, key):
    flat = flatten(small_config()) | {key: 4}
    with pytest.raises(CheckpointError, match=key):
        config_of({"config": flat})
    (tmp_path / "config.json").write_text(json.dumps(flat))
    with pytest.raises(CheckpointError, match=key):
        read_config(str(tmp_path))


def test_a_value_that_this_version_cannot_take_is_told(tmp_path):
    flat = flatten(small_config()) | {"model.num_layers": "many"}
    with pytest.raises(CheckpointError, match="num_layers"):
        config_of({"config": flat})


@pytest.mark.parametrize(
    ("last_row", "found", "lost"),
    [
        (1000, None, True),  # checkpoints/ was deleted
        (30, [], True),  # emptied, after the first save
        (3, [], False),  # the run died before its first save
        (30, ["10.orbax-checkpoint-tmp"], False),  # or inside of it
        (30, ["10"], False),
        (None, None, False),  # a new run
    ],
)
def test_rows_without_their_checkpoints_are_not_dropped_without_being_asked(
    tmp_path, last_row, found, lost
):
    config = small_config(checkpoint__every=10)
    if last_row:
        rows = []
        for step in range(1, last_row + 1):
            rows.append(json.dumps({"step": step, "loss": 1.0}))
        (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 9')
    for name in found or ():
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    if found == []:
        (tmp_path / "checkpoints").mkdir()
    if not lost:
        return require_checkpoints(tmp_path, config)
    with pytest.raises(CheckpointError, match=f"up to step {last_row}.*--start_over"):
        require_checkpoints(tmp_path, config)


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("_METADATA", "cut"),
        ("_METADATA", "gone"),
        ("manifest.ocdbt", "changed"),
        ("d/*", "cut"),
        ("ocdbt.process_0/d/*", "cut"),
        ("ocdbt.process_0/d/*", "gone"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # orbax's, of reads that it left
def test_a_file_of_a_checkpoint_that_is_not_whole_is_told_as_that(file, how, tmp_path):
    config = small_config()
    saved(tmp_path, config)
    broken = max(
        (tmp_path / "checkpoints" / "1" / "params").glob(file), key=lambda path: path.stat().st_size
    )
    content = bytearray(broken.read_bytes())
    half = len(content) // 2
    content[half] ^= 0x41
    broken.unlink()
    if how != "gone":
        broken.write_bytes(content[:half] if how == "cut" else content)
    with pytest.raises(CheckpointError, match="1 is damaged") as error:
        restored(tmp_path, config, 1)
    assert len(str(error.value).splitlines()) == 1
