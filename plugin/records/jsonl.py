"""Logs of measurements in `$QUICKTHAW_HOME`: one JSON object per line, appended by the measuring code; readers use the latest."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.files import write_private

log = logging.getLogger("quickthaw")
_LINE = 400  # bytes; few lines are longer
MOST_BYTES, KEPT = 1 << 20, 1000
"""Size above which a file is cut, and the lines that stay: a model may start or wake every few seconds for years."""


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Append a line in one write, so that concurrent processes do not interleave. A full disk costs the line, never the caller's work."""
    try:
        fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(line).encode() + b"\n")
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
    except OSError as error:
        log.warning("%s: %s; this measurement is not kept", file, error.strerror)
        return
    if size > MOST_BYTES:
        _shorten(file)


def latest(file: Path, count: int) -> list[dict[str, Any]]:
    """Return the last `count` readable lines, oldest first; an empty list if there is no file."""
    try:
        with open(file, "rb") as lines:
            lines.seek(max(0, lines.seek(0, os.SEEK_END) - count * _LINE))
            raw = lines.read().splitlines()
    except OSError:
        return []
    found = []
    for line in raw[-count:]:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the first line may be cut, and a full disk may have torn one
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _shorten(file: Path) -> None:
    """Cut a file to its last KEPT lines. A line that another process appends meanwhile may be lost."""
    try:
        write_private(file, b"".join(json.dumps(line).encode() + b"\n" for line in latest(file, KEPT)))
    except OSError as error:
        log.warning("%s: %s; it is not shortened", file, error.strerror)
