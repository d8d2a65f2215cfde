"""Real runs of a tiny config, in processes of their own: resumed = uninterrupted, and two hosts = one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.config.check import check, reset_unused
from jaxlm.config.recipe import flatten
from jaxlm.config.tasks import task_of
from jaxlm.errors import UserError
from jaxlm.verify.laws import DEVICES, Result, on_mesh
from jaxlm.verify.tiny import STEPS, make_data, needs_teacher

HOSTS_TOLERANCE = 1e-6  # relative, of the losses
TIMEOUT = 900  # seconds of a run
MESHES = ("data=2 fsdp=2 tensor=2", "fsdp=8", "data=8")  # the first that the config allows is used
RESUMED = "resumed = uninterrupted"
HOSTS = "hosts 1 = 2"

RECIPE = """from jaxlm.config.recipe import unflatten


def get_config():
    return unflatten({flat})
"""


def xla_flags(devices: int) -> str:
    """Fake CPU devices, and a compiler that optimizes less, twice as fast: what runs is tiny."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


class Trainer:
    """Runs `python -m jaxlm.train` of a tiny config in processes of their own."""

    def __init__(self, config: ConfigDict, folder: Path):
        self.folder = folder
        self.recipe = folder / "recipe.py"
        self.recipe.write_text(RECIPE.format(flat=repr(flatten(config))))

    def __call__(self, name: str, *flags: str, hosts: int = 1) -> dict[int, float]:
        """{step: loss} of workdir `name`.

        Raises UserError with the end of the run's log where it failed, and where a step is missing or there twice.
        """
        logs = self.launch(name, flags, hosts)
        for code, log in logs:
            if code:
                raise UserError(f"jaxlm.train ended with exit code {code}: {log[-2000:]}")
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        steps = []
        losses = {}
        for line in lines:
            row = json.loads(line)
            steps.append(row["step"])
            losses[row["step"]] = row["loss"]
        if steps != list(range(1, steps[-1] + 1)):
            raise UserError(f"metrics.jsonl of {name} does not have each step once: {steps}")
        return losses

    def launch(self, name: str, flags: tuple[str, ...], hosts: int) -> list[tuple[int, str]]:
        """(exit code, output) of a run's processes, one for each host, on DEVICES devices in all."""
        command = [sys.executable, "-m", "jaxlm.train"]
        command += [f"--config={self.recipe}", f"--workdir={self.folder / name}", *flags]
        env = os.environ | {"XLA_FLAGS": xla_flags(DEVICES // hosts), "JAX_PLATFORMS": "cpu"}
        port = free_port()
        runs = []
        for host in range(hosts):
            peers = []
            if hosts > 1:
                peers = [f"--coordinator=localhost:{port}", f"--num_processes={hosts}"]
                peers += [f"--process_id={host}"]
            run = subprocess.Popen(
                [*command, *peers],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            runs.append(run)
        try:
            logs = [run.communicate(timeout=TIMEOUT)[0] for run in runs]
        finally:
            for run in runs:
                run.kill()
        return [(run.returncode, log) for run, log in zip(runs, logs)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def make_teacher(config: ConfigDict, folder: Path) -> Path:
    """The workdir of a short run of the same task without a teacher; of plain text for DPO, which always needs one."""
    folder = folder / "teacher"
    folder.mkdir()
    plain = config.copy_and_resolve_references()
    plain.task.distill = 0.0
    plain.task.temperature = 1.0
    plain.task.teacher = ""
    plain.task.teacher_model = ()
    if task_of(plain).is_preference:
        plain.task.name = "lm"
        plain.data.train = ""
        reset_unused(plain)
        make_data(folder, plain)
    Trainer(plain, folder)("run", "--config.train.stop_at=2")
    return folder / "run"


def runs_agree(tiny: ConfigDict, folder: Path) -> list[Result]:
    """Two laws by real runs: resumed = uninterrupted to the last digit, and two processes of 4 devices = one of 8."""
    config = first_valid(tiny)
    results = []
    try:
        if needs_teacher(config):
            config.task.teacher = str(make_teacher(config, folder))
        train = Trainer(config, folder)
        whole = train("whole")
        results.append(resumed(train, whole))
        results.append(two_hosts(train, whole, config))
    except UserError as error:
        name = HOSTS if results else RESUMED
        results.append(Result(name, False, {"place": str(error)}))
    return results


def first_valid(tiny: ConfigDict) -> ConfigDict:
    for words in MESHES:
        config = on_mesh(tiny, words)
        if not check(config, DEVICES):
            break
    return config


def resumed(train: Trainer, whole: dict[int, float]) -> Result:
    train("parts", f"--config.train.stop_at={STEPS // 2}")
    parts = train("parts")
    different = [step for step in whole if whole[step] != parts.get(step)]
    figures = {"equal_losses": len(whole) - len(different), "of": len(whole)}
    if different:
        figures["place"] = f"the loss of step {different[0]}"
    return Result(RESUMED, not different, figures)


def two_hosts(train: Trainer, whole: dict[int, float], config: ConfigDict) -> Result:
    """Experts: up to three seeds, since a token that likes two experts alike goes where rounding sends it."""
    attempts = 3 if config.model.num_experts else 1
    for attempt in range(attempts):
        flag = f"--config.seed={config.seed + attempt}"
        one = train(f"alone{attempt}", flag) if attempt else whole
        two = train(f"hosts{attempt}", flag, hosts=2)
        difference = max(abs(two[step] - one[step]) / abs(one[step]) for step in one)
        if difference <= HOSTS_TOLERANCE:
            break
    return Result(HOSTS, difference <= HOSTS_TOLERANCE, {"loss_difference": difference})
