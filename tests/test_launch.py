"""The scripts that a newcomer runs first."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_quickstart_trains_a_model_that_beats_gzip(tmp_path):
    command = ["bash", str(ROOT / "launch/quickstart.sh"), str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHON": sys.executable}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "model/evaluation.json").read_text())
    assert result["bits_per_byte"] < result["gzip_bits_per_byte"] - 0.2
    losses = [json.loads(line).get("loss") for line in (tmp_path / "model/metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0] - 3
    assert "def " in run.stdout and "Try next" in run.stdout


def test_scripts_are_sound_bash():
    for script in (ROOT / "launch").glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
