"""A store that injects faults on command, to test mounts, imports and restores whose store fails.

`faulty://PATH` names a JSON file that is read at every call, so faults begin and end while a mount is running:
`{"store": "file:///…", "fault": "corrupt", "share": 0.5, "seconds": 1.0, "only": "chunks/", "calls": ["get"]}`.
Without "fault" every call succeeds. "calls" lists the calls that may fail (default: get); bodies are damaged in get
only. `"once": true` spares a key that a fault has hit before. Importing this module registers the scheme with
`open_store`; processes that a test starts need `PYTHONPATH` in their environment.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazyfs.errors import NotFound, Permanent, Temporary, Usage
from lazyfs.stores import open_store
from lazyfs.stores.base import ObjectInfo, Store
from lazyfs.stores.urls import SCHEMES

SCHEMES["faulty"] = f"{__name__}:open_url"
ROOT = Path(__file__).resolve().parents[3]
PYTHONPATH = f"{ROOT}:{ROOT / 'tests' / 'programs' / 'faulty_site'}"

FAULTS = ("truncate", "corrupt", "longer", "empty", "stall", "slow", "reset", "429", "503", "forbidden", "missing")


def open_url(url: str) -> FaultyStore:
    """Return the store of a faulty:// URL."""
    return FaultyStore(Path(url.removeprefix("faulty://")))


def set_fault(control: Path, store: Path, fault: str | None = None, **values: Any) -> None:
    """Write the control file, atomically."""
    new = control.with_suffix(".new")
    new.write_text(json.dumps({"store": f"file://{store}", "fault": fault, **values}))
    new.rename(control)


class FaultyStore:
    """Delegate to the store named in the control file, failing a share of the calls whose key begins with "only"."""

    def __init__(self, control: Path, *, remote: bool = True) -> None:
        self.control = control
        self.url = f"faulty://{control}"
        self.inner: Store = open_store(str(self._settings()["store"]))
        self.remote = remote
        self.keys_hit: set[str] = set()

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(self.control.read_bytes())
        if settings.get("fault") not in (None, *FAULTS):
            raise Usage(f"unknown fault {settings['fault']!r}; known: {', '.join(FAULTS)}")
        return settings

    def get(self, key: str, *arguments: Any, **options: Any) -> bytes | memoryview:
        fault, seconds = self._hit("get", key)
        data = self.inner.get(key, *arguments, **options)
        if not fault:
            return data
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

    def _hit(self, call: str, key: str) -> tuple[str, float]:
        """Raise the fault configured for this call.

        Return (fault, seconds) if the fault concerns the body, else ("", 0.0).
        """
        settings = self._settings()
        fault = settings.get("fault")
        named = call in settings.get("calls", ["get"]) and key.startswith(settings.get("only", ""))
        if fault is None or not named or random.random() >= float(settings.get("share", 1.0)):
            return "", 0.0
        if settings.get("once") and key in self.keys_hit:
            return "", 0.0
        self.keys_hit.add(key)
        seconds = float(settings.get("seconds", 0.0))
        what = f"{self.url}: {call} {key}"
        if fault == "stall":
            # What a client with an inactivity limit gets from a silent server.
            time.sleep(seconds)
            raise Temporary(f"{what}: nothing came for {seconds:g} s")
        if fault == "reset":
            raise Temporary(f"{what}: connection reset by peer")
        if fault in ("429", "503"):
            raise Temporary(f"{what}: HTTP {fault}", code="throttled", retry_after=seconds or None)
        if fault == "forbidden":
            raise Permanent(f"{what}: HTTP 403", code="permission-denied")
        if fault == "missing":
            raise NotFound(f"{self.url} has no {key}")
        return fault, seconds

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._hit("put", key)
        self.inner.put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self._hit("create", key)
        return self.inner.create(key, data)

    def head(self, key: str) -> ObjectInfo | None:
        self._hit("head", key)
        return self.inner.head(key)

    def touch(self, key: str) -> None:
        self._hit("touch", key)
        self.inner.touch(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._hit("list", prefix)
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        self._hit("delete", key)
        self.inner.delete(key)

    def flush(self) -> None:
        self._hit("flush", "")
        self.inner.flush()
