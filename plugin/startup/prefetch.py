"""Fetching a named snapshot from a store begins while this process still imports what it needs.

Three round trips for the manifests of a far store, and the first chunks, take longer than the imports of a command. `start` is called as
one of the first things of a command whose arguments name a snapshot and a store; whoever then opens the same snapshot
(checkpoint.store.remote_restore)
finds it open, or hears himself what is wrong. Where signatures are asked for, nothing begins before they are judged. Standard library
only until the thread runs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence

HEAD_START_S = 0.4
"""Seconds that the other imports wait, at most, for the fetching to be under way: two threads that import slow each other down, and the
others have time enough while the first bytes come."""
_STORE, _TRUST = "--snapshot-store", "--trust-key"


def named(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[str, str] | None:
    """(store, snapshot) where the arguments of `quickthaw restore` name them plainly: the snapshot first, the store in an option of its own
    or in the environment. None where nothing may begin yet."""
    if not argv or argv[0].startswith("-") or "--help" in argv or environment.get("QUICKTHAW_TRUST_KEYS"):
        return None
    url = environment.get("QUICKTHAW_SNAPSHOT_STORE", "")
    for index, word in enumerate(argv):
        if word.partition("=")[0] == _TRUST:
            return None
        if word == _STORE and index + 1 < len(argv):
            url = argv[index + 1]
        elif word.startswith(_STORE + "="):
            url = word.partition("=")[2]
    return (url, argv[0]) if url else None


def start(argv: Sequence[str]) -> threading.Thread | None:
    """Begin to fetch, where a store is named and the snapshot is not here, and wait a moment for it; the thread that does, if any."""
    found = named(argv, os.environ)
    if found is None:
        return None
    thread = threading.Thread(target=_begin, args=found, name="ahead", daemon=True)
    thread.start()
    thread.join(HEAD_START_S)
    return thread


def _begin(url: str, name: str) -> None:
    from checkpoint.errors import CheckpointError
    from checkpoint.snapshot.library import Library
    from plugin.runtime.config import state_home
    from plugin.runtime.snapshot_fetch import manifest_of

    with contextlib.suppress(CheckpointError):  # whoever needs it asks again, and says why not
        manifest_of(Library(state_home()), url, name, ())
