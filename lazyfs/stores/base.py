"""The one small interface of every store: objects under keys, read by range.

An implementation is safe to call from many threads, verifies nothing (digests are the caller's business), retries
nothing (`lazyfs.stores.retry` does), and raises only the kinds in `lazyfs.errors`. Every call has a limit of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from lazyfs.errors import Permanent

# No object of ours is larger; what a store sends beyond it is not taken into memory.
MOST_BYTES = 64 << 20


def too_large(what: str, limit: int) -> Permanent:
    """The error of a body that is longer than whoever asked for it takes."""
    return Permanent(
        f"{what} is larger than the {limit} bytes that it can have; is that the right store?", code="too-large"
    )


@dataclass(frozen=True)
class ObjectInfo:
    """`size` in bytes, `modified` in seconds since the epoch, `version` an opaque validator (etag, or stat fields)."""

    key: str
    size: int
    modified: float
    version: str = ""


class Store(Protocol):
    """Objects under slash-separated keys."""

    url: str
    # Whether another machine may be behind it: decides compression, tracing and prefetching.
    remote: bool

    def get(
        self,
        key: str,
        start: int = 0,
        length: int | None = None,
        version: str = "",
        into: memoryview | None = None,
    ) -> bytes | memoryview:
        """Bytes from `start`; fewer than `length` only at the object's end. NotFound when there is no such object.

        No more is taken into memory than `length`, or MOST_BYTES without one: Permanent("too-large").

        With `version` (of an ObjectInfo), Permanent("source-changed") unless the object still has it. `into`: memory that
        the implementation may read into, and then return a view of: fresh memory for every 8 MiB costs more than the copy.
        """

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write the whole object, atomically: no reader ever sees a part of it."""

    def head(self, key: str) -> ObjectInfo | None:
        """Size and age, or None when it is not there."""

    def touch(self, key: str) -> None:
        """Make the object young again, so that a garbage collection with a grace period spares it."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key begins with `prefix` (a folder, ending in "/", or "")."""

    def delete(self, key: str) -> None:
        """Remove it; no error when it is gone already."""

    def flush(self) -> None:
        """Return once everything put so far would survive a power cut."""
