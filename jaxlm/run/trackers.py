"""Experiment trackers (config.log.trackers), and the table of all writers.

A tracker is a subclass of `Tracker` and a row of WRITERS; its library is an extra of the same name in pyproject.toml.
Without an account or a server it works offline, in the workdir. workdir/trackers.json has the id of each tracker's run,
so that a resumed run goes on in the same one. What metrics.jsonl has and the tracker has not, since it was killed or
unreachable or is new to the run, is sent when it opens. What it has already is not sent again.
"""

import contextlib
import importlib.util
import io
import json
import os
import time
import uuid
from pathlib import Path, PurePath

from ml_collections import ConfigDict

from jaxlm.cli import did_you_mean, readable_json
from jaxlm.config.recipe import flatten
from jaxlm.errors import ConfigError
from jaxlm.run.workdir import in_bucket, write_whole
from jaxlm.run.writers import Console, JsonLines, TensorBoard, Writer, read_rows

PROJECT = "jaxlm"  # where the environment names no other
MEMORY = "trackers.json"
TRAIN = "loss"  # the key that every row of a step has
EVAL = "eval/loss"  # the key that every row of an evaluation has


class Tracker(Writer):
    """What trackers share: which rows are new. A subclass has `name` and defines connect, log and log_samples."""

    name: str

    def open(self, config: ConfigDict, workdir: PurePath, start_step: int) -> str:
        self.memory = workdir / MEMORY
        self.library = importlib.import_module(self.name)
        self.sent = {}  # {TRAIN or EVAL: the last step that the tracker has}
        line = self.connect(config, workdir)
        for row in read_rows(workdir / "metrics.jsonl"):
            self.write(row["step"], row)
        return line

    def write(self, step: int, row: dict) -> None:
        kind = EVAL if EVAL in row else TRAIN
        if step <= self.sent.get(kind, -1):
            return
        # In metrics.jsonl what is not finite is text.
        numbers = {key: float(value) for key, value in row.items() if key != "step"}
        self.log(step, numbers)
        self.sent[kind] = step

    def samples(self, step: int, samples: list[dict]) -> None:
        if step > self.sent.get(EVAL, -1):
            self.log_samples(step, samples)

    def connect(self, config: ConfigDict, workdir: PurePath) -> str:
        """Begins or resumes the tracker's run; fills in `sent`. Returns a line for the console."""
        raise NotImplementedError

    def log(self, step: int, numbers: dict[str, float]) -> None:
        raise NotImplementedError

    def log_samples(self, step: int, samples: list[dict]) -> None:
        raise NotImplementedError

    def recall(self) -> dict:
        """What this tracker remembered in an earlier start of the run, {} where nothing."""
        return read_memory(self.memory).get(self.name, {})

    def remember(self, **facts) -> None:
        memory = read_memory(self.memory)
        memory[self.name] = self.recall() | facts
        write_whole(self.memory, json.dumps(memory, indent=1) + "\n")

    def local_folder(self, workdir: PurePath, instead: str) -> str:
        """The workdir as an absolute path. Raises ConfigError in a bucket, where no tracker can keep files."""
        if in_bucket(workdir):
            raise ConfigError(f"its files can't be in a bucket; {instead}")
        return str(workdir.absolute())


