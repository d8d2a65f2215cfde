"""tune: the optimum is found, a search that was killed goes on as if it had not been, and nothing fails quietly."""

import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import FLAGS, ROOT

from jaxlm.config import recipe as configs
from jaxlm.config.check import check
from jaxlm.errors import ConfigError, NumericsError, UserError
from jaxlm.run.workdir import Hold
from jaxlm.tune import __main__ as tune
from jaxlm.tune.runner import Rows, Stopped, Trainer, shares
from jaxlm.tune.space import edges, read_space
from jaxlm.tune.study import Goal, direction_of, nothing_done

SPACE = "optim.learning_rate=log:1e-4:1e-1", "optim.name=choice:adamw,muon"
QUICK = "--config=configs/quickstart.py", "--space=optim.learning_rate=log:1e-4:1e-1"


def valley(config, folder, watch):
    """A planted optimum: muon at 0.02, adamw at 0.003 and worse by 0.3. Its rows look like those of metrics.jsonl."""
    best, floor = {"adamw": (3e-3, 2.3), "muon": (2e-2, 2.0)}[config.optim.name]
    loss = (
        floor + 0.5 * math.log10(config.optim.learning_rate / best) ** 2 + 0.01 * (config.seed % 2)
    )
    rows = [{"step": step, "eval/loss": loss + 250 / step} for step in (250, 500)] + [
        {"step": 1000, "eval/loss": loss}
    ]
    watch(rows)
    return rows


def search(workdir, run=valley, space=SPACE, trials=30, parallel=1, overrides=(), **goal):
    config = configs.base()
    assert not configs.override(config, overrides)
    dimensions, problems = read_space(list(space), config)
    assert not problems
    workdir.mkdir(exist_ok=True)
    return tune.tune(config, dimensions, workdir, run, Goal(**goal), trials, parallel)


def without_times(study):
    return [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in study.records
    ]


@pytest.mark.parametrize("sampler_seed", range(3))
@pytest.mark.parametrize("prune", [True, False])
def test_it_finds_the_planted_optimum_within_30_trials(tmp_path, sampler_seed, prune):
    best = search(tmp_path, sampler_seed=sampler_seed, prune=prune).ranked()[0]
    assert best["values"]["optim.name"] == "muon"
    assert best["mean"] < 2.02
    assert 1e-2 < best["values"]["optim.learning_rate"] < 4e-2


def test_the_same_command_finds_the_same_trials_also_after_it_was_killed(tmp_path):
    """results.json at the time is all that is left of a search that is killed, in whichever trial."""
    whole = search(tmp_path / "whole", trials=15, seeds=2)
    runs = []

    def dies(config, folder, watch):
        runs.append(folder)
        if len(runs) in (1, 9, 16):
            raise MemoryError
        return valley(config, folder, watch)

    for _ in range(3):
        with pytest.raises(MemoryError):
            search(tmp_path / "killed", dies, trials=15, seeds=2)
    killed = search(tmp_path / "killed", dies, trials=15, seeds=2)
    assert without_times(killed) == without_times(whole)
    again = {folder.parent for folder in runs if runs.count(folder) > 1}
    assert len(again) == 3  # those that were interrupted
    assert without_times(
        search(tmp_path / "other", trials=15, seeds=2, sampler_seed=1)
    ) != without_times(whole)


def test_a_finished_search_can_be_made_longer(tmp_path):
    search(tmp_path / "a", trials=5)
    assert without_times(search(tmp_path / "a", trials=12)) == without_times(
        search(tmp_path / "b", trials=12)
    )


def test_trial_0_is_the_recipe_where_the_space_holds_it(tmp_path):
    values = search(tmp_path / "a", trials=1).records[0]["values"]
    assert values == {"optim.learning_rate": 3e-4, "optim.name": "adamw"}
    outside = "optim.learning_rate=log:1e-2:1e-1", "model.num_layers=int:1:9:2"
    assert (
        search(tmp_path / "b", space=outside[:1], trials=1).records[0]["values"][
            "optim.learning_rate"
        ]
        > 1e-2
    )
    assert (
        search(tmp_path / "c", space=outside[1:], trials=1).records[0]["values"]["model.num_layers"]
        % 2
        == 1
    )


