"""Wait until the files of a hub model that an engine read through its mount are verified.

A large file is served while it arrives, and hashed when it is complete. A snapshot and a digest that is kept must not be made of
bytes that the hub did not give.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.errors import Incompatible
from plugin.model.hub_mount import mounted_manifest

if TYPE_CHECKING:
    from lazyfs.api import MountHandle

_PAUSE_S = 0.2


class HubFiles:
    """The files below one mount, from this object's construction on."""

    def __init__(self, mountpoint: Path) -> None:
        self._mountpoint = mountpoint
        self._handle = self._find()

    @classmethod
    def of(cls, path: Path, home: Path) -> HubFiles | None:
        """Return the files of a model whose path is the mount of a source; None for any other model."""
        return cls(path.absolute()) if mounted_manifest(path, home) else None

    def _find(self) -> MountHandle | None:
        from lazyfs.api import find_mount

        return find_mount(self._mountpoint)

    def verified(self) -> bool:
        """Return whether every file is verified now, and none was found wrong."""
        try:
            return not self._unverified(complete=False)
        except Incompatible:
            return False

    def wait(self, limit_s: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait up to `limit_s` seconds until every file is verified; fetches what is absent.

        Raises Incompatible: hub-file-wrong if a file was not what the hub says, even if it is by now, since the engine may have
        read it before; hub-unverified if that is not known in time, or `stop` returned True.
        """
        deadline = time.monotonic() + limit_s
        left = self._unverified(complete=True)
        while left:
            if time.monotonic() > deadline or stop():
                raise Incompatible(
                    "hub-unverified",
                    f"{left[0]} of {self._mountpoint} and {len(left) - 1} more files are not complete and verified by the hub's "
                    f"digests within {limit_s:.0f} s; the next start takes the snapshot, if the cache has room for the model",
                )
            time.sleep(_PAUSE_S)
            left = self._unverified(complete=False)

    def _unverified(self, *, complete: bool) -> list[str]:
        from lazyfs.errors import LazyfsError

        # A daemon on a busy host may not have answered at first.
        handle = self._handle = self._handle or self._find()
        try:
            answer = handle.control("verified", complete=complete) if handle else {}
        except LazyfsError as error:
            raise Incompatible("hub-unverified", f"{self._mountpoint}: {error.code}: {error}; start again") from error
        if handle is None or answer["pid"] != handle.pid:
            raise Incompatible(
                "hub-unverified",
                f"the daemon of {self._mountpoint} ended or does not answer, so it is not known if what was read through it is "
                "what the hub has; start again",
            )
        if answer["wrong"]:
            raise Incompatible(
                "hub-file-wrong",
                f"{', '.join(answer['wrong'])} of {self._mountpoint} was not what the hub says, and the engine may have read it; "
                "restart the launch",
            )
        return list(answer["unverified"])
