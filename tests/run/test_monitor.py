"""What metrics.jsonl tells of time: the rows' times add up to the time of training, and to nothing else."""

import json
from types import SimpleNamespace

import pytest
from conftest import small_config

from jaxlm.run import monitor as monitors
from jaxlm.run.monitor import Monitor


@pytest.mark.parametrize("start", [0, 20])
@pytest.mark.parametrize("late", [0.0, 0.9])
def test_a_row_has_the_time_of_its_steps_alone(tmp_path, monkeypatch, start, late):
    """A step takes a second, what is between them 50; metrics may be handed on late, but for those of a pause."""
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(monitors, "time", clock)
    config = small_config(train__steps=60, log__every=10, log__tensorboard=False)
    monitor = Monitor(tmp_path, config, start, 1, None)
    for step in range(start + 1, 61):
        clock.now += 1.0
        finished = clock.now
        pauses = step % 15 == 0
        clock.now += 0.0 if pauses else late
        monitor.step(
            step, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "skipped": 0}, finished
        )
        clock.now = finished
        if pauses:
            began = clock.now
            clock.now += 50.0
            monitor.pause(began)
    monitor.close()
    rows = []
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        rows.append(json.loads(line))
    assert [row["step_seconds"] for row in rows] == [1.0] * len(rows)
    timed = []
    for row in rows:
        if "tokens_per_second" in row:
            timed.append(row["tokens_per_second"])
    assert timed == [16 * 32.0] * len(timed)
