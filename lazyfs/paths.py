"""Where lazyfs keeps things: `$QUICKTHAW_HOME` (default `~/.cache/quickthaw`) and the folders under it, all of mode
0700.

    store/   the default store: chunks, manifests, refs          cache/   images of files, verified chunk by chunk
    mounts/  one record and one lock per mount point             run/     control sockets
    index/   stat caches of imported directories                 traces/  recorded first touches, one per manifest
    logs/    what daemons write

Standard library only, since it sits on the path of a restore.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lazyfs.errors import Permanent, from_os_error


def home() -> Path:
    """The state folder, made if needed. Raises DiskFull or Permanent when it cannot be."""
    return private_dir(Path(os.environ.get("QUICKTHAW_HOME") or "~/.cache/quickthaw").expanduser())


def private_dir(path: Path) -> Path:
    """`path` as an existing folder; created with mode 0700 (parents too) when it is not there."""
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
    """A folder directly under home, such as `mounts`."""
    return private_dir(home() / name)


def default_store_url() -> str:
    """`$QUICKTHAW_STORE`, else the directory `store/` under home."""
    return os.environ.get("QUICKTHAW_STORE") or f"file://{home() / 'store'}"


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a file of mode 0600 under a temporary name, flush it, rename it. Leaves nothing behind when it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if sync:
                os.fdatasync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise from_os_error(error, f"cannot write {path}") from error
