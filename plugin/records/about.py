"""Describe a replica for the admin page: names and sizes from its snapshot, its identity and its engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plugin.proxy.pool.facts import Facts
from plugin.proxy.pool.start_times import Kind
from plugin.runtime.phases import Phase

if TYPE_CHECKING:
    from checkpoint.snapshot.manifest import Snapshot
    from plugin.runtime.replica import Replica


def facts_of(snapshot: Snapshot) -> Facts:
    """Return engine, model and size from a snapshot's manifest."""
    recorded: dict[str, Any] = snapshot.identity
    engine = recorded.get("engine", {}).get("version") or snapshot.engine
    gpus = tuple(str(gpu["name"]) for gpu in recorded.get("host", {}).get("gpus", ()))
    size = sum(file.size for file in snapshot.files.values())
    on_gpu = sum(snapshot.gpu.memory.values())
    return Facts(_short(snapshot.model), str(engine), snapshot.name, size, gpus, on_gpu)


def facts_of_named(name: str | None) -> Facts:
    """Return the facts from the manifest of a snapshot in the library; empty facts if it cannot be read."""
    from checkpoint.errors import CheckpointError
    from checkpoint.snapshot.library import Library
    from plugin.runtime.config import state_home

    if name is None:
        return Facts()
    try:
        return facts_of(Library(state_home()).load(name))
    except CheckpointError:
        return Facts(snapshot=name)


def facts(replica: Replica) -> Facts:
    """Return what a launch serves, as far as it is known by now. Reads no file."""
    if replica.snapshot is not None:
        return facts_of(replica.snapshot)
    here, settings = replica.known_identity, replica.settings
    engine = here.engine.version if here is not None else settings.engine
    gpus = tuple(gpu.name for gpu in here.host.gpus) if here is not None else ()
    return Facts(_short(settings.command.model), engine, settings.name or "", 0, gpus)


def next_kind(replicas: Sequence[Replica]) -> Kind | None:
    """Return the kind of a launch's next start, as far as it is known before it runs."""
    if any(replica.tracker.phase is Phase.STANDBY for replica in replicas):
        return Kind.WOKEN
    return Kind.RESTORED if replicas[0].snapshot is not None else None


def engine_pid(replica: Replica) -> int | None:
    """Return the host PID of the root of the engine's processes, or None while none runs."""
    from checkpoint.sandbox.sandbox import Sandbox

    running = replica.running
    if running is None:
        return None
    return running.place.init_pid if isinstance(running.place, Sandbox) else running.pid


def address(replica: Replica) -> str:
    """Return where the engine listens, or "" while none runs."""
    from checkpoint.sandbox.sandbox import Sandbox

    running = replica.running
    if running is None:
        return ""
    where = f"port {running.port}"
    if isinstance(running.place, Sandbox):
        return f"{where} in the sandbox of process {running.place.init_pid}"
    return f"{where} of process {running.pid}"


def _short(model: str) -> str:
    """Return a model's name without the folders above it, if it is a path on this host."""
    return Path(model).name if model.startswith(("/", "./", "../")) else model
