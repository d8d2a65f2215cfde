"""Several processes = one: the same losses, rows and checkpoints; they stop together; their errors are told plainly."""

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from conftest import FLAGS, ROOT, mesh_of
from test_train import SETTINGS, rows

from jaxlm.errors import ConfigError
from jaxlm.parallel import hosts

SMALL = SETTINGS | {
    "train.steps": 20,
    "model.num_layers": 1,
    "model.num_heads": 8,
    "model.num_kv_heads": 8,
    "model.vocab_size": 264,
    "model.dtype": "float32",
}
MESH = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2, "eval__every": 10}


def free_port() -> int:
    """A port that nobody listens on, below those that systems give to outgoing connections: it stays free."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return port


def by_flags(count, port):
    """What tells each of `count` processes about the others: (arguments, environment). One needs none of it."""
    if count == 1:
        return [([], {})]
    given = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", "--connect_timeout=60"]
    return [([*given, f"--process_id={i}"], {}) for i in range(count)]


def by_slurm(count, port):
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}

    def one(i):
        return {
            "SLURM_PROCID": str(i),
            "SLURM_LOCALID": str(i),
            "JAX_COORDINATOR_PORT": str(port),
        }

    return [([], job | one(i)) for i in range(count)]


@contextmanager
def started(directory, *words, count=2, devices=4, told=by_flags):
    """`python WORDS` in `count` processes, their output in directory/PROCESS.txt; none is left at the end."""
    directory.mkdir(exist_ok=True)
    devices = {"XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}"}
    runs = []
    try:
        for i, (flags, env) in enumerate(told(count, free_port())):
            with open(directory / f"{i}.txt", "w") as out:
                command = [sys.executable, *map(str, words), *flags]
                env = os.environ | devices | env
                runs.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
                    )
                )
        yield runs
    finally:
        for run in runs:
            run.kill()
            run.wait()


def finish(runs, directory) -> tuple[list[int], list[str]]:
    """(exit codes, outputs) of processes that end by themselves."""
    codes = [run.wait(timeout=90) for run in runs]
    return codes, [(directory / f"{i}.txt").read_text() for i in range(len(runs))]


def words_of(workdir, data, **overrides):
    settings = SMALL | {"data.path": data} | {k.replace("__", "."): v for k, v in overrides.items()}
    command = ["-m", "jaxlm.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    return command + [f"--config.{key}={value}" for key, value in settings.items()]


def train(workdir, data, count=2, told=by_flags, **overrides):
    """The outputs of a run in `count` processes that share 8 devices."""
    words = words_of(workdir, data, **overrides)
    out = workdir.parent / f"{workdir.name}-out"
    with started(out, *words, count=count, devices=8 // count, told=told) as runs:
        codes, outputs = finish(runs, out)
    assert codes == [0] * count, "\n".join(outputs)
    return outputs


def close(some: dict, others: dict) -> bool:
    """The same steps, and values within 1e-6."""
    return (
        some
        and list(some) == list(others)
        and np.allclose(list(some.values()), list(others.values()), 1e-6, 0)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text_dir):
    """A run of 20 steps in one process."""
    workdir = tmp_path_factory.mktemp("one") / "whole"
    train(workdir, text_dir, 1, **MESH)
    return workdir


@pytest.fixture(scope="module")
def half(tmp_path_factory, text_dir):
    """Its first 10 steps."""
    workdir = tmp_path_factory.mktemp("one") / "half"
    train(workdir, text_dir, 1, **MESH, train__stop_at=10)
    return workdir


def test_two_processes_are_one_and_one_goes_on_from_their_checkpoint(tmp_path, text_dir, whole):
    workdir = tmp_path / "two"
    outputs = train(workdir, text_dir, **MESH, train__stop_at=10)
    assert "done at step 10" in outputs[0]
    assert "step" not in outputs[1]
    assert "warn" not in outputs[1].lower()
    assert list(rows(workdir)) == list(range(1, 11))
    train(workdir, text_dir, 1, **MESH)
    for key in ("loss", "grad_norm", "eval/loss", "eval/bits_per_byte"):
        assert close(rows(workdir, key), rows(whole, key)), key


@pytest.mark.slow
def test_two_processes_go_on_from_the_checkpoint_of_one(tmp_path, text_dir, whole, half):
    """Started as SLURM does."""
    workdir = shutil.copytree(half, tmp_path / "two")
    train(workdir, text_dir, told=by_slurm, **MESH)
    assert close(rows(workdir), rows(whole))
    assert close(rows(workdir, "eval/loss"), rows(whole, "eval/loss"))


@pytest.mark.slow
def test_a_batch_that_every_process_needs_whole(tmp_path, text_dir, whole):
    """tensor=8: the rows are not split over the processes at all."""
    train(
        tmp_path / "two", text_dir, **MESH | {"mesh__fsdp": 1, "mesh__tensor": 8}, train__stop_at=10
    )
    first = {}
    for step, loss in rows(whole).items():
        if step <= 10:
            first[step] = loss
    assert close(rows(tmp_path / "two"), first)


def wait_for_rows(runs, workdir, number):
    while not (workdir / "metrics.jsonl").exists() or len(rows(workdir)) < number:
        assert [run.poll() for run in runs] == [None] * len(runs), "ended too early"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "receiver"),
    [
        pytest.param(signal.SIGTERM, 1, id="SIGTERM"),
        pytest.param(signal.SIGINT, 0, id="Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    tmp_path, text_dir, half, number, receiver
):
    workdir = shutil.copytree(half, tmp_path / "run")
    out = tmp_path / "out"
    with started(
        out, *words_of(workdir, text_dir, **MESH, train__steps=100_000, checkpoint__every=7)
    ) as runs:
        wait_for_rows(runs, workdir, 15)
        runs[receiver].send_signal(number)
        codes, outputs = finish(runs, out)
    last = max(rows(workdir))
    assert codes == [75, 75] and f"stopped by SIGTERM at step {last}, saved" in outputs[0], outputs
    assert (workdir / "checkpoints" / str(last)).is_dir()
    assert list(rows(workdir)) == list(range(1, last + 1))


@pytest.mark.slow
def test_the_others_end_when_one_is_killed(tmp_path, text_dir):
    """Missed for the heartbeat timeout, it ends them too; what was saved stays."""
    workdir = tmp_path / "run"
    out = tmp_path / "out"
    words = words_of(workdir, text_dir, train__steps=100_000, checkpoint__every=5)
    with started(out, *words, "--heartbeat_timeout=5") as runs:
        wait_for_rows(runs, workdir, 10)
        runs[1].kill()
        assert runs[0].wait(timeout=40) not in (0, 75)
    assert (workdir / "checkpoints" / "5").is_dir()


ROWS = """
import argparse, sys
import jax, numpy as np
from jax.sharding import Mesh
from jaxlm.config.keys import MESH_AXES
from jaxlm.parallel import hosts

