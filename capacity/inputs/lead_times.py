"""Read measured lead times: from `quickthaw bench coldstart`, from the journal of every launch, and from snapshots.

The formats are distinguished by their content:
- One JSON object `{"engine": …, "cold": {"runs_s": [..]}, "restored": {"runs_s": [..]}}`, as the benchmark prints it.
- JSON lines, one per start: `{"model": …, "engine": …, "kind": "cold"|"restored", "seconds": 1.2, "at": ISO time}`. This is
  the journal `$QUICKTHAW_HOME/lead-times.jsonl`, to which every start appends, including the benchmark's. A truncated last
  line (a crash while writing) is skipped; any other bad line is an error. Only the newest `NEWEST` starts of a kind count.
- A snapshot's folder or its manifest.json: `cold_s`, the start that it was taken from.
- A folder with `lead-times.jsonl` or `snapshots/` in it, such as `$QUICKTHAW_HOME`: the journal, and the snapshots'
  `cold_s` for models (of an engine) without a cold start in the journal, for example pulled snapshots. The start of a
  snapshot is already in the journal of its own host and does not count twice.
- `$QUICKTHAW_HOME/wake-times.jsonl`, one line per wake from standby: `{"model": …, "engine": …, "seconds": 0.4, "memory_bytes":
  …, "at": ISO time}`; read by `wakes`.
The formats are defined in plugin/records/lead_times.py, plugin/records/wake_times.py, plugin/bench/cli.py and
checkpoint/snapshot/manifest.py, which this package may not import.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from capacity.errors import InputError
from capacity.files import read_text

JOURNAL, SNAPSHOTS, MANIFEST, WAKES = "lead-times.jsonl", "snapshots", "manifest.json", "wake-times.jsonl"
NEWEST = 200
MAX_BYTES = 64 * 1024 * 1024
Samples = dict[str, tuple[float, ...]]


def expand(path: str) -> str:
    """Expand `~` and environment variables in a path; an unset QUICKTHAW_HOME expands to its default."""
    for spelled in ("${QUICKTHAW_HOME}", "$QUICKTHAW_HOME"):
        path = path.replace(spelled, str(home()))
    return os.path.expandvars(str(Path(path).expanduser()))


def home() -> Path:
    """Return `$QUICKTHAW_HOME`, or its default."""
    try:
        return Path(os.environ.get("QUICKTHAW_HOME") or "~/.cache/quickthaw").expanduser().absolute()
    except RuntimeError:  # a container's arbitrary user has neither a home nor a name
        return Path("/.cache/quickthaw")


def read(path: Path, *, model: str | None = None, engine: str | None = None) -> Samples:
    """Return the samples by kind ("cold", "restored") in seconds, oldest first.

    `model` is a path as it was launched, or its last component. Raises InputError.
    """
    seen: set[str] = set()
    found = _folder(path, model, engine, seen) if path.is_dir() else _file(path, model, engine, seen)
    if not any(found.values()):
        wanted = " ".join(f"{k} {v}" for k, v in (("model", model), ("engine", engine)) if v)
        there = f"; there are starts of {', '.join(sorted(seen)[:5])}" if seen else ""
        raise InputError("no-samples", f"holds no start{' of ' + wanted if wanted else ''}{there}", file=str(path))
    return found


def wakes(path: Path, *, model: str | None = None, engine: str | None = None) -> tuple[tuple[float, ...], float]:
    """Return the newest wake times from standby, in seconds, and the most host memory that one of them held, in GiB.

    Raises InputError, also if there is none.
    """
    file = path / WAKES if path.is_dir() else path
    seen: set[str] = set()
    lines = _lines(read_text(file, MAX_BYTES), file)
    found = [(number, entry) for number, entry in lines if _wanted(entry, model, engine, seen)][-NEWEST:]
    if not found:
        raise InputError("no-samples", f"holds no wake of {model or 'any model'} from standby", file=str(file))
    seconds = tuple(_number(entry.get("seconds"), "a wake time is seconds", file, number) for number, entry in found)
    held = [_number(entry.get("memory_bytes", 0), "memory_bytes is a count", file, number) for number, entry in found]
    return seconds, max(held) / 2**30


def _lines(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of JSON lines with their line numbers; a last line without a newline may be truncated."""
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as bad:
            if number == len(lines):
                return
            raise InputError("not-json", f"{bad.msg}", file=str(path), line=number) from bad
        if entry is not None and not isinstance(entry, dict):
            raise InputError("bad-sample", "expected an object", file=str(path), line=number)
        if entry is not None:
            yield number, entry