class Wandb(Tracker):
    """Weights & Biases: online with an API key, else offline. WANDB_MODE overrules; WANDB_PROJECT names the project.

    Each start of an offline run is a folder of its own, of the same run id; `wandb sync` sends them. A kill loses what
    wandb has not written yet, up to 15 seconds. A row of an evaluation has eval/step too, so that a resumed run finds
    the last row of each kind.
    """

    name = "wandb"

    def connect(self, config: ConfigDict, workdir: PurePath) -> str:
        mode = os.environ.get("WANDB_MODE") or self.mode()
        online = mode == "online"
        run_id = self.recall().get("id") or uuid.uuid4().hex[:8]
        folder = self.folder(workdir, online)
        stored = []
        if not online:
            stored = read_wandb(folder, run_id)
        self.run = self.library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=workdir.name,
            id=run_id,
            dir=folder,
            config=flatten(config),
            mode=mode,
            resume="allow" if online else None,
            settings=self.library.Settings(silent=True, console="off"),
        )
        self.remember(id=run_id)
        self.run.define_metric("*", step_metric="step")
        last = self.run.summary if online else last_values(stored)
        self.sent = {TRAIN: last.get("step", -1), EVAL: last.get("eval/step", -1)}
        self.rows = max(len(stored), self.run.step)  # wandb's own step, one for each row
        if online:
            return f"wandb: {self.run.url}"
        return f"wandb: {mode}, in {folder}/wandb; to send it: wandb sync {folder}/wandb/*run-*"

    def mode(self) -> str:
        return "online" if self.library.login(prompt=False) else "offline"

    def folder(self, workdir: PurePath, online: bool) -> str | None:
        if online and in_bucket(workdir):
            return None
        return self.local_folder(workdir, "set WANDB_API_KEY")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        row = {"step": step, **numbers}
        if EVAL in numbers:
            row["eval/step"] = step
        self.run.log(row, step=self.rows, commit=True)
        self.rows += 1

    def log_samples(self, step: int, samples: list[dict]) -> None:
        texts = [readable_json(sample) for sample in samples]
        table = self.library.Table(columns=["sample"], data=[[text] for text in texts])
        self.log(step, {"samples": table})

    def close(self) -> None:
        self.run.finish()


