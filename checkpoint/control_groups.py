"""The control groups of this process (cgroups(7)), of version 1 and 2, where they are mounted here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from lazyfs.mount.kernel import mount_table

PROC = Path("/proc")


@dataclass(frozen=True)
class Group:
    """One control group of this process.

    `top` is the highest group that is mounted here; in a container, often the container's own. `own` is False if this process's
    group is not mounted; `folder` is `top` then.
    """

    folder: Path
    top: Path
    version: int = 2
    own: bool = True

    def and_above(self) -> Iterator[Path]:
        """Yield the folder of this group, then those of the groups above it."""
        for one in (self.folder, *self.folder.parents):
            yield one
            if one == self.top:
                return


def groups(controller: str = "", proc: Path = PROC) -> Iterator[Group]:
    """Yield this process's group of version 1 for a controller, if there is one, and its group of version 2.

    Raises OSError, or ValueError, if /proc does not say.
    """
    mounts = list(mount_table(proc / "self" / "mountinfo"))
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, text = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        path, version = PurePath(text), 1 if controllers else 2
        found = []
        for mount in mounts:
            if mount.fstype != ("cgroup" if controllers else "cgroup2"):
                continue
            if controllers and controller not in mount.options.split(","):
                continue
            top = Path(mount.mountpoint)
            # A path with `..` is outside this process's cgroup namespace.
            inside = ".." not in path.parts and path.is_relative_to(mount.root)
            folder = top / path.relative_to(mount.root) if inside else top
            own = inside and folder.is_dir()
            found.append(Group(folder if own else top, top, version, own))
        yield from sorted(found, key=lambda one: not one.own)[:1]
