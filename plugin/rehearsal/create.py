"""Make a snapshot for later starts, here or elsewhere: start the engine, take its snapshot, end it, rehearse the snapshot, push it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.errors import CheckpointError, Failed, Incompatible, NotFound
from checkpoint.snapshot.library import Library
from plugin.rehearsal.push import push
from plugin.rehearsal.rehearse import Rehearsal, named_settings
from plugin.runtime.phases import Phase, PhaseTracker
from plugin.runtime.replica import Replica
from plugin.runtime.run import prepare
from plugin.runtime.steps import compatibility, take_snapshot
from plugin.runtime.steps.model_mount import Weights

if TYPE_CHECKING:
    from plugin.runtime.config import LaunchSettings

log = logging.getLogger("quickthaw")


@dataclass(frozen=True)
class Created:
    """What was made: `taken` is False if the snapshot was there already; `pushed_bytes`: written to the store, None without one."""

    name: str
    taken: bool
    requests: tuple[str, ...]
    rehearsed_s: float
    pushed_bytes: int | None


def create(settings: LaunchSettings) -> Created:
    """Take, rehearse and push the snapshot of a launch, whose settings are `strict`. No port is opened.

    Raises CheckpointError, LauncherError or GivenUp. Afterwards, as at any other end, no engine runs.
    """
    engine, criu, capabilities, weights = prepare(settings)
    try:
        replica = Replica(settings, engine, capabilities, criu, weights, PhaseTracker(), stdout=2, stderr=2)
        replica.tracker.listen(_log_phase)
        name, taken = _existing(replica), False
        if name is None:
            try:
                replica.start()
            finally:
                replica.stop()
            if replica.snapshot is None:
                raise Failed("no-snapshot", "the engine started, but no snapshot was taken of it; the log says why")
            name, taken = replica.snapshot.name, True
        if why := weights.keep_in_store(wait=True):
            raise Failed(*why.split(": ", 1))
    finally:
        weights.close()
    library = Library(settings.home)
    mark = Rehearsal(
        named_settings(
            library.load(name),
            settings.home,
            settings.engine_python,
            settings.command.api_key,
            settings.command.admin_key,
            verify=settings.verify,
            trust_keys=settings.trust_keys,
            store_url=settings.store_url,
        )
    ).run()
    written = None
    if settings.snapshot_store and settings.push:
        written = push(library, name, settings.snapshot_store, str(settings.sign_key or ""))
    return Created(name, taken, tuple(mark.requests), mark.took_s, written)


def _existing(replica: Replica) -> str | None:
    """Return the name of the launch's snapshot if there is one that may be restored here."""
    if replica.weights.path is None:
        return None  # downloaded by the start
    name = replica.snapshot_name
    if not replica.library.has(name) or replica.library.health(name).reason.startswith(take_snapshot.DAMAGED):
        return None
    try:
        replica.check_identity(replica.library.load(name))
    except Incompatible as error:
        replica.refused = error
        return None
    except CheckpointError as error:
        log.warning("snapshot %s is taken again: %s", name, error)
        replica.library.quarantine(name, str(error))
        return None
    return name


def _log_phase(old: Phase, new: Phase, reason: str) -> None:
    log.info("%s%s", new, f": {reason}" if reason else "")


def key(settings: LaunchSettings) -> str:
    """Return the name of the snapshot that a launch selects, without starting anything. Raises NotFound (model-not-here)."""
    from checkpoint.criu.binary import Criu
    from checkpoint.errors import HostLacks

    if settings.name:
        return settings.name
    weights = Weights.of(settings, enabled=False)
    try:
        if weights.path is None:
            raise NotFound("model-not-here", f"{settings.command.model} is not on this host; download it first")
        try:
            criu: Criu | None = Criu.find(settings.home)
        except HostLacks:
            criu = None
        return compatibility.snapshot_name(settings, compatibility.gather(settings, weights, criu))
    finally:
        weights.close()
