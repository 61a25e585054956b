"""The snapshots of this host: one folder (0700) each under `$QUICKTHAW_HOME/snapshots`, either complete or absent.

A snapshot is written under a name that starts with a dot, and renamed once its manifest is in place. An existing
snapshot is exchanged in the same step, so a killed process leaves one of the two. The next writer removes what a
killed writer left. A name has one writer at a time (flock, which the kernel releases when the writer dies). A
restore holds a shared lock on the folder before it reads the manifest; `rm` then fails at once instead of waiting or
breaking the restore. After locking a folder, a process checks that the name still refers to it. Folders are locked
while they are removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from checkpoint import disk
from checkpoint.errors import Busy, NotFound
from checkpoint.files import lock_folder, private_folder, write_private
from checkpoint.snapshot import manifest, speculative
from checkpoint.snapshot.manifest import Snapshot
from lazyfs.content.records import ready

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
QUARANTINE_AFTER = 3
"""Number of consecutive failed restores after which a snapshot is quarantined (`snapshot inspect` shows the reason)."""

PULLS_KEPT_S = 24 * 3600.0
"""How long an interrupted pull is kept for another attempt, seconds."""
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
_ATTEMPTS = 20
"""How often locking is retried when the name refers to another folder than the one just locked."""


class Health(msgspec.Struct, forbid_unknown_fields=True):
    """Record of a snapshot's restores on this host: consecutive failures, and the last reason."""

    failures: int = 0
    reason: str = ""
    at: str = ""

    @property
    def quarantined(self) -> bool:
        """Whether launches skip this snapshot."""
        return self.failures >= QUARANTINE_AFTER


