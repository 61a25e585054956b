"""A wrapper that makes any store misbehave on command: for fault drills and for the project's own tests.

`faulty://PATH` names a JSON file, read anew at every call, so faults begin and end while a mount is running:
`{"store": "file:///…", "fault": "corrupt", "share": 0.5, "seconds": 1.0, "only": "chunks/"}`. Without "fault"
everything passes.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazyfs.errors import NotFound, Permanent, Temporary, Usage
from lazyfs.stores.base import ObjectInfo, Store

FAULTS = ("truncate", "corrupt", "longer", "empty", "stall", "slow", "reset", "429", "503", "forbidden", "missing")


def open_url(url: str) -> FaultyStore:
    """The store of a faulty:// URL."""
    return FaultyStore(Path(url.removeprefix("faulty://")))


class FaultyStore:
    """Delegates to the store named in the control file, spoiling a share of the reads whose key begins with "only"."""

    def __init__(self, control: Path, *, remote: bool = True) -> None:
        from lazyfs.stores import open_store

        self.control = control
        self.url = f"faulty://{control}"
        self.inner: Store = open_store(str(self._settings()["store"]))
        self.remote = remote

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(self.control.read_bytes())
        if settings.get("fault") not in (None, *FAULTS):
            raise Usage(f"unknown fault {settings['fault']!r}; known: {', '.join(FAULTS)}")
        return settings

    def get(
        self,
        key: str,
        start: int = 0,
        length: int | None = None,
        version: str = "",
        into: memoryview | None = None,
    ) -> bytes | memoryview:
        settings = self._settings()
        fault = settings.get("fault")
        hit = fault is not None and key.startswith(settings.get("only", ""))
        if not hit or random.random() >= float(settings.get("share", 1.0)):
            return self.inner.get(key, start, length, version)
        seconds = float(settings.get("seconds", 0.0))
        if fault == "stall":
            # What a client with an inactivity limit sees of a server that goes silent.
            time.sleep(seconds)
            raise Temporary(f"{self.url}: get {key}: nothing came for {seconds:g} s")
        if fault == "reset":
            raise Temporary(f"{self.url}: get {key}: connection reset by peer")
        if fault in ("429", "503"):
            raise Temporary(f"{self.url}: get {key}: HTTP {fault}", code="throttled", retry_after=seconds or None)
        if fault == "forbidden":
            raise Permanent(f"{self.url}: get {key}: HTTP 403", code="permission-denied")
        if fault == "missing":
            raise NotFound(f"{self.url} has no {key}")
        data = self.inner.get(key, start, length, version)
        if fault == "slow":
            time.sleep(seconds)
            return data
        if fault == "truncate":
            return data[: len(data) // 2]
        if fault == "longer":
            return bytes(data) + b"\0"
        if fault == "empty":
            return b""
        spoiled = bytearray(data)
        if spoiled:
            spoiled[random.randrange(len(spoiled))] ^= 1 << random.randrange(8)
        return bytes(spoiled)

    def put(self, key: str, data: bytes | memoryview) -> None:
        self.inner.put(key, data)

    def head(self, key: str) -> ObjectInfo | None:
        return self.inner.head(key)

    def touch(self, key: str) -> None:
        self.inner.touch(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def flush(self) -> None:
        self.inner.flush()
