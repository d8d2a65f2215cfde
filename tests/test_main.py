"""`jaxlm PROGRAM` is `python -m jaxlm.PROGRAM`."""

import importlib.util
import subprocess
import sys

import pytest

from jaxlm.__main__ import PROGRAMS


def run(*words):
    return subprocess.run([sys.executable, "-m", "jaxlm", *words], capture_output=True, text=True)


@pytest.mark.parametrize("words", [(), ("--help",), ("help",)])
def test_it_lists_the_programs(words):
    listed = run(*words)
    assert listed.returncode == 0
    assert all(f"\n  {name} " in listed.stdout for name in PROGRAMS)


def test_every_program_is_there():
    for module, _ in PROGRAMS.values():
        assert importlib.util.find_spec(module)


def test_a_wrong_name_has_the_nearest():
    wrong = run("trian")
    assert wrong.returncode == 2
    assert (
        wrong.stderr == "error: there is no program trian; did you mean train? (see jaxlm --help)\n"
    )


def test_a_program_runs_with_its_flags_and_exit_code():
    refused = run("fitting", "--workdir=here")
    assert refused.returncode == 2
    assert "give two or more" in refused.stderr
