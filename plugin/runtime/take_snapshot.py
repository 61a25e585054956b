"""Taking a replica's snapshot at the end of its cold start: make the engine small, dump it, let it go on.

Promises: a snapshot that cannot be taken costs the snapshot, never the engine (unless `strict`); after it the engine has back what was
put away, and generates what it generated before, or the snapshot is removed. An engine that does not come back from it is said to be
`engine-not-resumed`, and its owner starts another.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from checkpoint import disk
from checkpoint.errors import Busy, CheckpointError, HostLacks, Incompatible
from checkpoint.sandbox import process_tree
from checkpoint.snapshot import dump
from checkpoint.snapshot.manifest import FORMAT, Snapshot
from checkpoint.snapshot.manifest import Phase as TimelinePhase
from launchers import control
from launchers.base import CANARY_PROMPT
from launchers.client import Client
from launchers.errors import EngineFailed, LauncherError
from plugin.records import restore_rates
from plugin.runtime import compatibility, paging
from plugin.runtime.phases import Phase
from plugin.runtime.sandbox_binds import compile_cache

if TYPE_CHECKING:
    from checkpoint.cuda.driver import Driver
    from checkpoint.sandbox.sandbox import Sandbox
    from plugin.runtime.context import StartContext
    from plugin.runtime.engine_process import Running
    from plugin.runtime.trial import Trial

log = logging.getLogger("quickthaw")
SMALL = 64 << 20
"""Bytes of weights below which neither way is measured."""
WORTH_S = 0.5
"""Weights whose carrying costs a restore less than this are carried without trying a reload: there is nothing to win."""
DAMAGED = ("manifest-", "file-", "canary-differs", "signature-")
"""Reasons of a failed restore that say the snapshot's own bytes are wrong: the next cold start takes it anew."""
PASSING = ("gpu-memory-short", "gpu-gone", "format-newer")
"""Mismatches that say nothing against the snapshot: it stays."""

STALE = ("open-file-changed", "open-file-missing")
"""Mismatches that this very launch's snapshot gets in time: it is taken anew, whoever named it."""


