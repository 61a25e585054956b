"""The snapshots of this host: one folder each under `$QUICKTHAW_HOME/snapshots`, 0700, complete or not there.

A snapshot is written under a name that starts with a dot and renamed when its manifest is in place; what a killed writer leaves is
removed by the next one. A name has one writer at a time (flock, so that a dead writer holds nothing). A restore holds the folder's
lock shared, so that `rm` waits for nobody and takes nothing away under a restore.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from checkpoint import early, manifest
from checkpoint.aside import aside
from checkpoint.errors import Busy, Failed, NotFound
from checkpoint.manifest import Snapshot
from lazyfs.records import ready

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
QUARANTINE_AFTER = 3
"""Failed restores in a row after which a snapshot is left alone until somebody looks (`snapshot inspect` says why)."""

PULLS_KEPT_S = 24 * 3600.0
"""How long an interrupted pull is kept for another attempt."""


class Health(msgspec.Struct, forbid_unknown_fields=True):
    """How restores of a snapshot went on this host: failures in a row, and the last reason."""

    failures: int = 0
    reason: str = ""
    at: str = ""

    @property
    def quarantined(self) -> bool:
        """Whether launches pass this snapshot over."""
        return self.failures >= QUARANTINE_AFTER


@dataclass(frozen=True)
class Library:
    """The snapshots below `home`."""

    home: Path

    @property
    def folder(self) -> Path:
        """Where snapshots lie."""
        return self.home / "snapshots"

    def path(self, name: str) -> Path:
        """The folder of a snapshot. Raises NotFound for what cannot be a name."""
        if not _NAME.fullmatch(name):
            raise NotFound("snapshot-name", f"{name!r} cannot be the name of a snapshot; see: quickthaw snapshot ls")
        return self.folder / name

    def names(self) -> list[str]:
        """Every snapshot's name, oldest first; damaged ones too."""
        try:
            entries = [entry for entry in os.scandir(self.folder) if entry.is_dir() and not entry.name.startswith(".")]
        except FileNotFoundError:
            return []
        return [entry.name for entry in sorted(entries, key=lambda e: e.stat().st_mtime)]

    def has(self, name: str) -> bool:
        """Whether a complete snapshot of that name exists."""
        return (self.path(name) / manifest.FILE_NAME).exists()

    def load(self, name: str) -> Snapshot:
        """A snapshot's manifest. Raises NotFound, Integrity or Incompatible."""
        folder = self.path(name)
        if not folder.is_dir():
            known = ", ".join(self.names()[-3:]) or "none yet; quickthaw launch makes one"
            raise NotFound("snapshot-not-found", f"there is no snapshot {name!r} (there are: {known})")
        return manifest.load(folder)

    # Using and removing

    @contextlib.contextmanager
    def in_use(self, name: str) -> Iterator[Path]:
        """Keep a snapshot from being removed while it is restored."""
        folder = self.path(name)
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound("snapshot-not-found", f"there is no snapshot {name!r}; see: quickthaw snapshot ls") from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy("snapshot-being-removed", f"{name} is being removed") from None
            yield folder
        finally:
            os.close(fd)

    def remove(self, name: str) -> None:
        """Remove a snapshot. Raises NotFound, or Busy while a restore reads it."""
        folder = self.path(name)
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound("snapshot-not-found", f"there is no snapshot {name!r}; see: quickthaw snapshot ls") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            doomed = self.folder / f".removed-{name}-{os.getpid()}"
            folder.rename(doomed)
        except BlockingIOError:
            raise Busy("snapshot-in-use", f"a replica is being restored from {name}; try again in a moment") from None
        finally:
            os.close(fd)
        shutil.rmtree(doomed)
        self._forget(name)

    def _forget(self, name: str) -> None:
        """Remove what was learned about a snapshot that is gone."""
        self._health_file(name).unlink(missing_ok=True)
        early.forget(self.home / "run", self.path(name))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A folder to write a snapshot into; it becomes `name` when the block ends without an error, and vanishes otherwise.

        Raises Busy when another process is writing the same name.
        """
        target = self.path(name)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.folder / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        partial = self.folder / f".partial-{name}"
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(
                    "snapshot-being-taken", f"another process is taking {name}; this replica goes on without"
                ) from None
            shutil.rmtree(partial, ignore_errors=True)  # a killed writer's: we hold its lock
            try:
                partial.mkdir(mode=0o700)
                yield partial
                if target.exists():
                    self.remove(name)
                self._forget(name)
                partial.rename(target)
            except OSError as error:
                raise Failed(
                    "snapshot-not-written",
                    f"{name} could not be written: {error.strerror or error} ({error.filename or self.folder})",
                ) from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def _unused(self, folder: str) -> Iterator[None]:
        """Hold a work folder that nobody else holds; raises Busy where somebody does."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise Busy("in-use", f"{folder} is in use") from None
        finally:
            os.close(fd)

    def sweep(self, pulls_older_s: float = PULLS_KEPT_S) -> int:
        """Remove what killed writers, removers and restores left, and what has come of a snapshot that nobody has gone on fetching for
        `pulls_older_s`; how many folders. Those of the living stay."""
        removed = 0
        for work in (self.home / "run").glob("restore-*"):
            with contextlib.suppress(Busy, OSError), self._unused(str(work)):
                shutil.rmtree(work, ignore_errors=True)
                removed += 1
        if not self.folder.is_dir():
            return removed
        for entry in list(os.scandir(self.folder)):
            if entry.name.startswith(".partial-"):
                name = entry.name.removeprefix(".partial-")
                with contextlib.suppress(Busy), self._only_writer(name):
                    shutil.rmtree(entry.path, ignore_errors=True)
                    removed += 1
            elif entry.name.startswith(".pull-"):
                with contextlib.suppress(Busy, OSError), self._unused(entry.path):
                    if time.time() - _touched(Path(entry.path)) >= pulls_older_s:
                        shutil.rmtree(entry.path, ignore_errors=True)
                        removed += 1
            elif entry.name.startswith(".removed-"):
                shutil.rmtree(entry.path, ignore_errors=True)
                removed += 1
        return removed

    @contextlib.contextmanager
    def _only_writer(self, name: str) -> Iterator[None]:
        lock = os.open(self.folder / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise Busy("snapshot-being-taken", f"another process is taking {name}") from None
        finally:
            os.close(lock)

    # The working set

    def working_set(self, name: str) -> Path:
        """Where the recorded working set of a snapshot lies (checkpoint/pages): in its folder, so that it travels and goes with it.

        Outside what the manifest's digests cover: it is learned later, and names pages without holding any.
        """
        return self.path(name) / "working-set"

    # Failures and quarantine

    def _health_file(self, name: str) -> Path:
        return self.folder / f".{name}.health"

    def health(self, name: str) -> Health:
        """How restores of a snapshot went here; a fresh record where there is none or it is damaged."""
        try:
            return msgspec.json.decode(self._health_file(name).read_bytes(), type=ready(Health))
        except (OSError, msgspec.MsgspecError):
            return Health()

    def failed(self, name: str, reason: str) -> Health:
        """Count a failed restore; the record after it, which is not kept where the disk is full or read-only."""
        health = self.health(name)
        health.failures += 1
        health.reason, health.at = reason, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file = self._health_file(name)
        with contextlib.suppress(OSError), aside(file) as new:
            new.touch(0o600)
            new.write_bytes(msgspec.json.encode(health))
        return health

    def succeeded(self, name: str) -> None:
        """Forget earlier failures."""
        with contextlib.suppress(OSError):  # a read-only disk says so even where there is none
            self._health_file(name).unlink(missing_ok=True)


def _touched(folder: Path) -> float:
    """When anything below a folder was last written, in seconds since the epoch."""
    return max(path.lstat().st_mtime for path in (folder, *folder.glob("*"), *folder.glob("images/*")))