def test_a_trial_is_the_mean_over_seeds_of_the_best_of_each_run(tmp_path):
    def run(config, folder, watch):
        assert folder.parent.parent == tmp_path / "trials"
        assert folder.name == f"seed_{config.seed - 7}"
        return [
            {"step": 1, "eval/f1": 0.5 + config.seed},
            {"step": 2, "loss": 9.0},
            {"step": 3, "eval/f1": 0.25},
        ]

    study = search(tmp_path, run, trials=1, seeds=3, overrides=[("seed", "7")], metric="eval/f1")
    assert study.records[0]["by_seed"] == [7.5, 8.5, 9.5]
    assert study.records[0]["mean"] == 8.5
    assert study.records[0]["deviation"] == 1.0
    (tmp_path / "last").mkdir()

    def last(config, folder, watch):
        return [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}]

    assert (
        search(tmp_path / "last", last, trials=1, metric="loss", take="last").records[0]["mean"]
        == 3.0
    )


def test_grids_are_swept_whole_in_order_and_without_pruning(tmp_path):
    space = "optim.learning_rate=grid:1e-3,1e-2,1e-1", "optim.name=grid:muon,adamw"
    study = search(tmp_path, space=space, trials=0)
    pairs = []
    for record in study.records:
        pairs.append(tuple(record["values"].values()))
    assert pairs == [(lr, name) for lr in (1e-3, 1e-2, 1e-1) for name in ("muon", "adamw")]
    assert {record["state"] for record in study.records} == {"done"}


def test_parallel_trials_run_at_the_same_time_and_are_not_the_same(tmp_path):
    together = threading.Barrier(3, timeout=60)

    def run(config, folder, watch):
        together.wait()
        return valley(config, folder, watch)

    study = search(tmp_path, run, trials=12, parallel=3, prune=False)
    assert [record["trial"] for record in study.records] == list(range(12))
    assert len({record["values"]["optim.learning_rate"] for record in study.records}) == 12


def test_what_check_refuses_and_what_diverges_is_in_the_table_with_the_reason(tmp_path, capsys):
    def run(config, folder, watch):
        if config.optim.learning_rate > 0.01:
            raise NumericsError("20 steps in a row")
        return valley(config, folder, watch)

    study = search(tmp_path, run, space=(SPACE[0], "model.num_heads=int:4:6"), trials=20)
    states = {}
    for record in study.records:
        states[record["state"]] = record
    assert states["refused"]["values"]["model.num_heads"] == 5
    assert not states["refused"]["by_seed"]
    assert states["diverged"]["reason"] == "20 steps in a row"
    tune.report(study)
    out = capsys.readouterr().out
    assert (
        "model.num_heads=5  refused: config.model.num_heads=5: must divide config.model.embed_dim=384"
        in out
    )


def test_a_trial_worse_than_the_median_is_pruned_but_not_at_its_last_step(tmp_path):
    steps = []

    def run(config, folder, watch):
        loss = 2.0 + int(folder.parent.name)  # each worse than those before
        for step in (10, 500, 1000):
            watch([{"step": step, "eval/loss": loss}])
            steps.append(step)
        return [{"step": 1000, "eval/loss": loss}]

    states = []
    for record in search(tmp_path / "a", run, trials=8).records:
        states.append(record["state"])
    assert states == ["done"] * 5 + ["pruned"] * 3
    # not while the learning rate warms up
    assert steps.count(10) == 8
    assert steps.count(500) == 5
    states = []
    for record in search(tmp_path / "b", run, trials=8, prune=False).records:
        states.append(record["state"])
    assert states == ["done"] * 8

    def late(config, folder, watch):
        return watch(rows := [{"step": 1000, "eval/loss": float(folder.parent.name)}]) or rows

    assert {record["state"] for record in search(tmp_path / "c", late, trials=8).records} == {
        "done"
    }


