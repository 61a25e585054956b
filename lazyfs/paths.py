"""State folders of lazyfs under `$QUICKTHAW_HOME` (default `~/.cache/quickthaw`), all of mode 0700.

    store/   the default store: chunks, manifests, refs          cache/   sparse cache files, verified chunk by chunk
    mounts/  one record and one lock per mount point             run/     control sockets
    index/   stat caches of imported directories                 traces/  access logs, one per manifest
    logs/    daemon logs

Standard library only: this module is on the critical path of a restore.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lazyfs.errors import Permanent, from_os_error


def state_folder() -> Path:
    """Return the state folder's absolute path, `/.cache/quickthaw` for a user who has no home."""
    try:
        return Path(os.environ.get("QUICKTHAW_HOME") or "~/.cache/quickthaw").expanduser().absolute()
    except RuntimeError:  # a container's arbitrary user has neither a home nor a name
        return Path("/.cache/quickthaw")


def home() -> Path:
    """Return the state folder, created if needed. Raises DiskFull or Permanent if it cannot be created."""
    return private_dir(state_folder())


def private_dir(path: Path) -> Path:
    """Create the folder with mode 0700 (parents too) unless it exists; return `path`.

    Raises Permanent (not-a-folder), or what `from_os_error` maps the OSError to.
    """
    if path.is_dir():
        return path
    try:
        private_dir(path.parent) if not path.parent.exists() else None
        path.mkdir(mode=0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise Permanent(f"{path} is, or lies below, a file; name a folder instead", code="not-a-folder") from error
    except OSError as error:
        raise from_os_error(error, f"cannot create {path}") from error
    return path


def state_dir(name: str) -> Path:
    """Return a folder directly under home, such as `mounts`, created if needed."""
    return private_dir(home() / name)


def default_store_url() -> str:
    """Return `$QUICKTHAW_STORE`, else the URL of the directory `store/` under home."""
    return os.environ.get("QUICKTHAW_STORE") or f"file://{home() / 'store'}"


def mount_namespace() -> str:
    """Return what identifies this process's mount namespace among all hosts and boots."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/mnt').stat().st_ino}"


def child_environment() -> dict[str, str]:
    """Return the environment of a Python child process that finds this package, wherever the caller runs."""
    root = str(Path(__file__).resolve().parents[1])
    # An empty entry would mean the working directory.
    entries = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, entries)))}


def flock_within(fd: int, limit_s: float) -> bool:
    """Lock the file exclusively; return False if another process holds it for `limit_s` seconds. Raises OSError."""
    deadline, pause = time.monotonic() + limit_s, 0.0005
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)


@contextlib.contextmanager
def open_fd(path: Path | str, flags: int) -> Iterator[int]:
    """Yield a descriptor of the file, created with mode 0600 if `flags` contains O_CREAT. Raises OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def fingerprint(st: os.stat_result) -> list[int]:
    """Return the fields that detect a changed file: [size, mtime_ns, ctime_ns, inode]."""
    return [st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino]


def sync_folder(path: Path) -> None:
    """fsync a folder, so that its entries survive a power cut. Raises OSError."""
    with open_fd(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def write_atomic(path: Path, data: bytes | memoryview, *, sync: bool = True) -> None:
    """Write a file of mode 0600 under a temporary name, fsync it (`sync`), rename it.

    Removes the temporary file on failure. Raises what `from_os_error` maps the OSError to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with open_fd(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if sync:
                os.fdatasync(fd)
        temporary.rename(path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise from_os_error(error, f"cannot write {path}") from error
