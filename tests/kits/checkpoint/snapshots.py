"""Shared by the tests with real process trees."""

from __future__ import annotations

import time
from pathlib import Path

from checkpoint.sandbox.sandbox import TMP_DIR, Sandbox
from checkpoint.snapshot.manifest import FORMAT, Canary, Snapshot

LIMIT_S = 60.0


def draft(name: str, pid: int, pipes: dict[str, str] | None = None) -> Snapshot:
    """Return the manifest of a tree that is no engine, before its dump."""
    return Snapshot(
        format=FORMAT,
        name=name,
        created="2026-01-01T00:00:00Z",
        engine="none",
        model="none",
        model_digest="",
        weights="included",
        identity={},
        root_pid=pid,
        top_pid=pid,
        port=8000,
        pipes=pipes or {},
        monotonic_ns=0,
        canary=Canary("", []),
        image_bytes=0,
        kv_cache_bytes=0,
        cold_s=0.0,
        timeline=[],
        files={},
    )


def sandbox_tmpdir(sandbox: Sandbox) -> Path:
    """Return the sandbox's TMPDIR as a path of the host."""
    return Path(f"/proc/{sandbox.init_pid}/root{TMP_DIR}")


def wait_for(path: Path, limit_s: float = LIMIT_S) -> bytes:
    """Wait until a file exists; return its contents."""
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            time.sleep(0.005)
    raise AssertionError(f"{path.name} did not come within {limit_s:.0f} s")