@dataclass(frozen=True)
class Library:
    """The snapshots below `home`."""

    home: Path

    @property
    def folder(self) -> Path:
        """The folder that holds the snapshots."""
        return self.home / "snapshots"

    def path(self, name: str) -> Path:
        """Return the folder of a snapshot. Raises NotFound (snapshot-name) for an invalid name."""
        if not _NAME.fullmatch(name):
            raise NotFound("snapshot-name", f"{name!r} is not a valid name of a snapshot; see: quickthaw snapshot ls")
        return self.folder / name

    def names(self) -> list[str]:
        """List all snapshots' names, oldest first, including damaged ones.

        Raises Failed (library-unreadable).
        """
        found = []
        with (
            disk.required("snapshots cannot be listed", "library-unreadable"),
            contextlib.suppress(FileNotFoundError),
            os.scandir(self.folder) as entries,
        ):
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if entry.is_dir() and not entry.name.startswith("."):
                        found.append((entry.stat().st_mtime, entry.name))
        return [name for _, name in sorted(found)]

    def has(self, name: str) -> bool:
        """Return whether a complete snapshot of that name exists."""
        return (self.path(name) / manifest.FILE_NAME).exists()

    def load(self, name: str) -> Snapshot:
        """Read a snapshot's manifest. Raises NotFound, Integrity or Incompatible."""
        folder = self.path(name)
        if not folder.is_dir():
            known = ", ".join(self.names()[-3:]) or "none yet; quickthaw launch makes one"
            raise NotFound("snapshot-not-found", f"there is no snapshot {name!r} (there are: {known})")
        return manifest.load(folder)

    # Using and removing

    @contextlib.contextmanager
    def in_use(self, name: str) -> Iterator[Path]:
        """Keep a snapshot from being removed or replaced. Raises NotFound, Busy."""
        fd = self._locked(name, fcntl.LOCK_SH, Busy("snapshot-being-removed", f"{name} is being removed or replaced"))
        try:
            yield self.path(name)
        finally:
            os.close(fd)

    def _locked(self, name: str, operation: int, busy: Busy) -> int:
        """Open and lock the folder that currently has the name; return its descriptor."""
        for _ in range(_ATTEMPTS):
            try:
                fd = lock_folder(self.path(name), operation)
            except BlockingIOError:
                raise busy from None
            except FileNotFoundError:
                raise NotFound(
                    "snapshot-not-found", f"there is no snapshot {name!r}; see: quickthaw snapshot ls"
                ) from None
            except OSError as error:
                raise disk.failure(f"{name} cannot be opened", error, "snapshot-unreadable") from error
            if fd >= 0:
                return fd
        raise busy

    def remove(self, name: str) -> None:
        """Remove a snapshot. Raises NotFound, Busy while a restore reads it, Failed when the disk refuses."""
        fd = self._lock_exclusively(name)
        try:
            doomed = self.folder / f".removed-{name}-{os.urandom(6).hex()}"
            with disk.required(f"{name} is not removed", "snapshot-not-removed"):
                self.path(name).rename(doomed)
            self._forget_restores(name)
            shutil.rmtree(doomed, ignore_errors=True)  # `sweep` removes leftovers
        finally:
            os.close(fd)

    def _lock_exclusively(self, name: str) -> int:
        busy = Busy("snapshot-in-use", f"a replica is being restored from {name}; try again in a moment")
        return self._locked(name, fcntl.LOCK_EX, busy)

    def _forget_restores(self, name: str) -> None:
        """Remove health record and plans of a removed snapshot."""
        self.clear_failures(name)
        speculative.remove_plans(self.home / "run", self.path(name))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a folder to write a snapshot into.

        It becomes `name` if the block succeeds, and is removed otherwise.

        Raises Busy when another process writes the same name or a restore reads the existing snapshot, and Failed
        when the disk refuses. The existing snapshot is then kept.
        """
        self.path(name)
        partial = self.folder / f".partial-{name}"
        what = f"{name} could not be written"
        with disk.required(what, "snapshot-not-written"), self._writer_lock(name):
            shutil.rmtree(partial, ignore_errors=True)  # a killed writer's: we hold its lock
            try:
                partial.mkdir(mode=0o700)
                yield partial
                self._publish(partial, name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def _publish(self, partial: Path, name: str) -> None:
        """Rename a finished folder to its name; an existing snapshot of that name moves to `partial`.

        Raises Busy, OSError.
        """
        target = self.path(name)
        for _ in range(_ATTEMPTS):
            if not os.path.lexists(target):
                self._forget_restores(name)
                try:
                    partial.rename(target)
                    return
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
            try:
                old = self._lock_exclusively(name)
            except NotFound:
                continue  # removed meanwhile
            try:
                self._forget_restores(name)
                self._replace(partial, target)
                return
            finally:
                os.close(old)
        raise Busy("snapshot-in-use", f"other processes keep replacing {name}; the new snapshot is dropped")

    @staticmethod
    def _replace(partial: Path, target: Path) -> None:
        try:
            exchange(partial, target)
        except OSError as error:
            if error.errno != errno.EXDEV:  # a folder of a container image's layer (overlayfs) cannot be renamed
                raise
            (target / "manifest.json").unlink()  # first, so that a half-removed snapshot is none
            shutil.rmtree(target)
            partial.rename(target)

    @contextlib.contextmanager
    def _exclusive_lock(self, folder: str) -> Iterator[None]:
        """Lock a folder exclusively. Raises Busy when it is locked already or gone."""
        try:
            fd = lock_folder(Path(folder), fcntl.LOCK_EX)
        except BlockingIOError:
            raise Busy("in-use", f"{folder} is in use") from None
        if fd < 0:
            raise Busy("in-use", f"{folder} was replaced")
        try:
            yield
        finally:
            os.close(fd)

    def sweep(self, pulls_older_s: float = PULLS_KEPT_S) -> int:
        """Remove folders that killed writers, removers and restores left, and pulls without progress for `pulls_older_s`.

        Locked folders are skipped. Returns the number of removed folders.
        """
        removed = 0
        for work in (self.home / "run").glob("restore-*"):
            removed += self._remove_if_unlocked(work, self._exclusive_lock(str(work)))
        if not self.folder.is_dir():
            return removed
        for entry in list(os.scandir(self.folder)):
            path = Path(entry.path)
            if entry.name.startswith(".partial-"):
                removed += self._remove_if_unlocked(path, self._writer_lock(entry.name.removeprefix(".partial-")))
            elif entry.name.startswith(".removed-"):
                removed += self._remove_if_unlocked(path, self._exclusive_lock(entry.path))
            elif entry.name.startswith(".pull-"):
                removed += self._remove_if_unlocked(path, self._exclusive_lock(entry.path), pulls_older_s)
        return removed

    def _remove_if_unlocked(
        self, folder: Path, holding: contextlib.AbstractContextManager[None], older_s: float = 0.0
    ) -> bool:
        """Remove a folder that is not locked and was not written to for `older_s` seconds.

        Return whether it is gone.
        """
        with contextlib.suppress(Busy, OSError), holding:
            if not older_s or time.time() - _last_write(folder) >= older_s:
                shutil.rmtree(folder, ignore_errors=True)
                return not folder.exists()
        return False

    @contextlib.contextmanager
    def _writer_lock(self, name: str) -> Iterator[None]:
        """Hold the writer's lock of a name. Raises Busy, OSError."""
        private_folder(self.folder)
        lock = os.open(self.folder / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(
                    "snapshot-being-taken", f"another process is taking {name}; this replica continues without"
                ) from None
            yield
        finally:
            os.close(lock)

    # The working set

    def working_set(self, name: str) -> Path:
        """Return the path of a snapshot's recorded working set.

        It lies in the snapshot's folder and is pushed and removed with it. The manifest's digests do not cover it: it
        is recorded later, and lists pages without containing any.
        """
        return self.path(name) / "working-set"

    # Failures and quarantine

    def _health_file(self, name: str) -> Path:
        return self.folder / f".{name}.health"

    def health(self, name: str) -> Health:
        """Read the health record of a snapshot; return a new one if there is none or it is damaged."""
        try:
            return msgspec.json.decode(self._health_file(name).read_bytes(), type=ready(Health))
        except (OSError, msgspec.MsgspecError):
            return Health()

    def record_failure(self, name: str, reason: str) -> Health:
        """Count a failed restore and return the updated record.

        It is not written when the disk is full or read-only.
        """
        return self._record(name, self.health(name).failures + 1, reason)

    def _record(self, name: str, failures: int, reason: str) -> Health:
        health = Health(failures, reason, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        with disk.optional(f"the failed restore of {name} is not counted", "health-not-kept"):
            write_private(self._health_file(name), msgspec.json.encode(health))
        return health

    def quarantine(self, name: str, reason: str) -> Health:
        """Have launches skip a snapshot from now on, for a reason that starts with a code. Written as `record_failure` does."""
        health = self.health(name)
        return self._record(name, max(health.failures + 1, QUARANTINE_AFTER), reason)

    def clear_failures(self, name: str) -> None:
        """Clear the recorded failures."""
        file = self._health_file(name)
        if os.path.lexists(file):
            with disk.optional(f"earlier failures of {name} still count", "health-not-kept"):
                file.unlink(missing_ok=True)


def exchange(one: Path, other: Path) -> None:
    """Exchange the names of two folders atomically where the file system supports it, else in steps.

    Killed between the steps, `other` lies beside `one` as `.removed-OTHER-…`. Raises OSError; then nothing has changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(number, os.strerror(number), str(other))
    between = one.with_name(f".removed-{other.name}-{os.urandom(6).hex()}")
    other.rename(between)
    try:
        one.rename(other)
    except BaseException:  # a signal's, too
        if not os.path.lexists(other):
            between.rename(other)
        raise
    between.rename(one)


def _last_write(folder: Path) -> float:
    """Return when anything below a folder was last written, in seconds since the epoch."""
    return max(path.lstat().st_mtime for path in (folder, *folder.glob("*"), *folder.glob("images/*")))
