"""The manifests of a snapshot that is to come from a store, read while this process still imports what it needs.

Three round trips to a far store take as long as the imports of a command. `start` is called as one of the first things of a command whose
arguments name a snapshot and a store; `take` hands over what was read, or None: then whoever asks reads it himself, and hears what is
wrong. Nothing is believed that would not be believed without: what was read is judged where it is used. Standard library only until the
thread runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpoint.archive import Opened
    from lazyfs.chunkstore import ChunkStore

_LIMIT_S = 30.0
_STORE = "--snapshot-store"
_started: list[_Reading] = []


class _Reading(threading.Thread):
    def __init__(self, url: str, name: str) -> None:
        super().__init__(name="ahead", daemon=True)
        self.url, self.snapshot = url, name
        self.found: tuple[ChunkStore, Opened] | None = None

    def run(self) -> None:
        from checkpoint.archive import Opened, open_chunks
        from checkpoint.errors import CheckpointError
        from checkpoint.library import Library
        from checkpoint.transfer import translated
        from plugin.settings import state_home

        try:
            if Library(state_home()).has(self.snapshot):
                return
            chunks = open_chunks(self.url)
            with translated(f"cannot fetch {self.snapshot}"):
                self.found = chunks, Opened.of(self.snapshot, chunks)
        except CheckpointError:
            return  # asked for again, and said, by whoever needs it


def named(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[str, str] | None:
    """(store, snapshot) where the arguments of `quickthaw restore` name them plainly: the snapshot first, the store in an option of its own
    or in the environment."""
    if not argv or argv[0].startswith("-"):
        return None
    url = environment.get("QUICKTHAW_SNAPSHOT_STORE", "")
    for index, word in enumerate(argv):
        if word == _STORE and index + 1 < len(argv):
            url = argv[index + 1]
        elif word.startswith(_STORE + "="):
            url = word.partition("=")[2]
    return (url, argv[0]) if url else None


def start(argv: Sequence[str]) -> None:
    """Begin to read, where a store is named; nothing is read where the snapshot is here."""
    found = named(argv, os.environ)
    if found is None:
        return
    reading = _Reading(*found)
    _started.append(reading)
    reading.start()


def take(url: str, name: str) -> tuple[ChunkStore, Opened] | None:
    """What was read of this snapshot; waits for it where it is still being read."""
    while _started:
        reading = _started.pop()
        if (reading.url, reading.snapshot) == (url, name):
            reading.join(_LIMIT_S)
            return reading.found
    return None