class Mlflow(Tracker):
    """MLflow: the server of MLFLOW_TRACKING_URI, otherwise workdir/mlflow.db."""

    name = "mlflow"
    PARAMS = 100  # that one request may have

    def connect(self, config: ConfigDict, workdir: PurePath) -> str:
        # A server that is gone may hold training up for seconds, not for MLflow's own minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None
        if not uri:
            folder = self.local_folder(workdir, "set MLFLOW_TRACKING_URI")
            uri = f"sqlite:///{folder}/mlflow.db"
            artifacts = f"file://{folder}/mlflow"
        self.client = self.library.MlflowClient(uri)
        self.run_id = self.recall().get("id")
        if self.run_id:
            self.client.update_run(self.run_id, status="RUNNING")
            self.sent = {key: self.last_step(key) for key in (TRAIN, EVAL)}
        else:
            self.run_id = self.new_run(workdir.name, artifacts)
            self.remember(id=self.run_id)
        self.log_config(config)
        return f"mlflow: run {self.run_id} in {uri}"

    def new_run(self, name: str, artifacts: str | None) -> str:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(project)
        if experiment:
            number = experiment.experiment_id
        else:
            number = self.client.create_experiment(project, artifacts)
        return self.client.create_run(number, run_name=name).info.run_id

    def last_step(self, key: str) -> int:
        history = self.client.get_metric_history(self.run_id, key)
        return max((metric.step for metric in history), default=-1)

    def log_config(self, config: ConfigDict) -> None:
        """The config as parameters. MLflow lets none change: what a resumed run has otherwise becomes a tag."""
        known = self.client.get_run(self.run_id).data.params
        new = []
        for key, value in flatten(config).items():
            text = str(value)[:6000]  # MLflow takes no longer ones
            if key not in known:
                new.append(self.library.entities.Param(key, text))
            elif known[key] != text:
                self.client.set_tag(self.run_id, f"resumed.{key}", text)
        for start in range(0, len(new), self.PARAMS):
            self.client.log_batch(self.run_id, params=new[start : start + self.PARAMS])

    def log(self, step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metric = self.library.entities.Metric
        metrics = [metric(key, value, now, step) for key, value in numbers.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def log_samples(self, step: int, samples: list[dict]) -> None:
        lines = [readable_json(sample) + "\n" for sample in samples]
        self.client.log_text(self.run_id, "".join(lines), f"samples/step-{step:08}.jsonl")

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


class Trackio(Tracker):
    """Trackio's local store: TRACKIO_DIR, otherwise workdir/trackio."""

    name = "trackio"

    def open(self, config: ConfigDict, workdir: PurePath, start_step: int) -> str:
        if "TRACKIO_DIR" not in os.environ:  # which the library reads when it is imported
            folder = self.local_folder(workdir, "set TRACKIO_DIR")
            os.environ["TRACKIO_DIR"] = f"{folder}/trackio"
        return super().open(config, workdir, start_step)

    def connect(self, config: ConfigDict, workdir: PurePath) -> str:
        known = self.recall()
        run_name = known.get("id") or f"{workdir.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for row in self.stored(run_name) if known else ():
            kind = EVAL if EVAL in row else TRAIN
            self.sent[kind] = max(row["step"], self.sent.get(kind, -1))
        self.remember(id=run_name)
        with contextlib.redirect_stdout(io.StringIO()):  # it explains itself in many lines
            self.run = self.library.init(
                project=PROJECT,
                name=run_name,
                config={key: str(value) for key, value in flatten(config).items()},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        folder = os.environ["TRACKIO_DIR"]
        return f"trackio: run {run_name}; to see it: TRACKIO_DIR={folder} trackio show --project {PROJECT}"

    def stored(self, run_name: str) -> list[dict]:
        """The rows that have reached the store; it is written half a second late."""
        rows = importlib.import_module("trackio.sqlite_storage").SQLiteStorage.get_logs(
            PROJECT, run_name
        )
        return [row for row in rows if TRAIN in row or EVAL in row]

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def log_samples(self, step: int, samples: list[dict]) -> None:
        text = "\n\n".join(readable_json(sample) for sample in samples)
        self.run.log({"samples": self.library.Markdown(text)}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.library.finish()


def read_wandb(folder: str, run_id: str) -> list[dict]:
    """The rows in the files of a wandb run, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record  # late: an extra

    rows = []
    for file in sorted(Path(folder).glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")):
        for record in wandb_records(file.read_bytes()):
            row = {}
            for item in Record.FromString(record).history.item:
                row[item.key or item.nested_key[0]] = json.loads(item.value_json)
            if row:
                rows.append(row)
    return rows


def wandb_records(data: bytes):
    """The whole records of a .wandb file; a last one that a kill cut short is left out.

    The format is LevelDB's log: after a header of 7 bytes, blocks of 32 KiB, in which each piece has a CRC of 4 bytes,
    its length in 2, and in 1 whether it is a whole record (1), its first, a middle or its last piece (2, 3, 4).
    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    header = 7
    block = 1 << 15
    place = header
    record = b""
    while place + header <= len(data):
        left = block - place % block
        if left < header:  # a block ends in zeros where no header fits
            place += left
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        end = place + header + length
        if kind == 0 or end > len(data):
            return
        record += data[place + header : end]
        place = end
        if kind in (1, 4):
            yield record
            record = b""


def last_values(rows: list[dict]) -> dict:
    """The last value of each key."""
    last = {}
    for row in rows:
        last |= row
    return last


def read_memory(path: PurePath) -> dict:
    """{name of a tracker: what it remembers} of a run."""
    if not path.exists():
        return {}
    return json.loads(path.read_text())


def forget(workdir: PurePath) -> None:
    """A run that starts over gets new runs in its trackers."""
    (workdir / MEMORY).unlink(missing_ok=True)


# Every place that rows can go. The first three are always there, trackers where config.log.trackers names them.
WRITERS = {
    "console": Console,
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}
TRACKERS = {name: kind for name, kind in WRITERS.items() if issubclass(kind, Tracker)}


def asked(config: ConfigDict) -> list[str]:
    """The names in config.log.trackers, each once."""
    names = [name.strip() for name in config.log.trackers.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def make_writers(config: ConfigDict) -> list[Writer]:
    """The writers of a run besides the console. metrics.jsonl is first: trackers read it when they open."""
    names = ["jsonl"]
    if config.log.tensorboard:
        names.append("tensorboard")
    return [WRITERS[name]() for name in names + asked(config)]


def tracker_problems(config: ConfigDict) -> list[str]:
    """What is wrong with config.log.trackers: names that are unknown, libraries that are not installed."""
    problems = []
    for name in asked(config):
        given = f"config.log.trackers={config.log.trackers}"
        if name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS)
            problems.append(f"{given}: there is no tracker {name}, but {', '.join(TRACKERS)}{hint}")
        elif not installed(name):
            problems.append(f'{given}: {name} is not installed; type: pip install -e ".[{name}]"')
    return problems


def installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name here has no origin
