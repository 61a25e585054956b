"""Read a text file with the errors of this package, and replace a file atomically."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from capacity.errors import InputError


def read_text(path: Path, most: int) -> str:
    """Return the text of a UTF-8 file of at most `most` bytes, without a byte order mark. Raises InputError (unreadable, too-large)."""
    try:
        if path.stat().st_size > most:
            raise InputError("too-large", f"over {most} bytes", file=str(path))
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as bad:
        raise InputError("unreadable", f"cannot be read: {bad}", file=str(path)) from bad


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write a new file of mode 0600 that replaces `path` on success; an error leaves `path` as it was. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", newline="", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