def test_a_changed_search_is_refused_with_the_difference(tmp_path):
    search(tmp_path, trials=2)
    with pytest.raises(ConfigError) as error:
        search(
            tmp_path,
            trials=2,
            space=(SPACE[0], "optim.name=choice:adamw"),
            seeds=2,
            overrides=[("seed", "3")],
        )
    for change in (
        "seeds: 1 -> 2",
        "space.optim.name: choice:adamw,muon -> choice:adamw",
        "config.seed: 0 -> 3",
    ):
        assert change in str(error.value)
    assert "another --workdir" in str(error.value)
    (tmp_path / "trials").mkdir()
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON any more"):
        search(tmp_path, trials=2)
    (tmp_path / "results.json").unlink()
    with pytest.raises(ConfigError, match="is lost"):
        search(tmp_path, trials=2)


def test_a_metric_that_no_run_has_ends_the_search_and_can_be_corrected(tmp_path):
    with pytest.raises(ConfigError, match=r"no such key; did you mean eval/loss\?"):
        search(tmp_path, metric="eval/los", direction="minimize")
    assert search(tmp_path, trials=3).finished() == 3


def test_failures_are_no_results_and_nothing_but_failures_ends_the_search(tmp_path):
    def fails(config, folder, watch):
        raise UserError("no space left (exit code 1)")

    with pytest.raises(
        UserError, match="3 trials failed and none was done; the last: no space left"
    ):
        search(tmp_path, fails)
    study = search(tmp_path, trials=5)
    assert [record["state"] for record in study.records] == ["done"] * 5


def refused(heads):
    return {
        "state": "refused",
        "reason": f"config.model.num_heads={heads}: must divide config.model.embed_dim=384",
    }


@pytest.mark.parametrize(
    ("records", "kind", "parts"),
    [
        (
            [refused(5), refused(7)],
            ConfigError,
            ["none of 2 trials", "2 refused: such as config.model.num_heads=5"],
        ),
        (
            [{"state": "diverged", "reason": "not finite"}],
            NumericsError,
            ["1 diverged: not finite"],
        ),
        (
            [refused(5), {"state": "failed", "reason": "no space left"}],
            UserError,
            ["1 refused: config.model", "1 failed: no"],
        ),
    ],
)
def test_a_search_without_results_is_an_error_that_counts_the_reasons(records, kind, parts):
    error = nothing_done(records)
    assert type(error) is kind
    assert error.exit_code
    for part in parts:
        assert part in str(error)


def test_a_search_of_refused_trials_only_ends_with_exit_code_2_before_the_first(tmp_path, text_dir):
    flags = "--space=model.num_heads=choice:5,7", "--trials=3", f"--config.data.path={text_dir}"
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*num_heads=5: must divide") as error:
        tune.main(["--config=configs/shakespeare_char.py", *flags, f"--workdir={tmp_path}/run"])
    assert error.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_ctrl_c_stops_the_runs_and_the_same_command_goes_on(tmp_path, capsys):
    def interrupted(config, folder, watch):
        if folder.parent.name == "3":
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                watch([])
                time.sleep(0.01)
        return valley(config, folder, watch)

    before = signal.getsignal(signal.SIGINT)
    study = search(tmp_path, interrupted, trials=6)
    assert study.stop.is_set()
    assert study.finished() == 3
    assert signal.getsignal(signal.SIGINT) is before
    assert json.loads((tmp_path / "results.json").read_text())["trials"][3]["state"] == "running"
    assert search(tmp_path, trials=6).finished() == 6


