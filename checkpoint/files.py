"""Make private folders, and write files atomically: readers never see a partial file, and concurrent writers do not disturb each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def private_folder(path: Path) -> None:
    """Make `path` where it is not there, 0700, and its parents too: `mkdir(parents=True)` leaves those to the umask. Raises OSError."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
    except FileNotFoundError:
        private_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Yield a new, unique path beside `target`; when the block ends without an error, the file there replaces `target`.

    The name is random because threads of one process (replicas) write the same files, so a process number would not
    suffice. Raises OSError.
    """
    new = target.with_name(f".{target.name}.{os.urandom(6).hex()}")
    try:
        yield new
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
