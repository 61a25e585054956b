"""Make msgspec Struct types safe to decode from several threads.

msgspec (seen with 0.22) resolves the fields of a Struct when it first decodes one. A second thread that decodes the same
type meanwhile reads half-initialised state and crashes the process. So each type is resolved under one lock before its
first use.
"""

from __future__ import annotations

import threading
from typing import TypeVar

import msgspec

T = TypeVar("T")
_lock = threading.Lock()
_ready: set[object] = set()


def ready(cls: type[T]) -> type[T]:
    """Return `cls` after msgspec has resolved it: `msgspec.json.decode(data, type=ready(Manifest))`."""
    if cls not in _ready:
        # One lock for all types: nested types share their resolved state.
        with _lock:
            if cls not in _ready:
                msgspec.json.Decoder(cls)
                _ready.add(cls)
    return cls
