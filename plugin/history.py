"""Measured lead times: one line of JSON a start in `$QUICKTHAW_HOME/lead-times.jsonl`, appended by every launch.

The proxy takes its deadlines from them, `quickthaw plan` its samples.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from plugin.settings import LaunchSettings

if TYPE_CHECKING:
    from plugin.proxy.history import History

FILE = "lead-times.jsonl"
KEPT = 200  # lines read from the end


def remember(settings: LaunchSettings, kind: str, seconds: float) -> None:
    """Append one start (`cold` or `restored`, in seconds). One write, so that launches do not tear each other's lines."""
    line = {
        "model": settings.command.model,
        "engine": settings.engine,
        "kind": kind,
        "seconds": round(seconds, 4),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    fd = os.open(settings.home / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, json.dumps(line).encode() + b"\n")
    finally:
        os.close(fd)


def lead_times(settings: LaunchSettings) -> dict[str, list[float]]:
    """The latest starts of this engine with this model, in seconds by kind."""
    found: dict[str, list[float]] = {"cold": [], "restored": []}
    try:
        with open(settings.home / FILE, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - KEPT * 200))
            lines = file.read().splitlines()
    except OSError:
        return found
    for line in lines[-KEPT:]:
        try:
            entry = json.loads(line)
            if entry["engine"] == settings.engine and entry["model"] == settings.command.model:
                found[entry["kind"]].append(float(entry["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue  # the first line may be cut, and a full disk may have torn one
    return found


def history_for(settings: LaunchSettings) -> History:
    """The proxy's view of the same."""
    from plugin.proxy.history import History

    return History(**lead_times(settings))


def history_of_snapshot(snapshot: str | None) -> History | None:
    """The measured starts of what a snapshot of this host holds; None where nothing is known of it (yet), which the log says."""
    if snapshot is None:
        return None
    from checkpoint.errors import CheckpointError
    from checkpoint.library import Library
    from launchers.base import EngineCommand
    from plugin.settings import LaunchSettings, state_home

    home = state_home()
    try:
        found = Library(home).load(snapshot)
    except CheckpointError as error:
        fields = {"code": error.code, "snapshot": snapshot}
        logging.getLogger("quickthaw.proxy").warning("%s", error, extra={"event": "snapshot-unknown", "fields": fields})
        return None
    return history_for(LaunchSettings(found.engine, EngineCommand(found.engine, (), found.model, "", 0), "", home))
