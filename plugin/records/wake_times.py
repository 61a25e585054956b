"""Measured standby: every wake from standby appends one JSON line to `$QUICKTHAW_HOME/wake-times.jsonl`.

Fields: `model`, `engine`, `seconds` (from the wake's begin to serving), `enter_s` (the way to standby before it, in seconds),
`memory_bytes` (host memory of the engine's processes in standby, if it was measured; pages of files do not count),
`gpu_bytes` (GPU memory that standby gave back), `at` (ISO time). The proxy's deadlines read the seconds, a capacity plan
prices the rung with them.
They are not in `lead-times.jsonl`: a model that switches often would push the starts out of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from plugin.records import jsonl
from plugin.runtime.config import LaunchSettings

FILE = "wake-times.jsonl"
KEPT = 200
"""Latest wakes that are read."""


@dataclass
class Rest:
    """What one standby cost: seconds of the way there, bytes of host memory held (None: not measured), bytes of GPU memory given back."""

    enter_s: float
    memory_bytes: int | None = None
    gpu_bytes: int = 0


def remember(settings: LaunchSettings, seconds: float, rest: Rest) -> None:
    """Append one wake of `seconds` from this standby. A full disk costs the line, not the caller's work."""
    line = {"model": settings.command.model, "engine": settings.engine, "seconds": round(seconds, 4)}
    cost = {name: value for name, value in asdict(rest).items() if value is not None} | {
        "enter_s": round(rest.enter_s, 4)
    }
    jsonl.append(settings.home / FILE, line | cost | {"at": datetime.now(UTC).isoformat(timespec="seconds")})


def seconds_of(settings: LaunchSettings) -> list[float]:
    """Return the latest wakes of this engine with this model, in seconds, oldest first."""
    found = []
    for entry in jsonl.latest(settings.home / FILE, KEPT):
        try:
            if entry["engine"] == settings.engine and entry["model"] == settings.command.model:
                found.append(float(entry["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue  # written by another version
    return found