def test_the_report(tmp_path, capsys):
    study = search(tmp_path, trials=20, seeds=2, prune=False)
    tune.report(study)
    out = capsys.readouterr().out
    told = json.loads((tmp_path / "results.json").read_text())
    best = told["best"]
    assert "20 trials of 2 seeds, of which 0 are finished" in out
    assert "20 done" in out
    assert f"the best, to paste:\n{best['flags']}\n" in out
    assert "importance (PED-ANOVA of 20 trials: " in out
    assert best["mean"] == min(record["mean"] for record in told["trials"])
    config = configs.base()
    pairs = []
    for flag in best["flags"].split():
        pairs.append(flag.removeprefix("--config.").split("="))
    assert not configs.override(config, pairs)
    assert config.optim.learning_rate == best["values"]["optim.learning_rate"]  # to the last digit
    assert set(told["importances"]) == {"optim.learning_rate", "optim.name"}
    assert (tmp_path / "history.png").stat().st_size > 5000
    assert (tmp_path / "importance.png").stat().st_size > 5000
    tune.report(search(tmp_path / "none", trials=1, overrides=[("model.num_heads", "5")]))
    assert "1 refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim.learning_rat=log:1:2", "no such key; did you mean optim.learning_rate?"),
        (
            "optim.learning_rate=int:1:2",
            "type float, which takes float:LOW:HIGH[:STEP] or log:LOW:HIGH or choice",
        ),
        ("optim.learning_rate=log:0:1", "config.optim.learning_rate=0.0: must be positive"),
        ("optim.weight_decay=log:0:1", "LOW must be below HIGH, and above 0"),
        ("optim.weight_decay=float:0:inf", "config.optim.weight_decay=inf: must not be negative"),
        ("optim.learning_rate=log:1e-1:1e-3", "LOW must be below HIGH"),
        ("optim.learning_rate=log:1e-3:1e-1:2", "give log:LOW:HIGH"),
        ("model.num_layers=int:1", "give int:LOW:HIGH[:STEP]"),
        ("model.num_layers=int:1:2.5", "config.model.num_layers=2.5: not a value of type int"),
        ("model.num_layers=int:1:4:9", "STEP must be above 0 and at most 3"),
        (
            "optim.name=choice:adamw,muonn",
            "config.optim.name=muonn: must be one of sgd, adam,",
        ),
        ("model.qk_norm=float:0:1", "type bool, which takes choice:A,B,C or grid:A,B,C"),
        ("optim.decay=choice:1,2", "type tuple, which cannot be searched"),
        ("nothing.json", "give KEY=FORM, or a file"),
    ],
)
def test_what_is_wrong_with_a_space_is_said(text, says):
    space, (problem,) = read_space([text], configs.base())
    assert not space
    assert f"--space={text}: " in problem
    assert says in problem


@pytest.mark.parametrize(
    ("text", "value", "end"),
    [
        ("optim.learning_rate=log:1e-4:1e-2", 9e-3, "highest"),
        ("optim.learning_rate=log:1e-4:1e-2", 1.1e-4, "lowest"),
        ("optim.learning_rate=log:1e-4:1e-2", 5e-3, ""),
        ("optim.learning_rate=float:1e-4:1e-2", 4e-4, "lowest"),
        ("optim.learning_rate=grid:1e-2,1e-3,1e-1", 1e-1, "highest"),
        ("optim.learning_rate=grid:1e-2,1e-3,1e-1", 1e-2, ""),
        ("model.num_layers=int:1:8", 8, "highest"),
        ("model.num_layers=int:1:8", 7, ""),
        ("model.num_layers=int:1:2", 2, ""),
        ("model.num_layers=choice:2,4", 4, ""),
        ("optim.name=choice:adamw,muon,sgd", "adamw", ""),
        ("model.qk_norm=choice:true,false", True, ""),
    ],
)
def test_a_best_value_at_the_edge_of_its_range_is_told(text, value, end):
    config = configs.base()
    space, problems = read_space([text], config)
    key, form = text.split("=")
    if end:
        expected = [f"{key}={value:.4g} is at the {end} end of {form}: better may lie beyond"]
    else:
        expected = []
    told = []
    for line in edges(space, {key: value}, config):
        told.append(line.split(";")[0])
    assert told == expected
    assert not problems


def shown_commands():
    """The words of each tune command in docs/tuning.md."""
    text = (ROOT / "docs/tuning.md").read_text().replace("\\\n", " ")
    return [
        shlex.split(line) for line in text.splitlines() if line.startswith("python -m jaxlm.tune ")
    ]


