"""The mark of a rehearsed snapshot: it was restored once before anybody needed it, and answered as recorded.

The mark is a file in the snapshot's folder, which `push` and `pull` carry. It names the manifest that it is of. The
manifest's digests do not cover it: it is written later, and only says that the working set is worth sending.
`lock` keeps two launches from rehearsing the same snapshot at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from checkpoint import disk
from checkpoint.errors import Busy, Failed, NotFound
from checkpoint.files import write_private
from checkpoint.snapshot import file_backed, manifest
from checkpoint.snapshot.manifest import Snapshot
from lazyfs.content.records import ready

FILE_NAME = "rehearsed"
PUSHED = ".pushed"


class Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Record of a rehearsal: the digest of the snapshot's manifest, when (UTC), what was asked, and for how long (seconds)."""

    snapshot: str
    at: str
    requests: list[str]
    took_s: float


def read(folder: Path, snapshot: Snapshot) -> Mark | None:
    """Return the mark of a snapshot, or None if it has none of its own."""
    try:
        found = msgspec.json.decode((folder / FILE_NAME).read_bytes(), type=ready(Mark))
    except (OSError, msgspec.MsgspecError):
        return None
    return found if found.snapshot == snapshot.digest else None


def write(folder: Path, mark: Mark) -> None:
    """Write the mark. Raises OSError."""
    write_private(folder / FILE_NAME, msgspec.json.encode(mark))


def note_pushed(folder: Path, store: str) -> None:
    """Note, on this host, that a store has the snapshot with its present mark. Raises OSError."""
    write_private(folder / PUSHED, _pushed(folder, store))


def pushed(folder: Path, store: str) -> bool:
    """Return whether this host has noted that a store has the snapshot with its present mark."""
    try:
        return (folder / PUSHED).read_bytes() == _pushed(folder, store)
    except OSError:
        return False


def _pushed(folder: Path, store: str) -> bytes:
    return msgspec.json.encode({"store": store, "mark": (folder / FILE_NAME).read_bytes().decode()})


def prepared_here(folder: Path, snapshot: Snapshot) -> bool:
    """Return whether this host has what a rehearsal leaves beside the images: plans of the working set, made of these images.

    A pulled snapshot brings its working set, but not them. A snapshot with GPU state has none.
    """
    if snapshot.gpu.processes:
        return True
    from checkpoint.lazy_pages.cache import PLANS

    return any((beside / PLANS).exists() for beside in (folder, folder / file_backed.FOLDER))


def prepare(folder: Path, snapshot: Snapshot) -> None:
    """Make on this host what a rehearsal on another one did not send: file-backed images, and plans of the working set.

    Does nothing where they are there, or no working set is. Takes about a second. Raises Busy, and Failed
    (disk-full, preparation-failed).
    """
    known = folder / "working-set"
    if snapshot.gpu.processes or not known.exists() or prepared_here(folder, snapshot):
        return
    from checkpoint.criu.pagemap import BadImage
    from checkpoint.lazy_pages.copier import Planner
    from checkpoint.lazy_pages.working_set import BadWorkingSet

    if not file_backed.exist(folder):
        file_backed.make(folder, snapshot.weight_areas)
    images = file_backed.find(folder) or folder / "images"
    with disk.required(f"{folder.name} is not prepared", "preparation-failed"):
        try:
            Planner(str(images.resolve()), None).prepare(str(known))
        except (BadImage, BadWorkingSet) as error:
            raise Failed("preparation-failed", f"{folder.name}: {error}; its first restore makes them") from error


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the right to rehearse a snapshot. Raises Busy (rehearsal-running) if another process has it, NotFound."""
    try:
        fd = os.open(folder / manifest.FILE_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(
            "snapshot-not-found", f"there is no snapshot {folder.name!r}; see: quickthaw snapshot ls"
        ) from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("rehearsal-running", f"another process rehearses {folder.name}; try again in a moment") from None
        yield
    finally:
        os.close(fd)
