"""A store in a directory: one file per object, mode 0600, written under a temporary name and renamed.

No fsync per object (a model has thousands): `flush()` syncs the whole file system once, and the writer of a manifest calls
it first. A chunk that a power cut truncated is detected by its size at the next put.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from lazyfs.errors import Permanent, from_os_error, os_errors
from lazyfs.paths import fingerprint, open_fd, private_dir, write_atomic
from lazyfs.stores.base import MOST_BYTES, ObjectInfo, too_large
from lazyfs.stores.urls import local_path

# A temporary file older than this belongs to a killed writer.
_STALE_S = 3600
# Below this size a copy costs nothing, and bytes are easier to handle than a view.
_COPY = 65536


def open_url(url: str) -> LocalStore:
    """Return the store of a file:// URL."""
    path = local_path(url)
    assert path is not None
    return LocalStore(path)


def _version(st: os.stat_result) -> str:
    return "-".join(map(str, fingerprint(st)))


class LocalStore:
    """Objects as files under `root`, which is created at the first put."""

    remote = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = f"file://{root}"

    def path(self, key: str) -> Path:
        """Return the path of the object's file, whether or not it exists."""
        return self.root / key

    def get(
        self,
        key: str,
        start: int = 0,
        length: int | None = None,
        version: str = "",
        into: memoryview | None = None,
        *,
        limit: int = MOST_BYTES,
    ) -> bytes | memoryview:
        path = self.path(key)
        # Not blocking: another writer to a shared folder may leave a pipe there, and opening a pipe blocks forever.
        with os_errors(f"cannot read {path}"), open_fd(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
            there = os.fstat(fd)
            if not stat.S_ISREG(there.st_mode):
                raise Permanent(f"{path} is not a regular file; remove it", code="not-a-file")
            if version and _version(there) != version:
                raise Permanent(f"{path} changed; mount or import it again", code="source-changed")
            if length is None:
                length = max(0, there.st_size - start)
                if length > limit:
                    raise too_large(str(path), limit)
            own = None
            if into is not None and len(into) >= length:
                view = into[:length]
            else:
                fresh = bytearray(length)
                own, view = fresh, memoryview(fresh)
            got = 0
            while got < length:
                n = os.preadv(fd, [view[got:]], start + got)
                if n == 0:
                    break
                got += n
            if own is not None and got == length >= _COPY:
                # A bytearray serves as bytes for every reader; a copy of 8 MiB would be noticeable.
                return own  # type: ignore[return-value]
            return view[:got] if length >= _COPY else bytes(view[:got])

    def put(self, key: str, data: bytes | memoryview) -> None:
        path = self.path(key)
        private_dir(path.parent)
        write_atomic(path, data, sync=False)

    def create(self, key: str, data: bytes) -> bool:
        path = self.path(key)
        private_dir(path.parent)
        complete = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
        write_atomic(complete, data, sync=False)
        with os_errors(f"cannot create {path}"):
            try:
                os.link(complete, path)
            except FileExistsError:
                return False
            finally:
                complete.unlink(missing_ok=True)
        return True

    def head(self, key: str) -> ObjectInfo | None:
        with os_errors(f"cannot stat {self.path(key)}"):
            try:
                st = self.path(key).stat()
            except FileNotFoundError:
                return None
        return ObjectInfo(key, st.st_size, st.st_mtime, _version(st))

    def touch(self, key: str) -> None:
        with os_errors(f"cannot touch {self.path(key)}"):
            os.utime(self.path(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        base = self.path(prefix.rstrip("/")) if prefix else self.root
        if not os.path.lexists(base):
            return

        def stop(error: OSError) -> None:
            # A folder removed meanwhile was empty. Any other error must not look like an empty folder, or its chunks
            # become garbage.
            if error.errno != errno.ENOENT or base.is_symlink():
                raise from_os_error(error, f"cannot list {error.filename}") from error

        for folder, _, names in os.walk(base, onerror=stop):
            for name in sorted(names):
                path = Path(folder) / name
                if name.startswith(".") and name.endswith(".tmp"):
                    self._sweep(path)
                    continue
                key = str(path.relative_to(self.root))
                info = self.head(key)
                if info is not None:
                    yield info

    def delete(self, key: str) -> None:
        with os_errors(f"cannot delete {self.path(key)}"):
            self.path(key).unlink(missing_ok=True)

    def flush(self) -> None:
        if not self.root.is_dir():
            return
        with os_errors(f"cannot sync {self.root}"), open_fd(self.root, os.O_RDONLY | os.O_DIRECTORY) as fd:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.syncfs(fd) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def _sweep(self, temporary: Path) -> None:
        """Remove a temporary file that is too old to belong to a live writer."""
        with contextlib.suppress(FileNotFoundError):
            if time.time() - temporary.stat().st_mtime > _STALE_S:
                temporary.unlink()
