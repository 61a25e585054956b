"""Download the models of a launch that are named by the hub, before its engine starts cold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launchers.errors import EngineFailed
from plugin.model.hub import NotDownloaded

if TYPE_CHECKING:
    from plugin.runtime.steps.context import StartContext


def fetch(replica: StartContext) -> bool:
    """Download hub models into the cache; return whether that changed the identity of this launch.

    If the download fails, the engine starts as it would alone and reports the failure itself. Raises OSError if the
    model cannot be read.
    """
    if replica.capabilities.sandbox:
        return False
    known = replica.known_identity
    before = known.key if known else ""
    if replica.weights.repositories:
        try:
            replica.weights.fetch(replica.stderr)
        except NotDownloaded as error:
            if not replica.stop_requested:
                replica.turn_off(f"{error}; the engine loads its model itself", error)
                return False
        if replica.stop_requested:
            raise EngineFailed("stopped", "stopped while the model was downloaded")
        replica.forget_identity()
    if replica.capabilities.snapshots or not (replica.settings.use_snapshot or replica.settings.take_snapshot):
        return False
    return replica.identity.key != before and replica.settings.use_snapshot
