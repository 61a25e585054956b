"""Claim the making of one snapshot in a store that many launches use: those that start cold meanwhile leave it to the one that claimed it.

A claim saves work and protects nothing. Two makers push two good snapshots, of which the last one stays; so whatever is wrong
with the store, a launch takes its snapshot as it would without claims. It is one small object, made by the store in one
step, renewed while its holder lives, and removed once the snapshot is pushed. One that was not renewed for EXPIRES_S
(its holder has ended) is taken over, also by a launch whose engine loads meanwhile. The time is that of the hosts; clocks
that differ by more cost the same: a second maker.

Everything is done in a thread: no start waits for a store.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from lazyfs.content.records import ready

if TYPE_CHECKING:
    from lazyfs.stores.base import Store

log = logging.getLogger("quickthaw")
PREFIX = "claims/snapshots/"
EXPIRES_S, RENEW_S, POLL_S = 30.0, 8.0, 2.0
MOST_S = 3600.0
"""How long one launch may hold a claim: its rehearsal may never get the processor."""


class _Held(msgspec.Struct, frozen=True):
    """The object: who holds the claim, and when it was renewed last (seconds since the epoch)."""

    host: str
    token: str
    renewed: float


class Claim:
    """A claim on a snapshot in the store at `url`, begun at once in the background.

    `name`: that of the snapshot, and of the class of host that makes it (checkpoint.store.variants.reference): those of another class
    need their own.
    """

    def __init__(self, url: str, name: str) -> None:
        self._url, self._name = url, name
        self._key = PREFIX + name.replace(":", "@")
        self._token = os.urandom(8).hex()
        self._known, self._released = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._other, self._decided = "", False
        self._until: Callable[[], bool] = lambda: False
        threading.Thread(target=self._run, name="snapshot-claim", daemon=True).start()

    def holder(self, limit_s: float) -> str:
        """Return the host that makes the snapshot; "" if it is this launch, or not known within `limit_s` seconds.

        The answer stays: a launch that leaves the snapshot to another one claims it no more.
        """
        self._known.wait(limit_s)
        with self._lock:
            self._decided = True
            return self._other

    def hold(self, until: Callable[[], bool]) -> None:
        """Keep the claim until `until()`, which is asked every POLL_S seconds in the claim's thread, or `release`."""
        self._until = until

    def release(self) -> None:
        """Give the claim up. The object is removed in the background."""
        self._released.set()

    def _run(self) -> None:
        from checkpoint.errors import CheckpointError
        from checkpoint.store.archive import open_chunks
        from lazyfs.errors import LazyfsError

        try:
            store = open_chunks(self._url).store
            while not (ours := self._acquire(store)):
                self._known.set()
                # Asked after the wait, too: a claim for a moment would keep another launch from its snapshot.
                if self._decided or self._released.wait(POLL_S) or self._decided:
                    return
        except (LazyfsError, CheckpointError, OSError) as error:
            log.info(
                "snapshot %s: several launches may take it at the same time: no claim in the store (%s)",
                self._name,
                error,
            )
            return
        finally:
            self._known.set()
        if ours:
            with contextlib.suppress(LazyfsError, OSError):  # it expires
                self._keep(store)

    def _acquire(self, store: Store) -> bool:
        """Return whether the claim is this launch's; else `_other` says whose."""
        found = self._read(store)
        # Also one of a clock that runs ahead: nobody could wait for its end.
        if found is not None and abs(time.time() - found.renewed) >= EXPIRES_S:
            log.info("snapshot %s: %s claimed it and was not heard of for %.0f s", self._name, found.host, EXPIRES_S)
            store.delete(self._key)
            found = None
        created = found is None and store.create(self._key, self._document())
        if not created:
            found = found or self._read(store)
        # A request whose answer was lost is sent again, and finds its own object.
        if created or (found is not None and found.token == self._token):
            with self._lock:
                if not self._decided:
                    self._other = ""
                    return True
            store.delete(self._key)
            return False
        with self._lock:
            if not self._decided:
                self._other = found.host if found else "another launch"
        return False

    def _keep(self, store: Store) -> None:
        """Renew the claim until it is given up, also after a store's failures, unless another launch took it over meanwhile."""
        from lazyfs.errors import LazyfsError

        began = renewed = time.monotonic()
        while not self._released.wait(POLL_S):
            now = time.monotonic()
            if self._until() or now - began > MOST_S:
                break
            if now - renewed < RENEW_S:
                continue
            try:
                if (
                    now - renewed >= EXPIRES_S
                    and (found := self._read(store)) is not None
                    and found.token != self._token
                ):
                    log.info("snapshot %s: %s took over the claim of this launch", self._name, found.host)
                    return
                store.put(self._key, self._document())
                renewed = time.monotonic()
            except (LazyfsError, OSError) as error:
                log.debug("snapshot %s: the claim was not renewed: %s", self._name, error)
        found = self._read(store)
        if found is not None and found.token == self._token:
            store.delete(self._key)

    def _read(self, store: Store) -> _Held | None:
        """Return the object, None if there is none. One that cannot be read is expired."""
        from lazyfs.errors import NotFound

        try:
            found = msgspec.json.decode(bytes(store.get(self._key, limit=4096)), type=ready(_Held))
            return msgspec.structs.replace(found, host=ascii(found.host[:100])[1:-1])  # it is shown in the log
        except NotFound:
            return None
        except msgspec.MsgspecError:
            return _Held("another launch", "", 0.0)

    def _document(self) -> bytes:
        return msgspec.json.encode(_Held(socket.gethostname(), self._token, time.time()))
