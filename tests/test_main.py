"""`jaxlm PROGRAM` is `python -m jaxlm.PROGRAM`."""

import importlib.util
import subprocess
import sys

import pytest

from jaxlm import cli
from jaxlm.__main__ import PROGRAMS
from jaxlm.errors import ConfigError

OF_CONFIGS = ("plan", "verify", "train", "tune", "bench")


def main_of(program):
    """The main(argv) of a program's module."""
    name, _ = PROGRAMS[program]
    if importlib.util.find_spec(name).submodule_search_locations is not None:
        name += ".__main__"
    return importlib.import_module(name).main


class Parsed(Exception):
    """Ends a program where it would read its flags; holds its parser."""


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


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_every_default(program, monkeypatch):
    def parse(parser, argv):
        raise Parsed(parser)

    monkeypatch.setattr(cli.Parser, "parse", parse)
    with pytest.raises(Parsed) as parsed:
        main_of(program)([])
    (parser,) = parsed.value.args
    for action in parser._actions:
        assert action.help, action.option_strings
        if cli.has_default(action):
            shown = cli.HelpFormatter("")._get_help_string(action) % vars(action)
            assert f"default: {action.default}" in shown, action.option_strings


@pytest.mark.parametrize("program", OF_CONFIGS)
@pytest.mark.parametrize(
    "flag", ["--learning_rate=1e-3", "--optim.learning_rate=1e-3", "--optim.learning_rat=1e-3"]
)
def test_a_key_without_config_names_the_flag_that_is_meant(program, flag):
    with pytest.raises(ConfigError, match=r"did you mean --config\.optim\.learning_rate=1e-3\?"):
        main_of(program)(["--config=configs/quickstart.py", flag])


def test_a_flag_that_is_nearly_right_is_a_flag():
    with pytest.raises(ConfigError, match=r"no flag --wrokdir; did you mean --workdir\?"):
        main_of("train")(["--config=configs/quickstart.py", "--wrokdir=here"])