def _wanted(entry: dict[str, Any], model: str | None, engine: str | None, seen: set[str]) -> bool:
    name, by = str(entry.get("model") or "a model"), str(entry.get("engine"))
    seen.add(f"{PurePath(name).name} ({by})")
    return (model is None or model in (name, PurePath(name).name)) and (engine is None or engine == by)


def _file(path: Path, model: str | None, engine: str | None, seen: set[str]) -> Samples:
    text = read_text(path, MAX_BYTES)
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        document = None
    except RecursionError as bad:
        raise InputError("not-json", "is nested too deeply", file=str(path)) from bad
    if isinstance(document, dict) and "cold_s" in document:
        return _manifest(document, path, model, engine, seen)
    if isinstance(document, dict) and "kind" not in document:
        return _bench(document, path, model, engine, seen)
    return _journal(text, path, model, engine, seen)


def _folder(path: Path, model: str | None, engine: str | None, seen: set[str]) -> Samples:
    if (path / MANIFEST).is_file():
        return _file(path / MANIFEST, model, engine, seen)
    journal = path / JOURNAL
    found: dict[str, tuple[float, ...]] = {"cold": (), "restored": ()}
    if journal.is_file():
        found |= _file(journal, model, engine, seen)
    if not found["cold"]:
        inside = path / SNAPSHOTS if (path / SNAPSHOTS).is_dir() else path
        manifests = sorted(p for p in inside.glob(f"*/{MANIFEST}") if not p.parent.name.startswith("."))
        found["cold"] = tuple(s for file in manifests for s in _file(file, model, engine, seen)["cold"])[-NEWEST:]
    return found


def _manifest(entry: dict[str, Any], path: Path, model: str | None, engine: str | None, seen: set[str]) -> Samples:
    taken = _wanted(entry, model, engine, seen)
    return {"cold": (_seconds(entry["cold_s"], path, None),) if taken else (), "restored": ()}


def _seconds(value: Any, path: Path, line: int | None) -> float:
    return _number(value, "a lead time is seconds", path, line)


def _number(value: Any, what: str, path: Path, line: int | None) -> float:
    """Return a finite number that is not negative. Raises InputError, which says `what` it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise InputError("bad-sample", f"{what}, not {value!r}", file=str(path), line=line)
    return float(value)


def _bench(report: dict[str, Any], path: Path, model: str | None, engine: str | None, seen: set[str]) -> Samples:
    if not ("cold" in report or "restored" in report):
        raise InputError("bad-sample", "is not a report of quickthaw bench coldstart --json", file=str(path))
    if not _wanted(report, None if "model" not in report else model, engine, seen):
        return {}
    found: Samples = {}
    for kind in ("cold", "restored"):
        part = report.get(kind) or {}
        runs = part.get("runs_s", []) if isinstance(part, dict) else None
        if not isinstance(runs, list):
            raise InputError("bad-sample", f"{kind}.runs_s is not a list", file=str(path))
        found[kind] = tuple(_seconds(value, path, None) for value in runs)
    return found


def _journal(text: str, path: Path, model: str | None, engine: str | None, seen: set[str]) -> Samples:
    found: dict[str, list[tuple[datetime, float]]] = {"cold": [], "restored": []}
    for number, entry in _lines(text, path):
        if entry.get("kind") not in found:
            raise InputError(
                "bad-sample", 'expected an object with kind "cold" or "restored"', file=str(path), line=number
            )
        try:
            at = datetime.fromisoformat(str(entry["at"]))
        except (KeyError, ValueError) as bad:
            raise InputError("bad-sample", "`at` is not an ISO time", file=str(path), line=number) from bad
        seconds = _seconds(entry.get("seconds"), path, number)
        if _wanted(entry, model, engine, seen):
            found[entry["kind"]].append((at.replace(tzinfo=None) - (at.utcoffset() or at - at), seconds))
    return {
        kind: tuple(seconds for _, seconds in sorted(samples, key=lambda sample: sample[0])[-NEWEST:])
        for kind, samples in found.items()
    }
