"""The interface of every store: objects under keys, read by range.

An implementation is safe to call from many threads, verifies nothing (callers check digests), does not retry
(`lazyfs.stores.retry` does), and raises only the errors of `lazyfs.errors`. Every call has its own time limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from lazyfs.errors import Permanent

# Largest object that lazyfs writes. A store may not send more than this into memory, nor more than a caller's own limit.
MOST_BYTES = 64 << 20


def too_large(what: str, limit: int) -> Permanent:
    """Return the Permanent (too-large) error for a body longer than the limit."""
    return Permanent(f"{what} is larger than the maximum of {limit} bytes; check the store URL", code="too-large")


@dataclass(frozen=True)
class ObjectInfo:
    """Metadata of an object.

    `size` in bytes, `modified` in seconds since the epoch, `version` an opaque validator (etag, or stat fields).
    """

    key: str
    size: int
    modified: float
    version: str = ""


class Store(Protocol):
    """Objects under slash-separated keys."""

    url: str
    # Whether another machine may serve it: decides compression, access logs and prefetching.
    remote: bool

    def get(
        self,
        key: str,
        start: int = 0,
        length: int | None = None,
        version: str = "",
        into: memoryview | None = None,
        *,
        limit: int = MOST_BYTES,
    ) -> bytes | memoryview:
        """Read bytes from `start`; fewer than `length` only at the object's end.

        `version` (of an ObjectInfo): raise Permanent (source-changed) unless the object still has it. `into`: memory that
        the implementation may read into and return a view of; allocating fresh memory for every 8 MiB costs more than the
        copy. `limit`: the largest whole body to accept. Raises NotFound, or Permanent (too-large) for a body of more than
        `length` bytes (`limit` if None).
        """

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write the whole object atomically: no reader sees a part of it."""

    def create(self, key: str, data: bytes) -> bool:
        """Write the whole object atomically unless it exists; return whether it was written: one of several writers at once writes it."""

    def head(self, key: str) -> ObjectInfo | None:
        """Return size, age and version, or None if the object does not exist."""

    def touch(self, key: str) -> None:
        """Reset the object's age, so that a garbage collection with a grace period spares it."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield all objects whose key begins with `prefix` (a folder ending in "/", or "")."""

    def delete(self, key: str) -> None:
        """Remove the object; no error if it does not exist."""

    def flush(self) -> None:
        """Return once everything put so far would survive a power cut."""