@pytest.mark.parametrize("command", shown_commands())
def test_every_combination_of_the_ends_of_shown_spaces_is_a_valid_config(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    (recipe,) = [word.removeprefix("--config=") for word in command if word.startswith("--config=")]
    forms = []
    for word in command:
        if word.startswith("--space="):
            forms.append(word.removeprefix("--space="))
    space, problems = read_space(forms, configs.load(recipe))
    assert space
    assert not problems
    ends = []
    for d in space.values():
        ends.append(getattr(d.values, "choices", None) or (d.values.low, d.values.high))
    for values in itertools.product(*ends):
        config = configs.load(recipe)
        pairs = []
        for key, value in zip(space, values):
            pairs.append((key, str(value)))
        assert not configs.override(config, pairs)
        assert not check(config)


def test_an_edge_that_no_config_may_cross_asks_for_no_wider_range():
    config = configs.base()
    space, _ = read_space(["model.dropout=float:0:0.5", "model.num_layers=int:0:8"], config)
    lines = edges(space, {"model.dropout": 0.0, "model.num_layers": 8}, config)
    assert (
        lines[0]
        == "model.dropout=0 is at the lowest end of float:0:0.5, and no config may go further"
    )
    assert "search a wider --space" in lines[1]


def test_a_space_can_be_a_file(tmp_path):
    forms = {
        "optim.learning_rate": "log:1e-4:1e-1",
        "data.mixture": "choice:a=0.5,b=0.5;a=0.9,b=0.1",
    }
    (tmp_path / "space.json").write_text(json.dumps(forms))
    space, problems = read_space(
        [f"{tmp_path}/space.json", "model.num_layers=log:1:64"], configs.base()
    )
    assert not problems
    assert space["data.mixture"].values.choices == ("a=0.5,b=0.5", "a=0.9,b=0.1")
    assert space["model.num_layers"].values.log
    assert space["model.num_layers"].values.high == 64
    _, problems = read_space(
        [f"{tmp_path}/space.json", "optim.learning_rate=grid:1"], configs.base()
    )
    assert any("is already searched" in problem for problem in problems)


def test_all_problems_are_reported_at_once_before_anything_is_made(tmp_path):
    flags = (
        "--space=optim.nam=choice:adamw",
        "--space=model.num_heads=log:0:3",
        "--seeds=0",
        "--metric=eval/quality",
    )
    with pytest.raises(ConfigError) as error:
        tune.main(
            [*QUICK, *flags, f"--workdir={tmp_path}/run", "--config.eval.every=0", "--config.sed=1"]
        )
    for part in (
        "7 problems", "config.sed: no such key; did you mean seed?", "did you mean optim.name?", "--seeds=0",
        "num_heads=0: must be at least 1", "--trials: how many?", "set --config.eval.every", "Give --direction=",
    ):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="grid is for all keys or none"):
        tune.main(
            [
                *QUICK,
                "--space=optim.name=grid:adamw,muon",
                f"--workdir={tmp_path}/run",
                "--trials=9",
            ]
        )
    assert not (tmp_path / "run").exists()


def test_a_missing_library_is_named(tmp_path):
    code = "import sys; sys.modules['optuna'] = None; from jaxlm import cli; "
    code += "from jaxlm.tune import __main__ as tune; cli.run(tune.main)"
    command = [sys.executable, "-c", code, *QUICK, f"--workdir={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert 'optuna is not installed; type: pip install -e ".[tune]"' in run.stderr


def test_directions_by_name():
    for name in ("loss", "eval/loss", "eval/perplexity", "eval/bits_per_byte", "step_seconds"):
        assert direction_of(name) == "minimize"
    for name in (
        "eval/accuracy",
        "eval/f1_macro",
        "eval/roc_auc",
        "eval/bleu",
        "eval/rougeL",
        "tokens_per_second",
    ):
        assert direction_of(name) == "maximize"
    with pytest.raises(ConfigError, match="--direction=minimize or maximize"):
        direction_of("eval/quality")


def test_rows_come_once_whole_and_again_from_a_file_that_was_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = Rows(path)
    assert rows.new() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert rows.new() == [{"step": 1}, {"step": 2}]
    assert rows.new() == []
    path.with_suffix(".new").write_text('{"step": 1}\n')
    path.with_suffix(".new").replace(path)
    assert rows.new() == [{"step": 1}]


def test_trials_share_cores_and_gpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
    assert shares(1) == [("0 1 2 3 4 5", {})]
    assert [cores for cores, _ in shares(3)] == ["0 1", "2 3", "4 5"]
    assert all(len(cores) == 1 for cores, _ in shares(12))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,3,5")
    assert [gpus["CUDA_VISIBLE_DEVICES"] for _, gpus in shares(2)] == ["0,2", "3,5"]
    with pytest.raises(ConfigError, match="there are 4 GPUs"):
        shares(5)


# ---------------------------------------------------------------- real runs

TINY = {
    "model.num_layers": 1, "model.embed_dim": 32, "data.seq_len": 32, "train.batch_size": 8, "eval.every": 10,
    "eval.batches": 2, "checkpoint.every": 10, "log.every": 1, "log.tensorboard": False,
}  # fmt: skip


def steps(folder):
    path = folder / "metrics.jsonl"
    if path.exists():
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]
    return []


