"""The run directory, on a file system or in a bucket of Google Cloud Storage, and the one run that it belongs to."""

import fcntl
import socket
import uuid
from pathlib import Path, PurePath

import jax
from etils import epath

from jaxlm.errors import ConfigError
from jaxlm.parallel import hosts


def run_directory(workdir: str | PurePath) -> PurePath:
    """A pathlib.Path, or for gs://BUCKET/PATH etils' epath.Path, which has its methods.

    Raises ConfigError for any other scheme, and where the bucket cannot be reached.
    """
    scheme, remote, rest = str(workdir).partition("://")
    if isinstance(workdir, PurePath) or not remote:
        if isinstance(workdir, str):
            return Path(workdir)
        return workdir
    bucket = rest.partition("/")[0]
    if scheme != "gs" or not bucket:
        raise ConfigError(
            f"{workdir}: of all stores, checkpoints can only be in gs://BUCKET/PATH; give that or a directory as "
            "--workdir, where there are several hosts on a file system that all of them see"
        )
    try:
        import fsspec
        import gcsfs  # noqa: F401 (what epath uses)
        from google.cloud import storage
    except ImportError as error:
        raise ConfigError(
            f'{workdir}: {error.name} is not installed; type: pip install -e ".[gcs]"'
        ) from None
    # gcsfs would never look again into a folder that it has listed, whatever other processes write there.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    try:
        storage.Client().get_bucket(
            bucket
        )  # as orbax does, so that what it would lack is told here
    except (
        Exception
    ) as error:  # of authentication, of the network, of Google's answer: each from another library
        raise ConfigError(
            f"{workdir}: the bucket '{bucket}' cannot be used ({one_line(error)}); look at its name, log in with "
            "`gcloud auth application-default login`, and see that the account may get the bucket and its objects"
        ) from None
    return epath.Path(workdir)


def in_bucket(path: PurePath) -> bool:
    return isinstance(path, epath.Path)


def write_whole(path: PurePath, text: str) -> None:
    """Replaces a file, which is never seen half written: objects in a bucket appear whole, files are renamed."""
    if in_bucket(path):
        path.write_text(text)
    else:
        path.with_suffix(".tmp").write_text(text)
        path.with_suffix(".tmp").replace(path)


class Hold:
    """Makes a run directory and takes it for this run. Raises ConfigError where it cannot. To be made by each process.

    On a file system it is a lock, which ends with its process. A bucket has no such locks, and one that a lost machine
    has left would stop the run that is to go on: there the newest run has the directory, and `check` ends the others.
    """

    def __init__(self, workdir: PurePath):
        self.workdir = workdir
        self.file = None
        try:
            if in_bucket(workdir):
                self.note = workdir / ".run"
                self.mine = f"{socket.gethostname()} {uuid.uuid4().hex}"
                if jax.process_index() == 0:
                    self.note.write_text(self.mine)
            else:
                workdir.mkdir(parents=True, exist_ok=True)
                self.file = open(workdir / f".lock-{jax.process_index()}", "w")  # noqa: SIM115 (held until close)
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--workdir={workdir}: another run is using it; wait for it, or give another"
            ) from None
        except Exception as error:  # gcsfs has its own
            why = getattr(error, "strerror", None) or one_line(error)
            raise ConfigError(
                f"--workdir={workdir}: {why}; give a directory that can be written"
            ) from None
        hosts.require_shared(workdir)
        if in_bucket(workdir) and jax.process_index() > 0:
            self.mine = hosts.read_if_there(self.note)

    def check(self) -> None:
        """Raises ConfigError where a later run has taken the directory. To be called before anything is written."""
        if self.file or (now := hosts.read_if_there(self.note)) == self.mine:
            return
        raise ConfigError(
            f"--workdir={self.workdir}: another run, started later on {now.partition(' ')[0] or '(unknown)'}, has "
            "taken it; this one ends without saving; wait for that one, or give another"
        )

    def close(self) -> None:
        if self.file:
            self.file.close()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
