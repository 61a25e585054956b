"""Lead-time samples as they were measured: from `quickthaw bench coldstart --json`, and from the journal of starts.

Two formats, told apart by their content:
- one JSON object `{"engine": …, "cold": {"runs_s": [..]}, "restored": {"runs_s": [..]}}`, as the benchmark prints it;
- JSON lines, one a start: `{"model": …, "engine": …, "kind": "cold"|"restored", "seconds": 1.2, "at": ISO time}`; this is
  `$QUICKTHAW_HOME/lead-times.jsonl`, which every start appends to. A line that is cut off at the end (a crash while
  writing) is left out; any other bad line is an error. Only the newest `NEWEST` starts of a kind count.
"""

from __future__ import annotations

import json
import math
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from capacity.errors import InputError

NEWEST = 200
MAX_BYTES = 64 * 1024 * 1024
Samples = dict[str, tuple[float, ...]]


def expand(path: str) -> str:
    """`~` and environment variables; QUICKTHAW_HOME has its default when it is not set."""
    home = os.environ.get("QUICKTHAW_HOME") or str(Path.home() / ".cache" / "quickthaw")
    for spelled in ("${QUICKTHAW_HOME}", "$QUICKTHAW_HOME"):
        path = path.replace(spelled, home)
    return os.path.expandvars(str(Path(path).expanduser()))


def read(path: Path, *, model: str | None = None, engine: str | None = None) -> Samples:
    """Samples by kind ("cold", "restored"), seconds, oldest first. Raises InputError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError("too-large", f"over {MAX_BYTES} bytes", file=str(path))
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as bad:
        raise InputError("unreadable", f"cannot be read: {bad}", file=str(path)) from bad
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = None
    if isinstance(whole, dict) and ("cold" in whole or "restored" in whole):
        found = _bench(whole, path, engine)
    else:
        found = _journal(text, path, model, engine)
    if not any(found.values()):
        wanted = " ".join(f"{k} {v}" for k, v in (("model", model), ("engine", engine)) if v)
        raise InputError("no-samples", f"holds no start{' of ' + wanted if wanted else ''}", file=str(path))
    return found


def _seconds(value: Any, path: Path, line: int | None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise InputError("bad-sample", f"a lead time is seconds, not {value!r}", file=str(path), line=line)
    return float(value)


def _bench(report: dict[str, Any], path: Path, engine: str | None) -> Samples:
    if engine is not None and report.get("engine") != engine:
        raise InputError("no-samples", f"is of engine {report.get('engine')!r}, not {engine}", file=str(path))
    found: Samples = {}
    for kind in ("cold", "restored"):
        part = report.get(kind) or {}
        runs = part.get("runs_s", []) if isinstance(part, dict) else None
        if not isinstance(runs, list):
            raise InputError("bad-sample", f"{kind}.runs_s is not a list", file=str(path))
        found[kind] = tuple(_seconds(value, path, None) for value in runs)
    return found


def _journal(text: str, path: Path, model: str | None, engine: str | None) -> Samples:
    found: dict[str, list[tuple[datetime, float]]] = {"cold": [], "restored": []}
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as bad:
            if number == len(lines):  # no newline after it: cut off while it was written
                continue
            raise InputError("not-json", f"{bad.msg}", file=str(path), line=number) from bad
        if not isinstance(entry, dict) or entry.get("kind") not in found:
            raise InputError(
                "bad-sample", 'expected an object with kind "cold" or "restored"', file=str(path), line=number
            )
        try:
            at = datetime.fromisoformat(str(entry["at"]))
        except (KeyError, ValueError) as bad:
            raise InputError("bad-sample", "`at` is not an ISO time", file=str(path), line=number) from bad
        seconds = _seconds(entry.get("seconds"), path, number)
        if (model is None or entry.get("model") == model) and (engine is None or entry.get("engine") == engine):
            found[entry["kind"]].append((at.replace(tzinfo=None) - (at.utcoffset() or at - at), seconds))
    return {
        kind: tuple(seconds for _, seconds in sorted(samples, key=lambda sample: sample[0])[-NEWEST:])
        for kind, samples in found.items()
    }