def free(folder):
    """Waits until no run has the directory."""
    for _ in range(100):
        try:
            return Hold(folder).close()
        except ConfigError:
            time.sleep(0.1)
    raise AssertionError(f"a run still has {folder}")


def test_a_run_that_is_ended_saves_and_goes_on_and_a_refusal_is_a_config_error(
    tmp_path, text_dir, monkeypatch
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XLA_FLAGS", FLAGS)
    config = configs.load("configs/quickstart.py")
    train = Trainer("configs/quickstart.py")
    pairs = []
    for key, value in (TINY | {"data.path": text_dir, "train.steps": 100_000}).items():
        pairs.append((key, str(value)))
    assert not configs.override(config, pairs)
    seen = []

    def watch(rows):
        seen.extend(row["step"] for row in rows)
        if len(seen) > 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, tmp_path / "run", watch)
    last = max(steps(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / str(last)).is_dir()
    config.train.stop_at = last + 3
    rows = train(config, tmp_path / "run", lambda rows: None)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, last + 4))
    assert f"from step {last} to {last + 3}" in (tmp_path / "run" / "train.log").read_text()
    config.mesh.fsdp = 7
    with pytest.raises(
        ConfigError, match=r"config.mesh.fsdp=7: 7 of 1 devices.*\(exit code 2; .*train.log\)"
    ):
        train(config, tmp_path / "refused", lambda rows: None)


@pytest.mark.slow
def test_a_real_search_that_is_killed_and_stopped_goes_on_and_leaves_no_run_behind(
    tmp_path, text_dir
):
    """kill -9 in its second trial, SIGTERM after the next start, then to the end."""
    settings = TINY | {
        "data.path": text_dir,
        "train.steps": 200,
        "checkpoint.every": 20,
        "eval.every": 50,
    }
    command = [sys.executable, "-m", "jaxlm.tune", *QUICK, f"--workdir={tmp_path}", "--trials=2"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    env = os.environ | {"XLA_FLAGS": FLAGS}

    def start():
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)

    first, second = (tmp_path / "trials" / str(number) / "seed_0" for number in range(2))

    def until(search, step):
        while step not in steps(second):
            assert search.poll() is None
            time.sleep(0.05)

    search = start()
    until(search, 50)
    search.kill()
    search.communicate()
    free(second)
    killed = max(steps(second))
    search = start()
    until(search, killed + 10)
    search.send_signal(signal.SIGTERM)
    out, _ = search.communicate(timeout=300)
    assert search.returncode == 75
    assert "1 of 2 trials are finished" in out
    assert "the same command goes on" in out
    free(second)
    search = start()
    out, _ = search.communicate(timeout=600)
    assert search.returncode == 0 and "2 done" in out, out
    starts = []
    for folder in (first, second):
        starts.append(re.findall(r"from step (\d+) to 200", (folder / "train.log").read_text()))
    assert starts[0] == ["0"]  # it was finished
    assert 0 == int(starts[1][0]) < int(starts[1][1]) <= killed < killed + 10 <= int(starts[1][2])
    assert sorted(set(steps(second))) == list(range(1, 201))
