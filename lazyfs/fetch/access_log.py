"""The access log of a manifest: the order in which its chunks were first touched, which later mounts read ahead.

One JSON file per manifest. A later mount appends only chunks that no earlier mount touched; the recorded order stays,
because a replay distorts what a second recording would see. Times are seconds since the mount began.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

from lazyfs.errors import LazyfsError
from lazyfs.paths import private_dir, write_atomic

log = logging.getLogger("lazyfs.fetch.access_log")
_FORMAT = 1


def parse(data: bytes) -> list[tuple[int, int]]:
    """Parse the (file index, chunk index) touches of an access log.

    Raises ValueError if it is malformed.
    """
    try:
        document = json.loads(data)
        if document["format"] != _FORMAT:
            return []
        return [(int(f), int(c)) for f, c, _ in document["touches"] if f >= 0 and c >= 0]
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not an access log: {error}") from error


def shared_key(manifest: str) -> str:
    """Return the object key under which a manifest's access log is shared with other hosts."""
    return f"traces/{manifest}"


class AccessLog:
    """Access log of one manifest.

    `known` is the recorded order as (file index, chunk index). `record`: "auto" records chunks not known yet, "always"
    starts a new one, "never" records nothing.
    """

    def __init__(self, path: Path, record: str = "auto") -> None:
        self.path = path
        self.known: list[tuple[int, int]] = [] if record == "always" else self.load()
        self.recording = record != "never"
        self._events: list[tuple[int, int, float]] = [(f, c, 0.0) for f, c in self.known]
        self._seen = set(self.known)
        self._saved = self._shared = len(self._events)
        self._start = time.monotonic()
        self._lock = threading.Lock()

    def load(self) -> list[tuple[int, int]]:
        """Read the touches from the file; empty if it is missing or damaged."""
        try:
            return parse(self.path.read_bytes())
        except FileNotFoundError:
            return []
        except ValueError as error:
            log.warning("ignoring the access log %s: %s", self.path, error)
            return []

    def touch(self, file: int, chunk: int) -> None:
        """Record a touch if no mount has touched the chunk before."""
        if self.recording and (file, chunk) not in self._seen:
            with self._lock:
                self._seen.add((file, chunk))
                self._events.append((file, chunk, round(time.monotonic() - self._start, 4)))

    def settled(self, quiet_s: float) -> bool:
        """Return whether a saved recording has been quiet for `quiet_s` since it was last shared.

        True once per recording.
        """
        with self._lock:
            if not self.recording or len(self._events) == self._shared or self._saved != len(self._events):
                return False
            if time.monotonic() - self._start - self._events[-1][2] < quiet_s:
                return False
            self._shared = len(self._events)
            return True

    def save(self) -> bool:
        """Write touches recorded since the last save. Return whether any were written."""
        with self._lock:
            if not self.recording or len(self._events) == self._saved:
                return False
            events = list(self._events)
            self._saved = len(events)
        try:
            private_dir(self.path.parent)
            write_atomic(self.path, json.dumps({"format": _FORMAT, "touches": events}).encode(), sync=False)
        except LazyfsError as error:
            log.warning("cannot save the access log: %s", error)
            return False
        return True
