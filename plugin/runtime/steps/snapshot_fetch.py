"""Fetch a replica's snapshot from a store: find it, stream it during the restore, abandon it if it cannot be trusted.

checkpoint.store.remote_restore does the transfer. This module decides when to start, which other process to wait for,
and what happens to the replica when the transfer fails.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint import disk
from checkpoint.errors import Busy, CheckpointError, Failed, Integrity, NotFound
from checkpoint.snapshot.library import Library

if TYPE_CHECKING:
    from checkpoint.snapshot.manifest import Snapshot
    from checkpoint.store.remote_restore import RemoteSnapshot
    from plugin.runtime.config import LaunchSettings

log = logging.getLogger("quickthaw")
OTHER_FETCHER_LIMIT_S = 600.0
"""Maximum seconds to wait for another process on this host that fetches the same snapshot."""
_POLL_S = 0.1


class Fetching:
    """The download of one replica's snapshot, if any. Replicas of one launch share the transfer itself."""

    def __init__(self, settings: LaunchSettings) -> None:
        self.settings = settings
        self.remote: RemoteSnapshot | None = None
        self._works = True

    def find(self, name: str, accept: Callable[[Snapshot], object], host: str = "") -> Library | None:
        """Start to fetch the snapshot `name` from the configured store and return a library that has it, or None.

        `accept` receives the manifest and raises if the snapshot may not be restored here; one of this host's class is
        preferred (checkpoint.store.variants). Returns None when the store
        lacks the snapshot, or when fetching fails (the reason is logged). With `strict`, or for a snapshot that the
        user named, the error is raised instead.
        """
        if self.settings.snapshot_store is None or not self._works:
            return None
        try:
            return self._find(self.settings.snapshot_store, name, accept, host)
        except CheckpointError as error:
            self._works = False
            if self.settings.strict or self.settings.named:
                raise
            log.warning("no snapshot from %s: %s", _shown(self.settings.snapshot_store), error)
            return None

    def _find(self, store: str, name: str, accept: Callable[[Snapshot], object], host: str) -> Library | None:
        from checkpoint.store.remote_restore import DownloadingLibrary

        library = Library(self.settings.home)
        limit = time.monotonic() + OTHER_FETCHER_LIMIT_S
        waited = False
        while True:
            try:
                remote = _open(library, store, name, accept, self.settings.trust_keys, host)
                if library.has(name):
                    return library  # another process has finished the download
                remote.begin()
                break
            except NotFound as error:
                if self.settings.named or not error.code.startswith("archive-"):
                    raise
                log.info("%s has no snapshot %s", _shown(store), name)
                return None
            except Busy:
                if time.monotonic() > limit:
                    raise
                if not waited:
                    log.info("another process is fetching %s; waiting for it", name)
                waited = True
                time.sleep(_POLL_S)
        log.info("fetching snapshot %s from %s", name, _shown(store))
        if remote.complete_first:
            log.info("fetching all of it before the restore: %s", remote.complete_first)
        self.remote = remote
        return DownloadingLibrary(library.home, remote)

    @contextlib.contextmanager
    def held(self, library: Library, name: str) -> Iterator[None]:
        """Lock the snapshot against replacement between reading its manifest and reading its images.

        An unfinished download already holds that lock. Raises NotFound, Busy, and Failed (restore-failed) on a disk
        error.
        """
        with disk.required(f"{name} is not restored", "restore-failed"), contextlib.ExitStack() as stack:
            if not self.unfinished:
                stack.enter_context(library.in_use(name))
            yield

    def ready(self, lazy: bool, snapshot: Snapshot) -> bool:
        """Wait until a restore may begin. Return True when its input was verified during the download. Raises the download's error."""
        remote = self.remote
        if remote is None or remote.complete.is_set():
            return False
        if not lazy or remote.complete_first or snapshot.gpu.processes:
            remote.wait_complete()
            return False
        remote.wait_startup()
        return True

    @property
    def downloading(self) -> RemoteSnapshot | None:
        """Return the download that a page server must wait on, or None when everything is here."""
        return (
            None if self.remote is None or self.remote.complete.is_set() or self.remote.complete_first else self.remote
        )

    def watch(self, lost: Callable[[str], None]) -> None:
        """Call `lost(reason)` if missing pages will never arrive."""
        if self.remote is not None and not self.remote.complete.is_set():
            self.remote.on_failure(lost)

    def first_token(self) -> None:
        """Start the background download, which waits for the first token."""
        if self.remote is not None:
            self.remote.first_token()
            log.debug("remote at the first token: %s", self.figures())

    @property
    def unfinished(self) -> bool:
        """Return True while the download is running."""
        return self.remote is not None and not self.remote.complete.is_set() and self.remote.failure is None

    def outage(self) -> bool:
        """Return True if the store or the link failed, which is not the snapshot's fault."""
        return self.remote is not None and isinstance(self.remote.failure, Failed)

    def give_up(self) -> None:
        """Abandon fetching for this replica.

        Keep the downloaded part only for a named snapshot: after a cold start, this host takes its own.
        """
        self._works = False
        self.close(keep=self.settings.named)

    def close(self, keep: bool = True) -> None:
        """Stop the download. Keep the downloaded part for another attempt if `keep`, unless that part is corrupt or the disk is full."""
        remote, self.remote = self.remote, None
        if remote is not None and not remote.complete.is_set():
            wrong = isinstance(remote.failure, Integrity) or getattr(remote.failure, "code", "") == "disk-full"
            remote.close(discard=wrong or not keep)

    def figures(self) -> dict[str, float]:
        """Return bytes received over the link (in all and by the first token) and time spans in seconds since the download began."""
        remote = self.remote
        if remote is None or remote.download is None:
            return {}
        return {
            "moved": float(remote.download.moved),
            "fetched": float(remote.download.fetched),
            "moved_at_first_token": float(remote.moved_at_first_token),
            **remote.spans,
        }


def _open(
    library: Library,
    store: str,
    name: str,
    accept: Callable[[Snapshot], object],
    trust_keys: Sequence[Path],
    host: str,
) -> RemoteSnapshot:
    from checkpoint.snapshot import manifest
    from checkpoint.store.remote_restore import RemoteSnapshot

    def accept_manifest(document: bytes, _: bytes | None) -> None:
        accept(manifest.parse(document, library.path(name), name))

    return RemoteSnapshot.open(library, store, name, accept_manifest, trust_keys, host)


def manifest_of(library: Library, store: str | None, name: str, trust_keys: Sequence[Path]) -> Snapshot:
    """Return the manifest of a snapshot in the library, or in the store; the latter starts its download.

    Raises NotFound, Incompatible if the store has it for other kinds of hosts only, and every other error that prevents its use.
    """
    from checkpoint.compatibility.host import host_facts
    from checkpoint.compatibility.host_class import accepts, host_class
    from checkpoint.store.remote_restore import RemoteSnapshot

    if store is None or library.has(name):
        return library.load(name)
    here = host_facts()
    remote = RemoteSnapshot.open(library, store, name, accepts(here, name), trust_keys, host_class(here))
    with contextlib.suppress(Busy):  # another process downloads it; the replica waits for that process
        remote.begin()  # the user named this snapshot; download while the launcher is set up
    return remote.snapshot


def _shown(store: str) -> str:
    """Return the store's URL without its password."""
    from lazyfs.stores.urls import shown_url

    return shown_url(store)
