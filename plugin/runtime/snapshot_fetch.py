"""A replica's snapshot out of a store: found, fetched while the replica is restored from it, and given up where it cannot be trusted.

The fetching itself is checkpoint.store.remote_restore's; here is when to begin, whom to wait for, and what becomes of the replica when it
fails.
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
    from checkpoint.store.remote_restore import Remote
    from plugin.runtime.config import LaunchSettings

log = logging.getLogger("quickthaw")
OTHER_FETCHER_LIMIT_S = 600.0
"""How long to wait for another process of this host that fetches the same snapshot."""
_POLL_S = 0.1


class Fetching:
    """What one replica fetches, if anything. Replicas of one launch share the fetching itself."""

    def __init__(self, settings: LaunchSettings) -> None:
        self.settings = settings
        self.remote: Remote | None = None
        self._works = True

    def find(self, name: str, accept: Callable[[Snapshot], object]) -> Library | None:
        """Begin to fetch the snapshot `name` from the store that the settings name; a library that has it.

        `accept` is given its manifest and raises where it may not be restored here. None: the store has none, or cannot be asked (why is
        said). With `strict`, or where the user named the snapshot, what is wrong is raised instead.
        """
        if self.settings.snapshot_store is None or not self._works:
            return None
        try:
            return self._find(self.settings.snapshot_store, name, accept)
        except CheckpointError as error:
            self._works = False
            if self.settings.strict or self.settings.named:
                raise
            log.warning("no snapshot from %s: %s", _shown(self.settings.snapshot_store), error)
            return None

    def _find(self, store: str, name: str, accept: Callable[[Snapshot], object]) -> Library | None:
        from checkpoint.store.remote_restore import ArrivingLibrary

        library = Library(self.settings.home)
        limit = time.monotonic() + OTHER_FETCHER_LIMIT_S
        waited = False
        while True:
            try:
                remote = _open(library, store, name, accept, self.settings.trust_keys)
                if library.has(name):
                    return library  # another process has finished it
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
        if remote.whole:
            log.info("all of it before the restore: %s", remote.whole)
        self.remote = remote
        return ArrivingLibrary(library.home, remote)

    @contextlib.contextmanager
    def held(self, library: Library, name: str) -> Iterator[None]:
        """Keep the snapshot from being replaced between the reading of its manifest and of its images; the fetching keeps one that is
        still to come. Raises NotFound, Busy, and Failed where the disk refuses."""
        with disk.required(f"{name} is not restored", "restore-failed"), contextlib.ExitStack() as stack:
            if not self.unfinished:
                stack.enter_context(library.in_use(name))
            yield

    def ready(self, lazy: bool, snapshot: Snapshot) -> bool:
        """Wait until a restore may begin; True when what it reads was verified as it came. Raises what ended the fetching."""
        remote = self.remote
        if remote is None or remote.complete.is_set():
            return False
        if not lazy or remote.whole or snapshot.gpu.processes:
            remote.wait_complete()
            return False
        remote.wait_start()
        return True

    @property
    def arriving(self) -> Remote | None:
        """What a page server waits for, while something is still to come."""
        return None if self.remote is None or self.remote.complete.is_set() or self.remote.whole else self.remote

    def watch(self, lost: Callable[[str], None]) -> None:
        """Call `lost(reason)` when pages that are missing will not come."""
        if self.remote is not None and not self.remote.complete.is_set():
            self.remote.on_failure(lost)

    def first_token(self) -> None:
        """The first token was seen: what remains may be fetched."""
        if self.remote is not None:
            self.remote.first_token()
            log.debug("remote at the first token: %s", self.figures())

    @property
    def unfinished(self) -> bool:
        """Whether something is still to come."""
        return self.remote is not None and not self.remote.complete.is_set() and self.remote.failure is None

    def outage(self) -> bool:
        """Whether the store, or the way to it, failed: that speaks against no snapshot."""
        return self.remote is not None and isinstance(self.remote.failure, Failed)

    def give_up(self) -> None:
        """The replica goes on without; what has come is of use to nobody who starts cold and takes a snapshot himself."""
        self._works = False
        self.close(keep=self.settings.named)

    def close(self, keep: bool = True) -> None:
        """Stop fetching; `keep` what has come for another attempt, unless it is what failed."""
        remote, self.remote = self.remote, None
        if remote is not None and not remote.complete.is_set():
            wrong = isinstance(remote.failure, Integrity) or getattr(remote.failure, "code", "") == "disk-full"
            remote.close(discard=wrong or not keep)

    def figures(self) -> dict[str, float]:
        """Bytes that came over the link (and by the first token), and seconds since the fetching began."""
        remote = self.remote
        if remote is None or remote.arrival is None:
            return {}
        return {
            "moved": float(remote.arrival.moved),
            "fetched": float(remote.arrival.fetched),
            "moved_at_first_token": float(remote.moved_at_first_token),
            **remote.spans,
        }


def _open(
    library: Library, store: str, name: str, accept: Callable[[Snapshot], object], trust_keys: Sequence[Path]
) -> Remote:
    from checkpoint.snapshot import manifest
    from checkpoint.store.remote_restore import Remote

    def judge(document: bytes, _: bytes | None) -> None:
        accept(manifest.parse(document, library.path(name), name))

    return Remote.open(library, store, name, judge, trust_keys)


def manifest_of(library: Library, store: str | None, name: str, trust_keys: Sequence[Path]) -> Snapshot:
    """The manifest of a snapshot that is here, or else in the store; then fetching it begins. Raises NotFound and what else speaks
    against it."""
    if store is None or library.has(name):
        return library.load(name)
    remote = _open(library, store, name, lambda _: None, trust_keys)
    with contextlib.suppress(Busy):  # another process is at it; the replica waits for that one
        remote.begin()  # what is asked for by name is wanted, and the launcher has yet to be set up
    return remote.snapshot


def _shown(store: str) -> str:
    """The store's URL without a password."""
    from lazyfs.stores.urls import shown_url

    return shown_url(store)
