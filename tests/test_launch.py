"""The scripts in launch/. The clouds, SLURM and the GPU are stand-ins: small scripts at the head of PATH."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from string import Template

import pytest
import yaml
from conftest import ROOT


@pytest.mark.slow
def test_quickstart_trains_a_model_that_beats_gzip(tmp_path):
    command = ["bash", str(ROOT / "launch/quickstart.sh"), str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHON": sys.executable}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "model/evaluation.json").read_text())
    assert result["bits_per_byte"] < result["gzip_bits_per_byte"] - 0.2
    losses = []
    for line in (tmp_path / "model/metrics.jsonl").read_text().splitlines():
        losses.append(json.loads(line).get("loss"))
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0] - 3
    assert "def " in run.stdout
    assert "Try next" in run.stdout


# ---------------------------------------------------------------- Cloud TPU

TRAIN = ["--config=configs/llama.py:1b", "--workdir=/nfs/it's mine"]
POD = ["--name=pod", "--zone=us-east5-a", "--accelerator_type=v5p-16"]

# Keeps the state of the queued resource in a file; `fail_VERB` says how often a verb is still to fail. Each worker is a
# directory, in which ssh runs the command; a worker in `unreachable` is silently passed over, as gcloud does.
GCLOUD = r"""#!/bin/bash
cd "$(dirname "$0")" || exit
verb=$4
echo "$*" >>calls
fails=$(cat "fail_$verb" 2>/dev/null || echo 0)
if [ "$fails" -gt 0 ]; then
  echo $((fails - 1)) >"fail_$verb"
  echo "ERROR: (gcloud.compute.tpus.queued-resources.$verb) UNAVAILABLE: try later" >&2
  exit 1
fi
now=$(cat state 2>/dev/null)
case $verb-$now in
  create-) echo WAITING_FOR_RESOURCES >state && mkdir -p $(cat workers) ;;
  describe-) echo "ERROR: (gcloud.$verb) NOT_FOUND: Resource 'pod' was not found" >&2 && exit 1 ;;
  describe-*)
    echo "$now"
    case $now in WAITING*) echo ACTIVE >state ;; DELETING) rm -r state $(cat workers) ;; esac ;;
  delete-?*) echo DELETING >state ;;
  scp-ACTIVE) for worker in $(cat workers); do cp "$5" "$worker/jaxlm.tgz"; done ;;
  ssh-ACTIVE)
    for word; do case $word in --command=*) command=${word#--command=} ;; esac; done
    for worker in $(cat workers); do
      if grep -sqx "$worker" unreachable; then rm unreachable && continue; fi
      (cd "$worker" && HOME=$PWD WORKER=$worker bash -c "$command") || code=1
    done
    exit "${code:-0}" ;;
  *) exit 1 ;;
esac
"""

# What `uv venv` leaves as Python: it trains as the next word of `plan` says.
TRAINER = r"""#!/bin/bash
cd "$(dirname "$(command -v gcloud)")" || exit
printf '%s\n' "$WORKER $*" >>trained
word=$(cut -d' ' -f"$(grep -c "^$WORKER " trained)" plan)
echo "step      1/2  loss 5.0"
case $word in
  preempt) echo SUSPENDED >state ;;
  wait) while ! [ -e finish ]; do sleep 0.05; done ;;
  *) exit "$word" ;;
