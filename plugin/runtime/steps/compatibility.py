"""Compute a launch's identity, and check if a snapshot may be restored for it (rules: checkpoint.compatibility.check)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.compatibility import check as identity
from checkpoint.compatibility.check import CurrentIdentity, Identity, Mismatch
from checkpoint.errors import CheckpointError, Incompatible
from launchers.given_options import given_options, last
from plugin.runtime import way_out

if TYPE_CHECKING:
    from checkpoint.criu.binary import Criu
    from checkpoint.cuda.driver import Driver
    from checkpoint.snapshot.library import Library
    from checkpoint.snapshot.manifest import Snapshot
    from plugin.runtime.config import LaunchSettings
    from plugin.runtime.steps.model_mount import Weights

log = logging.getLogger("quickthaw")


def gather(settings: LaunchSettings, weights: Weights, criu: Criu | None) -> CurrentIdentity:
    """Return the identity of a launch on this host. Raises CheckpointError when engine or interpreter are missing."""
    model = weights.path
    found = identity.current_identity(
        settings.engine,
        Path(settings.engine_python),
        settings.command.arguments,
        settings.given_environment,
        # A named snapshot is compared by host and engine only.
        sketch="" if settings.named else weights.sketch,
        model_paths=(settings.command.model, str(model)) if model else (),
        model_folder=model,
        cache=settings.home / "file-digests.json",
        weights="excluded" if settings.weights == "excluded" else "included",
        criu=criu.cached_version(settings.home) if criu else "",
    )
    return replace(found, arguments={**found.arguments, **way_out.identify(settings, weights)})


def check(snapshot: Snapshot, here: CurrentIdentity, settings: LaunchSettings, weights: Weights) -> Identity:
    """Return the snapshot's identity. Raises Incompatible when it may not be restored here."""
    recorded = Identity.decode(snapshot.identity)
    if settings.named:
        # For a named snapshot, arguments and environment come from the snapshot itself.
        reasons = (
            *identity.check_host(recorded, here.host),
            *identity.check_engine(recorded.engine, here.engine),
            *_check_weights(snapshot, recorded, weights),
        )
    else:
        # The model's digest comes last: computing it may read the whole model.
        reasons = identity.check(recorded, replace(here, model=recorded.model))
        if not reasons:
            reasons = identity.check_model(recorded.model, weights.digest)
    identity.refuse(reasons)
    return recorded


def _check_weights(snapshot: Snapshot, recorded: Identity, weights: Weights) -> tuple[Mismatch, ...]:
    """Compare the model by content when the snapshot excludes the weights, because the restore then reads them again."""
    if snapshot.weights == "included" or weights.path is None:
        return ()  # nothing to read, or the replica reports the missing folder
    return identity.check_model(recorded.model, weights.digest)


def snapshot_name(settings: LaunchSettings, here: CurrentIdentity) -> str:
    """Return the name of a launch's snapshot, made of engine, model and identity."""
    # With a served model name the folder's name does not matter: the identity holds the model's digest.
    served = here.arguments.get("--served-model-name", ())
    model = served[-1][0] if served and served[-1] else Path(settings.command.model).name or "model"
    slug = "".join(c if c.isalnum() or c in "._" else "-" for c in model.lower()).strip("-.")[:60] or "model"
    return f"{settings.engine}-{slug}-{here.key[:10]}"


def multi_gpu(settings: LaunchSettings, here: CurrentIdentity, driver: Callable[[], Driver | None]) -> bool:
    """Return True if no driver can checkpoint this launch (several GPUs, or a MIG slice).

    Log it, with what `driver` and the engine's packages have of what it needs, and with the remedy.
    """
    from checkpoint.cuda.checkpoint import refuse_parallel, refuse_slice
    from checkpoint.cuda.several import probe

    if here.host.gpus:
        try:
            path = last(given_options(settings.command.arguments), "config")
            # In place of the file's path the identity holds its digest, but `refuse_parallel` reads the file.
            refuse_parallel(
                {**here.arguments, "--config": ((path,),)} if path else here.arguments,
                lambda: probe(here.host.driver, here.engine.packages, driver()),
            )
            refuse_slice(settings.environment.get("CUDA_VISIBLE_DEVICES"))
        except Incompatible as error:
            log.warning("no snapshots: %s", error)
            return True
    return False


def explain(library: Library, name: str, here: CurrentIdentity) -> None:
    """Log how the newest snapshot of the same model differs from this launch: the difference costs a cold start."""
    model = name.rpartition("-")[0]
    with contextlib.suppress(CheckpointError):  # skip snapshots that cannot be read
        for other in reversed(library.names()):
            if other == name or other.rpartition("-")[0] != model:
                continue
            recorded = Identity.decode(library.load(other).identity)
            codes = [reason.code for reason in identity.check(recorded, replace(here, model=recorded.model))]
            # If all codes match, only the model's sketch can differ.
            log.info("no snapshot of this launch; %s differs: %s", other, ", ".join(codes or ["model-differs"]))
            return


def check_unchanged(
    settings: LaunchSettings, weights: Weights, criu: Criu | None, before: CurrentIdentity, limit_s: float
) -> CurrentIdentity:
    """Return the identity with the digest of the model, waiting up to `limit_s` seconds for that.

    Raises Incompatible (inputs-changed, model-unread) if what the engine has read changed since the launch computed its
    identity, or is not known.
    """
    if weights.moved():
        raise Incompatible(
            "inputs-changed",
            "the hub's cache received another commit of the model while the engine started; the next start takes the snapshot",
        )
    proven = replace(before, model=weights.content.verified_digest(limit_s) if weights.content else "")
    now = replace(gather(settings, weights, criu), model=proven.model)
    differing = identity.check(proven.record(), now)
    if now.key != before.key or differing:
        what = ", ".join(reason.code for reason in differing) or "a secret"
        raise Incompatible(
            "inputs-changed",
            f"what the engine reads was changed while it started ({what}); the next start takes the snapshot",
        )
    return proven
