"""A replica's snapshot out of a store: found, fetched while the replica is restored from it, and given up where it cannot be trusted.

The fetching itself is checkpoint.remote's; here is when to begin, whom to wait for, and what becomes of the replica when it fails.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from checkpoint.errors import Busy, CheckpointError, Integrity, NotFound
from checkpoint.library import Library

if TYPE_CHECKING:
    from checkpoint.manifest import Snapshot
    from checkpoint.remote import Remote
    from plugin.settings import LaunchSettings

log = logging.getLogger("quickthaw")
OTHER_FETCHER_LIMIT_S = 600.0
"""How long to wait for another process of this host that fetches the same snapshot."""
_POLL_S = 0.1


def find(
    settings: LaunchSettings, library: Library, name: str, accept: Callable[[Snapshot], None] = lambda _: None
) -> Remote | None:
    """Begin to fetch the snapshot `name` from the store that `settings` names.

    `accept` is given its manifest and raises where it may not be restored here. None: it is in the library (another process was fetching
    it), or the store has none. Raises what is wrong with the one that the store has, or with the store.
    """
    from checkpoint import manifest
    from checkpoint.remote import Remote

    assert settings.snapshot_store is not None
    limit = time.monotonic() + OTHER_FETCHER_LIMIT_S
    waited = False
    while True:
        if library.has(name):
            return None
        try:
            remote = Remote.open(
                library,
                settings.snapshot_store,
                name,
                lambda document, _: accept(manifest.parse(document, library.path(name), name)),
                settings.trust_keys,
            )
            remote.begin()
        except NotFound as error:
            if error.code.startswith("archive-"):
                log.info("%s has no snapshot %s", settings.snapshot_store, name)
                return None
            raise
        except Busy:
            if time.monotonic() > limit:
                raise
            if not waited:
                log.info("another process is fetching %s; waiting for it", name)
            waited = True
            time.sleep(_POLL_S)
            continue
        if remote.whole:
            log.info("fetching all of %s before its restore: %s", name, remote.whole)
        return remote


def wait_whole(remote: Remote) -> None:
    """Wait until the snapshot is complete in the library; raises what prevented it, and then nothing of use is left."""
    try:
        remote.wait_complete()
    except CheckpointError:
        give_up(remote, keep=False)
        raise


def give_up(remote: Remote, keep: bool) -> None:
    """Stop fetching; `keep` what has come for another attempt, unless it is what failed."""
    wrong = isinstance(remote.failure, Integrity) or getattr(remote.failure, "code", "") == "disk-full"
    remote.close(discard=wrong or not keep)


def describe(remote: Remote) -> dict[str, float]:
    """Figures for the log: bytes that came over the link, and seconds since the fetching began."""
    arrival = remote.arrival
    now = {"moved": float(arrival.moved), "fetched": float(arrival.fetched)} if arrival else {}
    return now | {"moved_at_first_token": float(remote.moved_at_first_token)} | remote.spans