parser = argparse.ArgumentParser()
hosts.add_flags(parser)
hosts.connect(parser.parse_args())
whole = np.arange(16 * 3).reshape(16, 3)
odd = [0, 4, 1, 5, 2, 6, 3, 7]
for order, sizes, expected in (
    (range(8), {"data": 8}, 8), (range(8), {"data": 2, "tensor": 4}, 8), (range(8), {"tensor": 8}, 16),
    (range(8), {"stage": 2, "data": 4}, 8), (odd, {"data": 8}, 8), (odd, {"data": 4, "tensor": 2}, 16),
    (range(8), {"data": 2, "stage": 2, "fsdp": 2}, 8), (odd, {"fsdp": 4, "stage": 2}, 16),
):
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    mesh = Mesh(np.array(jax.devices())[list(order)].reshape(shape), MESH_AXES)
    rows = hosts.local_rows(mesh, 16)
    assert len(rows) == expected, (sizes, rows)
    for batch in (whole[rows], whole):
        np.testing.assert_array_equal(hosts.fetch(hosts.to_global({"x": batch}, mesh, 16)["x"]), whole)
    assert len(hosts.local_rows(mesh, 15)) == 15  # not divided: every process needs all
hosts.require_same("equal", "nothing")
try:
    hosts.require_same(str(jax.process_index()), "they differ")
except Exception as error:
    print(error)
"""


def test_rows_go_where_the_mesh_wants_them(tmp_path):
    """Also where a process's devices are not neighbours in the mesh, so that its rows are not in one piece."""
    with started(tmp_path, "-c", ROWS) as runs:
        codes, outputs = finish(runs, tmp_path)
    assert codes == [0, 0], outputs
    assert all("they differ (process 0 is not as 1)" in text for text in outputs)


