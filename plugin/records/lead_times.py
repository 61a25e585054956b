"""Measured lead times: every launch appends one JSON line per start to `$QUICKTHAW_HOME/lead-times.jsonl`.

The proxy derives its deadlines from them; `quickthaw plan` uses them as samples.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from plugin.records import jsonl, wake_times
from plugin.runtime.config import LaunchSettings, state_home

if TYPE_CHECKING:
    from plugin.proxy.pool.start_times import History

FILE = "lead-times.jsonl"
KEPT = 200  # latest starts that are read


def remember(settings: LaunchSettings, kind: str, seconds: float, *, first: bool = False) -> None:
    """Append one start (`cold` or `restored`, in seconds). `first`: a restore that recorded its working set meanwhile."""
    entry = {
        "model": settings.command.model,
        "engine": settings.engine,
        "kind": kind,
        "seconds": round(seconds, 4),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    jsonl.append(settings.home / FILE, entry | ({"first": True} if first else {}))


def lead_times(settings: LaunchSettings) -> dict[str, list[float]]:
    """Return the latest starts and wakes of this engine with this model, in seconds by kind (the arguments of `History`)."""
    found: dict[str, list[float]] = {"cold": [], "restored": [], "first_restore": []}
    for entry in jsonl.latest(settings.home / FILE, KEPT):
        try:
            if entry["engine"] == settings.engine and entry["model"] == settings.command.model:
                found["first_restore" if entry.get("first") else entry["kind"]].append(float(entry["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue  # written by another version
    return found | {"woken": wake_times.seconds_of(settings)}


def history_for(settings: LaunchSettings) -> History:
    """Return the measured lead times as the proxy's `History`."""
    from plugin.proxy.pool.start_times import History

    return History(**lead_times(settings))


def history_of_snapshot(snapshot: str | None) -> History | None:
    """Return the measured starts of a snapshot's engine and model, or None (logged) if the snapshot is not in the library."""
    if snapshot is None:
        return None
    from checkpoint.errors import CheckpointError
    from checkpoint.snapshot.library import Library
    from launchers.base import EngineCommand

    home = state_home()
    try:
        found = Library(home).load(snapshot)
    except CheckpointError as error:
        fields = {"code": error.code, "snapshot": snapshot}
        logging.getLogger("quickthaw.proxy").warning("%s", error, extra={"event": "snapshot-unknown", "fields": fields})
        return None
    return history_for(LaunchSettings(found.engine, EngineCommand(found.engine, (), found.model, "", 0), "", home))
