"""What `quickthaw doctor --fix` does without asking: things of the user's own that are never needed as they are.

Each repair is independent: one that fails says so, and the next is tried.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from checkpoint.errors import CheckpointError
from plugin.runtime.home import close_to_others, exposed

_PROBE_S = 60.0
"""Age in seconds from which a probe of plugin.runtime.home is a dead process's."""


@dataclass(frozen=True)
class Repair:
    """One thing that was wrong: `remedy` is empty if it is repaired, else what somebody else must do."""

    what: str
    detail: str
    remedy: str = ""


def repair(home: Path, say: Callable[[str], None]) -> list[Repair]:
    """Repair what can be repaired, and return what was done and what failed. Empty if nothing was wrong."""
    found = [done for one in (_state_folder, _leftovers, _mounts) for done in _tried(one, home)]
    return [*found, *_criu(home, say)]


def _tried(one: Callable[[Path], Iterator[Repair]], home: Path) -> list[Repair]:
    try:
        return list(one(home))
    except OSError as error:
        return [Repair(one.__name__.strip("_").replace("_", " "), f"{home}: {error.strerror or error}", f"see {home}")]


def _state_folder(home: Path) -> Iterator[Repair]:
    """Close the state folder to other users: snapshots hold memory of engines."""
    if exposed(home) is None:
        return
    found = home.stat()
    if close_to_others(home):
        yield Repair("state folder", f"{home}: mode {found.st_mode & 0o777:o} is now 700")
        return
    yield Repair(
        "state folder",
        f"{home} is open to other users, and a volume, another user's, or a folder with other files",
        f"if nobody else needs it: chmod 700 {home}",
    )


def _leftovers(home: Path) -> Iterator[Repair]:
    """Remove what killed launches, dumps, restores and setups left. Whatever a living process uses is locked, and stays."""
    from checkpoint.snapshot.library import Library
    from plugin.setup import criu

    if not home.is_dir():
        return
    folders = Library(home).sweep() + criu.remove_leftovers(home)
    for probe in (home / "run").glob(".room-*"):
        with suppress(FileNotFoundError):
            if time.time() - probe.stat().st_mtime > _PROBE_S:
                shutil.rmtree(probe)
                folders += 1
    if folders:
        yield Repair("leftovers", f"removed {folders} folders of killed processes")


def _mounts(home: Path) -> Iterator[Repair]:
    """Unmount lazy mounts whose daemon was killed: every access to them fails."""
    from lazyfs.admin.dead_mounts import recorded_mount_points, remove_dead
    from lazyfs.errors import LazyfsError

    if not (home / "mounts").is_dir():
        return
    for where in recorded_mount_points():
        try:
            if remove_dead(where):
                yield Repair("mounts", f"unmounted {where}, whose daemon was killed")
        except LazyfsError as error:
            yield Repair("mounts", f"{error.code}: {error}", f"umount {where} as root")


def _criu(home: Path, say: Callable[[str], None]) -> Iterator[Repair]:
    """Install CRIU where there is none that works."""
    from checkpoint.criu.binary import Criu
    from plugin.setup.criu import install

    with suppress(CheckpointError):
        Criu.find(home)
        return
    try:
        done = install(home, say)
    except CheckpointError as error:
        what, _, remedy = str(error).partition("; ")
        yield Repair("criu", what, remedy or "see docs/install.md")
        return
    if done.new:
        yield Repair("criu", f"{done.criu.version} installed in {done.criu.program.parent} ({done.origin})")