SUMS = """
import argparse
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jaxlm.parallel import hosts
from jaxlm.parallel.mesh import gather, scatter_sum

parser = argparse.ArgumentParser()
hosts.add_flags(parser)
hosts.connect(parser.parse_args())
here = P(("fsdp", "tensor"))
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
with jax.set_mesh(mesh):
    sent = np.arange(8 * 2**12, dtype=np.float32) % 1021  # sums of eight are exact
    x = jax.jit(lambda: jnp.asarray(sent), out_shardings=jax.NamedSharding(mesh, here))()
    grid = sent.reshape(4, 2, -1)
    for names, right in (
        (("tensor",), grid.sum(axis=1)), (("fsdp",), grid.sum(axis=0).reshape(2, 4, -1).swapaxes(0, 1)),
        (("fsdp", "tensor"), grid.sum(axis=(0, 1))),
    ):
        summed = lambda x: scatter_sum(x, 0, names)
        transpose = lambda x: jax.vjp(lambda part: gather(part, 0, names), summed(x))[1](x)[0]
        for f in (summed, transpose):
            f = jax.jit(jax.shard_map(f, in_specs=here, out_specs=here))
            np.testing.assert_array_equal(hosts.fetch(f(x)), right.ravel(), err_msg=str(names))
"""


def test_sums_that_are_scattered_between_processes(tmp_path):
    """They go another way than within one process, see jaxlm.parallel.mesh.wrong_scatters."""
    with started(tmp_path, "-c", SUMS) as runs:
        codes, outputs = finish(runs, tmp_path)
    assert codes == [0, 0], outputs


def test_one_process_holds_every_row():
    np.testing.assert_array_equal(hosts.local_rows(mesh_of(data=2, tensor=4), 6), np.arange(6))


# ---------------------------------------------------------------- flags and clusters


def flags_of(*words):
    parser = argparse.ArgumentParser()
    hosts.add_flags(parser)
    return parser.parse_args(words)


def test_flags_that_are_wrong_are_told_all_at_once():
    with pytest.raises(ConfigError) as error:
        hosts.connect(
            flags_of("--coordinator=node0", "--num_processes=two", "--heartbeat_timeout=0")
        )
    for part in (
        "--process_id: missing",
        "--coordinator=node0: must be HOST:PORT",
        "--num_processes=two",
        "=0: must",
    ):
        assert part in str(error.value)
    for words in (
        ("--process_id=2",),
        ("--process_id=0", "--coordinator=:80"),
        ("--process_id=0", "--coordinator=a:0"),
    ):
        with pytest.raises(ConfigError):
            hosts.connect(flags_of("--coordinator=node0:80", "--num_processes=2", *words))


def test_one_process_alone_touches_no_network(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("called"))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_"))]:
        monkeypatch.delenv(name)
    hosts.connect(flags_of())
    hosts.connect(
        flags_of("--coordinator=nowhere.invalid:80", "--num_processes=1", "--process_id=0")
    )


def test_others_that_do_not_come_are_exit_2(tmp_path, text_dir):
    """Process 0 waits at one port, process 1 at another."""

    def apart(count, port):
        (first, _), (second, _) = by_flags(count, port)[0], by_flags(count, free_port())[1]
        return [([*first, "--connect_timeout=2"], {}), ([*second, "--connect_timeout=2"], {})]

    with started(tmp_path, *words_of(tmp_path / "run", text_dir), told=apart) as runs:
        codes, outputs = finish(runs, tmp_path)
    assert codes == [2, 2], outputs
    assert all(
        "have not met at 127.0.0.1:" in text and "Traceback" not in text for text in outputs
    ), outputs


def test_a_port_in_use_is_exit_2():
    with (
        socket.create_server(("", 0)) as server,
        pytest.raises(ConfigError, match="cannot be used"),
    ):
        address = f"--coordinator=127.0.0.1:{server.getsockname()[1]}"
        hosts.connect(flags_of(address, "--num_processes=2", "--process_id=0"))


SRUN = dict.fromkeys(hosts.SLURM_TASK, "0") | {"SLURM_NTASKS": "4"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:34911"}
TPU = {"TPU_ML_PLATFORM": "JAX"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SRUN, "slurm"),
        (SRUN | {"SLURM_NTASKS": "1"}, None),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            None,
        ),  # a batch script before its srun
        (MPIRUN, "ompi"),
        (MPIRUN | SRUN, "ompi"),
        (MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (TPU, "gcetpu"),
        (TPU | {"JAX_PLATFORMS": "cpu"}, None),
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, None),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, "gketpu"),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "gketpu"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),  # no chips here
    ],
)
def test_the_cluster_is_told_by_the_environment(environ, expected):
    assert hosts.cluster(environ) == expected


def test_a_launcher_without_a_meeting_point_is_an_error_that_says_what_to_type():
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_RANK"):
        hosts.cluster({"OMPI_COMM_WORLD_SIZE": "2"})


def test_a_process_alone_on_its_node_has_all_gpus():
    assert hosts.alone_on_node(SRUN | {"SLURM_STEP_NUM_NODES": "4"})
    assert not hosts.alone_on_node(SRUN | {"SLURM_STEP_NUM_NODES": "2"})
    assert hosts.alone_on_node({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert not hosts.alone_on_node({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"})
