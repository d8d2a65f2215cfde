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
    """A pathlib.Path, or for gs://BUCKET/PATH etils' epath.Path, which has the same methods.

    Raises ConfigError for any other scheme, and where the bucket cannot be reached.
    """
    if isinstance(workdir, PurePath):
        return workdir
    scheme, remote, rest = workdir.partition("://")
    if not remote:
        return Path(workdir)
    bucket = rest.partition("/")[0]
    if scheme != "gs" or not bucket:
        raise ConfigError(
            f"{workdir}: of all stores, checkpoints can only be in gs://BUCKET/PATH; give that or a directory as "
            "--workdir, where there are several hosts on a file system that all of them see"
        )
    require_bucket(workdir, bucket)
    return epath.Path(workdir)


def require_bucket(workdir: str, bucket: str) -> None:
    """Raises ConfigError where the libraries are missing or the bucket cannot be reached."""
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
        # As orbax does, so that what orbax would lack is reported here.
        storage.Client().get_bucket(bucket)
    except Exception as error:  # authentication, network, Google's answer: each library has its own
        raise ConfigError(
            f"{workdir}: the bucket '{bucket}' cannot be used ({one_line(error)}); look at its name, log in with "
            "`gcloud auth application-default login`, and see that the account may get the bucket and its objects"
        ) from None


def in_bucket(path: PurePath) -> bool:
    return isinstance(path, epath.Path)


def write_whole(path: PurePath, text: str) -> None:
    """Replaces a file so that nobody sees it half written: objects in a bucket appear whole, files are renamed."""
    if in_bucket(path):
        path.write_text(text)
        return
    new = path.with_suffix(".tmp")
    new.write_text(text)
    new.replace(path)


class Hold:
    """Makes a run directory and takes it for this run. Raises ConfigError where it cannot. Every process makes one.

    On a file system it is a lock, which ends with its process. A bucket has no such locks, and a lock that a lost
    machine left would stop the resumed run. There the newest run has the directory, and `check` ends the others.
    """

    def __init__(self, workdir: PurePath):
        self.workdir = workdir
        self.file = None
        try:
            if in_bucket(workdir):
                self._write_note()
            else:
                self._lock()
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

    def _write_note(self) -> None:
        self.note = self.workdir / ".run"
        self.mine = f"{socket.gethostname()} {uuid.uuid4().hex}"
        if jax.process_index() == 0:
            self.note.write_text(self.mine)

    def _lock(self) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        path = self.workdir / f".lock-{jax.process_index()}"
        self.file = open(path, "w")  # noqa: SIM115 (held until close)
        fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def check(self) -> None:
        """Raises ConfigError where a later run has taken the directory. Call it before anything is written."""
        if self.file:
            return
        now = hosts.read_if_there(self.note)
        if now == self.mine:
            return
        host = now.partition(" ")[0] or "(unknown)"
        raise ConfigError(
            f"--workdir={self.workdir}: another run, started later on {host}, has taken it; this one ends without "
            "saving; wait for that one, or give another"
        )

    def close(self) -> None:
        if self.file:
            self.file.close()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
