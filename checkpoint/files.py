"""Writing a file aside and putting it in place whole: no reader sees half of it, and two who do it at once do not disturb each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A path beside `target`, of nobody else's, not there yet; what is there at the block's end replaces `target`.

    Threads of one process (replicas) write the same files as well, so a process number would not do. Raises OSError.
    """
    new = target.with_name(f".{target.name}.{os.urandom(6).hex()}")
    try:
        yield new
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
