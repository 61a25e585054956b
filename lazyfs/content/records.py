"""msgspec's types, safe for several threads.

msgspec (seen with 0.22) works out what a Struct holds when it first decodes one. A second thread that decodes the same type meanwhile
reads what is half made, and crashes the process. So types are worked out under one lock before their first use.
"""

from __future__ import annotations

import threading
from typing import TypeVar

import msgspec

T = TypeVar("T")
_lock = threading.Lock()
_ready: set[object] = set()


def ready(cls: type[T]) -> type[T]:
    """The type itself, once msgspec has worked it out: `msgspec.json.decode(data, type=ready(Manifest))`."""
    if cls not in _ready:
        # One lock for all of them: types that hold each other share what is worked out.
        with _lock:
            if cls not in _ready:
                msgspec.json.Decoder(cls)
                _ready.add(cls)
    return cls