class NotResumed(EngineFailed):
    """The engine does not run on after its snapshot was taken, or was to be: it has to be ended."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("engine-not-resumed", f"the engine did not go on after its dump: {one_line(cause)}")


def wanted(replica: StartContext) -> bool:
    """Whether this cold start shall end with a snapshot; why not is said where it is not obvious."""
    settings = replica.settings
    if not settings.take_snapshot or replica.layers.snapshots:
        return False
    name = replica.snapshot_name
    if settings.trust_keys and settings.sign_key is None:
        log.info("no snapshot by this launch: --trust-key without --sign-key would refuse it")
        return False
    if replica.multi_gpu():
        return False
    if not replica.library.has(name) or replica.library.health(name).reason.startswith(DAMAGED):
        return True
    refused = replica.refused
    if refused is None or refused.code in PASSING:
        # One that is there and was not restored is somebody else's to judge.
        return False
    if settings.name and refused.code not in STALE:
        log.info("snapshot %s is another launch's or host's and is left alone; give another --name, or remove it", name)
        return False
    log.info("snapshot %s fits this host no longer and is taken anew", name)
    return True


def begin_trial(replica: StartContext) -> Trial | None:
    """Begin to try out, while the engine loads, whether this host can dump and restore; None where nobody wants to know."""
    if replica.criu is None or replica.layers.snapshots or not replica.settings.take_snapshot:
        return None
    from plugin.runtime.trial import Trial  # what only a cold start needs

    return Trial(replica.criu, replica.settings.home)


def works(replica: StartContext, trial: Trial | None) -> bool:
    """Return whether a snapshot of this host could be restored, as tried out; why not is said. Raises with `--strict`."""
    why = trial.wait() if trial else None
    if why is None:
        return True
    replica.layers = dataclasses.replace(replica.layers, snapshots=why)
    replica.layers.say()
    if replica.settings.strict:
        raise HostLacks("layer-off", f"--strict, and snapshots cannot be had here: {why}")
    return False


def take(replica: StartContext, sandbox: Sandbox, running: Running, cold_s: float) -> None:
    """Warmed up → small → dumped → serving again. Failures are said and survived: the engine serves without a snapshot.

    `sandbox` is where it is `running`; `cold_s` the seconds that its start took. Raises NotResumed where the engine itself is lost; with
    `strict`, whatever went wrong.
    """
    client = running.client
    settings, engine, tracker = replica.settings, replica.engine, replica.tracker
    assert replica.criu is not None
    weight_bytes, asleep, thin = 0, False, False
    awake: dict[str, int] | None = None
    try:
        tracker.to(Phase.SHRINKING)
        compatibility.check_unchanged(settings, replica.weights, replica.criu, replica.identity)
        driver = replica.driver()
        gpu = driver is not None and _uses_gpu(driver, sandbox)
        canary = engine.record(client, gpu)
        thin = _thin(replica, client, gpu)
        kv_bytes = 0
        if settings.shrink:
            control.ask_for_thin(sandbox.control_dir, thin)
            engine.shrink(client)
            control.ask_for_thin(sandbox.control_dir, False)
            if driver is not None and gpu:
                awake = _free_memory(driver)
                asleep = engine.put_away(client, replica.command, thin)
            kv_bytes = control.bytes_dropped(sandbox.control_dir, "kv")
            weight_bytes = control.bytes_dropped(sandbox.control_dir, "weights")
            control.shrink_all(sandbox.init_pid, sandbox.control_dir)
        else:
            try:
                engine.name_weights(client)
            except LauncherError as error:  # it is about how fast a restore is, no more
                log.info("restores will copy the weights: %s", one_line(error))
        tracker.to(Phase.CHECKPOINTING)
        draft = Snapshot(
            format=FORMAT,
            name=replica.snapshot_name,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            engine=settings.engine,
            model=settings.command.model,
            model_digest=replica.weights.digest,
            weights="thin" if weight_bytes or (asleep and thin) else "full",
            identity=replica.identity.record().encode(),
            root_pid=running.pid,
            top_pid=running.pid,
            port=running.port,
            pipes={stream: output.name for stream, output in running.outputs.items()},
            monotonic_ns=0,
            canary=canary,
            image_bytes=0,
            kv_cache_bytes=kv_bytes,
            cold_s=round(cold_s, 3),
            timeline=[TimelinePhase(str(span.phase), round(span.took_s, 4)) for span in replica.this_start()],
            files={},
            asleep=asleep,
            model_path=replica.weights.shown_at if replica.weights.path else "",
            cwd=os.getcwd(),
            weight_areas=control.weight_areas(sandbox.control_dir),
        )
        from checkpoint.snapshot.digests import seal

        replica.snapshot = dump.take(
            replica.library,
            replica.criu,
            sandbox,
            draft,
            compile_cache(replica.settings),
            seal,
            _signer(replica),
            driver,
            visible=[gpu.uuid for gpu in replica.identity.host.gpus],
            awake=awake,
        )
        replica.library.succeeded(draft.name)
        paging.map_pages(replica.library, replica.snapshot)
    except Busy as error:
        log.info("no snapshot by this launch: %s", error)
    except (CheckpointError, LauncherError, OSError) as error:
        stuck = isinstance(error, CheckpointError) and error.code == "cuda-stuck"
        log.warning("no snapshot: %s%s", one_line(error), "" if stuck else "; the engine serves without one")
        if settings.strict:
            raise
        if stuck:
            raise NotResumed(error) from error
    tracker.to(Phase.RESUMING)
    try:
        again = _go_on(replica, client, asleep, bool(weight_bytes), thin)
    except (LauncherError, OSError) as error:
        if settings.strict:
            raise
        _drop(replica, str(error))
        raise NotResumed(error) from error
    if replica.snapshot is not None and again != replica.snapshot.canary.token_ids:
        log.warning(
            "the engine answers differently after its own dump (%s, %s); the snapshot is removed",
            again,
            replica.snapshot.canary,
        )
        _drop(replica, "canary-differs: after its own dump")


def _drop(replica: StartContext, why: str) -> None:
    """Remove the snapshot that was just taken; where that cannot be, launches pass it over and take it anew."""
    if replica.snapshot is None:
        return
    name, replica.snapshot = replica.snapshot.name, None
    try:
        replica.library.remove(name)
    except CheckpointError as error:
        log.warning("snapshot %s is not removed: %s", name, error)
        replica.library.failed(name, why)


def _go_on(replica: StartContext, client: Client, asleep: bool, dropped: bool, thin: bool) -> list[int]:
    """Give the engine back what was put away; what it answers then to its canary, or to a plain prompt where there is no snapshot."""
    engine, model = replica.engine, replica.settings.command.model
    if asleep:
        engine.take_up(client, model, thin)
    elif dropped:
        engine.reload_weights(client, model)
    if replica.snapshot is None:
        return engine.generate(client, CANARY_PROMPT, 1)
    return engine.answer(client, replica.snapshot.canary)


def on_gpu(replica: StartContext) -> bool:
    """Whether a snapshot by this launch will hold GPU state, as far as can be told before the engine runs."""
    settings = replica.settings
    return (
        settings.take_snapshot
        and not replica.layers.snapshots
        and replica.driver() is not None
        and bool(replica.identity.host.gpus)
        and not replica.multi_gpu()
    )


def _uses_gpu(driver: Driver, sandbox: Sandbox) -> bool:
    """Whether a process of the engine holds a CUDA context: an engine may be told to compute on the CPU beside a GPU."""
    from checkpoint.cuda import checkpoint as cuda

    return bool(cuda.holders(driver, process_tree.processes(sandbox.init_pid)))


def _free_memory(driver: Driver) -> dict[str, int]:
    """Bytes free by GPU while the engine has all of its memory."""
    from checkpoint.cuda import checkpoint as cuda

    return cuda.free_memory(driver)


def _thin(replica: StartContext, client: Client, gpu: bool) -> bool:
    """Whether the snapshot leaves the weights out: as told, or whichever is faster as measured on this host."""
    told = replica.settings.weights
    if told != "auto":
        return told == "thin"
    size, home = replica.weights.size, replica.settings.home
    if size < SMALL:
        log.info("weights full: %.0f MB cost a restore next to nothing", size / 1e6)
        return False
    known = restore_rates.measured(home, gpu)
    rate, source = (
        (known[0], f"{known[1]} restores here") if known else (restore_rates.probe(home), "a probe, no restore yet")
    )
    carry_s = size / rate
    said = f"carrying {size / 1e9:.2f} GB costs a restore {carry_s:.2f} s at {rate / 1e9:.1f} GB/s ({source})"
    if carry_s < WORTH_S:
        log.info("weights full: %s, and leaving them out could not win much", said)
        return False
    began = time.monotonic()
    try:
        replica.engine.reload_weights(client, replica.settings.command.model)
    except LauncherError as error:
        log.warning("weights full: the engine cannot read them again (%s)", error)
        return False
    reload_s = time.monotonic() - began
    chosen = "thin" if reload_s < carry_s else "full"
    log.info("weights %s: %s, reading them again took %.2f s", chosen, said, reload_s)
    return chosen == "thin"


def _signer(replica: StartContext) -> Callable[[bytes], bytes] | None:
    if replica.settings.sign_key is None:
        return None
    from checkpoint.snapshot.signatures import signer

    return signer(replica.settings.sign_key)


def one_line(error: Exception) -> str:
    """An error for the log."""
    return str(disk.failure("it is not written", error)) if isinstance(error, OSError) else str(error)


def refusal(error: Incompatible) -> str:
    """Every reason of a refusal, for the log."""
    more = [reason for reason in error.reasons if reason != error.code]
    return f"{error}; also: {', '.join(more)}" if more else str(error)