esac
"""
UV = '#!/bin/bash\nif [ "$1" = venv ]; then mkdir -p .venv/bin && cp "$(dirname "$0")/trainer" .venv/bin/python; fi\n'


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """The stand-ins, in a directory of their own at the head of PATH."""

    def __init__(self, path, workers):
        self.path = path
        for name, text in {"gcloud": GCLOUD, "trainer": TRAINER, "uv": UV}.items():
            script(path / name, text)
        script(path / "hostname", '#!/bin/sh\necho "$WORKER"\n')
        (path / "workers").write_text(" ".join(workers))
        (path / "plan").write_text("0 0 0")
        self.env = {
            "PATH": f"{path}:/usr/bin:/bin",
            "TMPDIR": str(path),
            "POLL": "0.05",
            "TRIES": "4",
        }
        self.env |= {"CLOUDSDK_CONFIG": str(path), "HOME": str(path)}

    def command(self, command, *flags):
        return ["bash", str(ROOT / "launch/tpu_pod.sh"), command, *POD, *flags]

    def run(self, command, *flags, **env):
        return subprocess.run(
            self.command(command, *flags),
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def plan(self, text, **fails):
        (self.path / "plan").write_text(text)
        for verb, times in fails.items():
            (self.path / f"fail_{verb}").write_text(str(times))

    def lines(self, name):
        if (self.path / name).exists():
            return (self.path / name).read_text().splitlines()
        return []

    def calls(self, verb):
        return [line for line in self.lines("calls") if line.split()[3] == verb]

    @property
    def exists(self):
        return (self.path / "state").exists()


@pytest.fixture
def cloud(tmp_path):
    if not shutil.which("flock"):
        pytest.skip("the workers' scripts need flock")
    return Cloud(tmp_path, ["t1v-n-a-w-0", "t1v-n-a-w-1"])


def test_a_preempted_pod_is_created_again_and_training_goes_on(cloud):
    cloud.plan("preempt 0")
    run = cloud.run("run", "--spot", "--", *TRAIN)
    assert run.returncode == 0, run.stderr
    assert len(cloud.calls("create")) == 2
    assert all("--spot" in call for call in cloud.calls("create"))
    assert all("--runtime-version=v2-alpha-tpuv5 " in call for call in cloud.calls("create"))
    trained = cloud.lines("trained")
    assert sorted(trained) == sorted(
        f"{w} -m jaxlm.train {' '.join(TRAIN)}" for w in cloud.lines("workers")[0].split() * 2
    )
    assert not cloud.exists
    assert "step      1/2" in run.stderr


def test_stopped_and_saved_is_started_again_on_the_same_machine(cloud):
    cloud.plan("75 134 0")
    run = cloud.run("run", "--", *TRAIN)
    assert run.returncode == 0, run.stderr
    assert len(cloud.calls("create")) == 1
    assert len(cloud.lines("trained")) == 6
    assert not cloud.exists


def test_the_exit_code_is_trainings_and_the_machine_is_deleted_or_kept(cloud):
    cloud.plan("5")
    run = cloud.run("run", "--", *TRAIN)
    assert run.returncode == 5
    assert not cloud.exists
    assert "loss 5.0" in run.stdout  # the end of the logs, which go with the machine
    (cloud.path / "trained").unlink()
    run = cloud.run("run", "--keep", "--", *TRAIN)
    assert run.returncode == 5
    assert (cloud.path / "state").read_text() == "ACTIVE\n"
    assert "delete --name=pod --zone=us-east5-a" in run.stderr


def test_creating_is_tried_again_and_failure_is_told(cloud):
    cloud.plan("0", create=2)
    run = cloud.run("run", "--", *TRAIN)
    assert run.returncode == 0, run.stderr
    assert len(cloud.calls("create")) == 3
    assert run.stderr.count("creating pod failed") == 2
    cloud.plan("0", create=99)
    run = cloud.run("run", "--", *TRAIN)
    assert run.returncode == 1
    assert not cloud.exists
    assert "delete --name=pod --zone=us-east5-a" in run.stderr
    cloud.plan("0", create=0)
    (cloud.path / "state").write_text("FAILED\n")  # Google's word for a request that cannot be met
    assert cloud.run("run", "--", *TRAIN).returncode == 0
    assert not cloud.exists


def test_delete_leaves_nothing_or_says_so(cloud):
    (cloud.path / "state").write_text("ACTIVE\n")
    cloud.plan("0", delete=2)
    run = cloud.run("delete", TRIES="8")
    assert run.returncode == 0 and not cloud.exists, run.stderr
    (cloud.path / "state").write_text("ACTIVE\n")
    for fails in ({"delete": 99}, {"delete": 0, "describe": 99}):
        cloud.plan("0", **fails)
        run = cloud.run("delete")
        assert run.returncode == 1
        assert "NOT DELETED" in run.stderr
        assert "pod in us-east5-a" in run.stderr


def test_a_run_that_cannot_delete_does_not_end_with_0(cloud):
    cloud.plan("0", delete=99)
    run = cloud.run("run", "--", *TRAIN)
    assert run.returncode == 1
    assert cloud.exists
    assert "NOT DELETED" in run.stderr


def test_ctrl_c_leaves_the_training_which_the_next_run_watches(cloud):
    cloud.plan("wait")
    command = cloud.command("run", "--", *TRAIN)

    # tests in the background ignore it, and bash inherits
    def heard():
        return signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": heard}
    run = subprocess.Popen(command, env=cloud.env, **pipe)
    while len(cloud.lines("trained")) < 2:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate(timeout=20)[1]
    assert run.returncode == 130
    assert "delete --name=pod --zone=us-east5-a" in said
    assert cloud.exists
    assert not cloud.calls("delete")
    (cloud.path / "finish").touch()
    assert cloud.run("run", "--", *TRAIN).returncode == 0
    assert not cloud.exists
    assert len(cloud.calls("create")) == 1


def test_who_deletes_the_machine_ends_the_run(cloud):
    cloud.plan("wait")
    command = cloud.command("run", "--", *TRAIN)
    with subprocess.Popen(command, env=cloud.env, stderr=subprocess.PIPE, text=True) as run:
        while len(cloud.lines("trained")) < 2:
            time.sleep(0.05)
        assert cloud.run("delete").returncode == 0
        assert "someone else" in run.communicate(timeout=20)[1]
    (cloud.path / "finish").touch()
    assert run.returncode == 1
    assert len(cloud.calls("create")) == 1


def test_a_slice_that_was_passed_over_is_noticed(cloud):
    (cloud.path / "workers").write_text("t1v-n-a-w-0 t1v-n-b-w-0")
    (cloud.path / "unreachable").write_text("t1v-n-b-w-0\n")
    (cloud.path / "state").write_text("ACTIVE\n")
    for worker in ("t1v-n-a-w-0", "t1v-n-b-w-0"):
        (cloud.path / worker).mkdir()
    assert cloud.run("copy", "--node_count=2").returncode == 1
    assert cloud.run("copy", "--node_count=2").returncode == 0


def test_a_worker_trains_on_without_its_connection(tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/tpu_worker.sh", tmp_path / "launch")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    wait = "for _ in {1..1500}; do [ -e finish ] && break; sleep 0.02; done"
    script(tmp_path / ".venv/bin/python", f"#!/bin/bash\ntouch ready\n{wait}\nexit 5\n")
    (tmp_path / "train.exit").write_text("0\n")  # of an earlier training
    worker = ["bash", str(tmp_path / "launch/tpu_worker.sh")]

    def ask(word):
        return subprocess.run([*worker, word], capture_output=True, text=True).stdout

    start = subprocess.Popen([*worker, "start"], start_new_session=True)
    assert start.wait(timeout=20) == 0
    for _ in range(1000):
        if (tmp_path / "ready").exists():
            break
        time.sleep(0.02)
    os.killpg(start.pid, signal.SIGHUP)
    assert "ended: not" in ask("look")
    assert "already" in ask("start")
    assert not (tmp_path / "train.exit").exists()
    (tmp_path / "finish").touch()
    while "ended: not" in ask("look"):
        time.sleep(0.02)
    assert "ended: 5" in ask("look")


# ---------------------------------------------------------------- SLURM, GPUs, Kubernetes


def launch(name, *args, path, **env):
    """Runs a launcher with the stand-ins in `path`."""
    env = {
        "PATH": f"{path}:/usr/bin:/bin",
        "HOME": str(path),
        "POLL": "0.05",
        "CLOUDSDK_CONFIG": str(path),
    } | env
    command = ["bash", str(ROOT / "launch" / name), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def stand_ins(path, **programs):
    """Programs that note how they were called, and then do these lines of bash."""
    for name, text in programs.items():
        script(path / name, f'#!/bin/bash\ncd "{path}" && echo "{name} $*" >>calls\n{text}\n')
    return lambda: (path / "calls").read_text().splitlines() if (path / "calls").exists() else []


def test_slurm_submits_itself(tmp_path):
    calls = stand_ins(tmp_path, sbatch="", python="")
    run = launch("slurm.sh", "--nodes=2", "--", *TRAIN, path=tmp_path, PYTHON="python")
    assert run.returncode == 0
    assert calls() == [f"sbatch --nodes=2 launch/slurm.sh -- {' '.join(TRAIN)}"]


@pytest.mark.parametrize(
    "does,code,requeued", [("exit 75", 75, True), ("exit 3", 3, False), ("", 0, False)]
)
def test_slurm_requeues_what_has_saved(tmp_path, does, code, requeued):
    calls = stand_ins(tmp_path, srun=does, scontrol="")
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    run = launch("slurm.sh", "--", *TRAIN, path=tmp_path, **job)
    assert run.returncode == code, run.stderr
    assert calls()[0].endswith(f".venv/bin/python -m jaxlm.train {' '.join(TRAIN)}")
    assert ("scontrol requeue 7" in calls()) == requeued


def test_slurm_does_not_requeue_what_was_cancelled(tmp_path):
    calls = stand_ins(tmp_path, srun="kill -TERM $PPID; exit 75", scontrol="")
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    assert launch("slurm.sh", "--", *TRAIN, path=tmp_path, **job).returncode == 75
    assert len(calls()) == 1


RUNS = "exit $((75 * ($(grep -c ^python calls) < 3)))"  # twice 75, then 0


def test_gpu_node_goes_on_after_75(tmp_path):
    calls = stand_ins(tmp_path, python=RUNS, **{"nvidia-smi": ""})
    assert launch("gpu_node.sh", "--", *TRAIN, path=tmp_path, PYTHON="python").returncode == 0
    assert calls() == ["nvidia-smi -L"] + [f"python -m jaxlm.train {' '.join(TRAIN)}"] * 3
    run = launch("gpu_node.sh", "--no_restart", "--", *TRAIN, path=tmp_path, PYTHON="false")
    assert run.returncode == 1


def test_gpu_node_passes_a_signal_on_and_ends(tmp_path):
    waits = "trap 'exit 75' TERM; touch ready; while :; do sleep 0.05; done"
    calls = stand_ins(tmp_path, python=waits, **{"nvidia-smi": ""})
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": "python"}
    run = subprocess.Popen(["bash", str(ROOT / "launch/gpu_node.sh"), "--", *TRAIN], env=env)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    run.terminate()
    assert run.wait(timeout=20) == 75
    assert len(calls()) == 2


def test_the_jobset_restarts_what_was_preempted():
    text = (ROOT / "launch/gke_jobset.yaml").read_text()
    values = {
        "SLICES": "2",
        "HOSTS": "16",
        "CHIPS": "4",
        "TRAIN": "--config=a.py --workdir='/bucket/b c'",
    }
    names = "NAME IMAGE SERVICE_ACCOUNT ACCELERATOR TOPOLOGY BUCKET DATA".split()
    filled = Template(text).safe_substitute({name: name.lower() for name in names} | values)
    assert "${" not in filled
    assert len(text.splitlines()) < 80
    exported = re.findall(r"\b([A-Z_]+)=", text[: text.index("envsubst")])
    assert sorted(exported) == sorted([*names, *values])
    spec = yaml.safe_load(filled)["spec"]
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    (job,) = spec["replicatedJobs"]
    assert (job["replicas"], job["template"]["spec"]["completions"]) == (2, 16)
    preempted, saved = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert preempted["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert saved["onExitCodes"]["values"] == [75, 134]  # jaxlm.cli.PREEMPTED, another host was lost
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert shlex.split(container["args"][0])[-1] == "--workdir=/bucket/b c"


# ---------------------------------------------------------------- all


@pytest.mark.parametrize(
    "name,flags", [("tpu_pod.sh", ["run", *POD]), ("slurm.sh", []), ("gpu_node.sh", [])]
)
def test_dry_runs_print_the_commands_and_call_nothing(tmp_path, name, flags):
    programs = "gcloud sbatch srun scontrol nvidia-smi uv tar flock"
    calls = stand_ins(tmp_path, **dict.fromkeys(programs.split(), "exit 1"))
    run = launch(name, *flags, "--dry_run", "--", *TRAIN, path=tmp_path)
    assert run.returncode == 0 and not calls() and not run.stderr, run.stderr
    commands = []
    for line in run.stdout.splitlines():
        commands.append(shlex.split(line))
    if name == "tpu_pod.sh":
        verbs = []
        for words in commands:
            if words[0] == "gcloud":
                verbs.append(words[4])
        assert verbs == "create describe scp ssh ssh ssh ssh delete describe".split()
        commands = [
            shlex.split(w.partition("=")[2])
            for c in commands
            for w in c
            if w.startswith("--command=")
        ]
    assert any(words[-2:] == TRAIN for words in commands), run.stdout


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_help_is_all_that_help_does(path, flag, tmp_path):
    """It finds no program but sed, and leaves no file behind."""
    tools = tmp_path / "tools"
    empty = tmp_path / "empty"
    tools.mkdir()
    empty.mkdir()
    (tools / "sed").symlink_to(shutil.which("sed"))
    run = subprocess.run(
        [shutil.which("bash"), str(path), flag],
        cwd=empty,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    if path.name != "tpu_parts.sh":  # is sourced
        assert "Usage" in run.stdout
    assert not list(empty.iterdir())


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound_bash(path):
    if shutil.which("shellcheck"):
        check = ["shellcheck"]
    else:
        check = ["bash", "-n"]
    run = subprocess.run([*check, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    "args", [[], ["fly"], ["run"], ["run", *POD], ["delete", "--nmae=x"]], ids=" ".join
)
def test_wrong_usage_is_told_before_anything_is_called(cloud, args):
    run = launch("tpu_pod.sh", *args, path=cloud.path)
    assert run.returncode == 2
    assert "error: " in run.stderr
    assert not cloud.lines("calls")
