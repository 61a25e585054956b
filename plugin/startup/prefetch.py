"""Start to fetch a named snapshot from a store while this process is still importing modules.

Three round trips for a remote store's manifests, plus the first chunks, take longer than a command's imports. `start`
is therefore one of the first calls of a command whose arguments name a snapshot and a store. Code that opens the same
snapshot later (checkpoint.store.remote_restore) finds it open, or gets the error itself. When signatures are required,
nothing is fetched before they are verified. Standard library only until the thread runs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence

HEAD_START_S = 0.4
"""Maximum seconds that the other imports wait for the download to start. Two importing threads slow each other down, and
there is time for the other imports while the first bytes arrive.
"""
_STORE, _TRUST = "--snapshot-store", "--trust-key"


def named(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return (store, snapshot) if the arguments of `quickthaw restore` name them plainly, else None.

    Plainly: the snapshot comes first, and the store is an option of its own or in the environment. None also when trust
    keys are given, because fetching must not start before the signature is verified.
    """
    required = environment.get("QUICKTHAW_TRUST_KEY") or environment.get("QUICKTHAW_TRUST_KEYS")
    if not argv or argv[0].startswith("-") or "--help" in argv or required:
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
    """Start to fetch if a store is named, wait up to HEAD_START_S, and return the thread, if any."""
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
    from plugin.runtime.home import state_home
    from plugin.runtime.steps.snapshot_fetch import manifest_of

    with contextlib.suppress(CheckpointError):  # the code that needs the snapshot retries and reports the error
        manifest_of(Library(state_home()), url, name, ())
