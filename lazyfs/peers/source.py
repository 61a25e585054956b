"""A source of chunks that asks peers before the store."""

from __future__ import annotations

import threading

from lazyfs.content.manifest import File
from lazyfs.fetch.chunk import StoreSource, scratch
from lazyfs.peers.client import Peers, Wanted


class PeerSource:
    """Chunks of an imported manifest: from a peer if one has it or can fetch it, else from the store."""

    def __init__(self, inner: StoreSource, peers: Peers) -> None:
        self.inner, self.peers = inner, peers
        self.store = inner.store
        self._local = threading.local()

    def fetch(self, file: File, index: int, *, fresh: bool = False) -> bytes | memoryview:
        """Return the plain bytes: verified if `checked` returns True afterwards. Raises what the store's source raises."""
        self._local.checked = False
        if not fresh:
            data = self.peers.get(Wanted.of(file, index), scratch())
            if data is not None:
                self._local.checked = True
                return data
        return self.inner.fetch(file, index, fresh=fresh)

    def close(self) -> None:
        """Close the connections to peers."""
        self.peers.close()

    def checked(self) -> bool:
        """Return whether this thread's last fetch came from a peer, and has been verified."""
        return bool(getattr(self._local, "checked", False))
