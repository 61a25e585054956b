"""Take a replica's snapshot at the end of its cold start: trim the engine's memory, dump it, resume it.

Guarantees: a failure to take a snapshot costs the snapshot, never the engine (unless `strict`). Afterwards the
offloaded memory is reloaded and the engine generates what it generated before; otherwise the snapshot is removed. An
engine that does not resume is reported as `engine-not-resumed`, and its owner starts another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint import disk
from checkpoint.errors import Busy, CheckpointError, HostLacks, Incompatible, Integrity
from checkpoint.sandbox import process_tree
from checkpoint.snapshot import dump
from checkpoint.snapshot.manifest import FORMAT, Answer, Snapshot
from checkpoint.snapshot.manifest import Phase as TimelinePhase
from launchers import control
from launchers.client import Client
from launchers.errors import EngineFailed, LauncherError
from launchers.model_source import can_reload
from launchers.readiness import Probe, when_idle
from plugin.records import restore_rates
from plugin.runtime.gpu import ending
from plugin.runtime.phases import Phase
from plugin.runtime.steps import compatibility, paging
from plugin.runtime.steps.sandbox_binds import compile_cache
from plugin.runtime.weight_ring import layout as weight_layout

if TYPE_CHECKING:
    from checkpoint.cuda.driver import Driver
    from checkpoint.sandbox.sandbox import Sandbox
    from checkpoint.store.claim import Claim
    from plugin.runtime.steps.context import StartContext
    from plugin.runtime.steps.criu_trial import Trial
    from plugin.runtime.steps.engine_process import Running

log = logging.getLogger("quickthaw")
SMALL = 64 << 20
"""Bytes of weights below which neither way (included, excluded) is measured."""
WORTH_S = 0.5
"""Seconds of restore time below which weights are included without trying a reload: excluding them could gain too little."""
LEAST_PROOF_S, PROOF_SHARE = 10.0, 0.25
"""Limits of the wait for the model's digest before a snapshot: at least so many seconds, or this share of the cold start. Requests
wait meanwhile."""
START_UP_S = 120.0
"""How long an engine that answers may take to become healthy, in seconds. Requests wait meanwhile."""
CLAIM_LIMIT_S = 1.0
"""How long an engine that is ready waits to hear who makes its snapshot, in seconds; the store was asked as it began to load."""
DAMAGED = ("manifest-", "file-", "canary-differs", "signature-", "rehearsal-failed")
"""Prefixes of restore failures that mean the snapshot itself is wrong: the next cold start takes it again."""
NO_CANARY = (
    "no-canary: this {} answers no generation, embedding, classification or score of a text, by which a restore could be "
    "verified; it starts cold each time"
)
PASSING = ("gpu-memory-short", "gpu-gone", "format-newer")
"""Mismatches that may pass and leave the snapshot valid: it is kept."""
STALE = ("open-file-changed", "open-file-missing")
"""Mismatches that change over time for the same launch: the snapshot is taken again, even if the user named it."""


class NotResumed(EngineFailed):
    """The engine did not resume after its snapshot was taken or attempted; it must be ended."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("engine-not-resumed", f"the engine did not resume after its dump: {one_line(cause)}")


def wanted(replica: StartContext) -> bool:
    """Return True if this cold start should end with a snapshot. Log the reason where it is not obvious."""
    settings = replica.settings
    if not settings.take_snapshot or replica.capabilities.new_snapshots:
        return False
    name = replica.snapshot_name
    if settings.refuses_own:
        log.info("not taking a snapshot: without --sign-key, --trust-key could not accept it")
        return False
    if replica.multi_gpu():
        return False
    if replica.canary is None:
        _turn_off(replica, NO_CANARY.format(settings.engine))
        return False
    if not replica.library.has(name) or replica.library.health(name).reason.startswith(DAMAGED):
        return True
    refused = replica.refused
    if refused is None or refused.code in PASSING:
        # Keep an existing snapshot that this launch did not restore, or could not for a passing reason.
        return False
    if settings.name and refused.code not in STALE:
        log.info(
            "snapshot %s: kept, because another launch or host took it; give another --snapshot-name, or remove it",
            name,
        )
        return False
    log.info("snapshot %s: no longer fits this host; taking it again", name)
    return True


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is found out while the engine loads: whether this host can dump and restore, and whether another launch makes the snapshot."""

    trial: Trial
    claim: Claim | None
    before: Snapshot | None
    """What the replica had been restored from until then."""

    def settle(self, replica: StartContext) -> None:
        """Keep the claim until the snapshot that was taken is pushed, or cannot be; give it up if none was taken."""
        if self.claim is None:
            return
        library, snapshot, store = replica.library, replica.snapshot, replica.settings.push_to
        if snapshot is None or snapshot is self.before:
            self.claim.release()
            return
        from checkpoint.snapshot import rehearsal

        name = snapshot.name

        def made() -> bool:
            gone = not library.has(name) or library.health(name).quarantined
            return gone or rehearsal.pushed(library.path(name), store)

        self.claim.hold(made)


@contextlib.contextmanager
def prepared(replica: StartContext) -> Iterator[Preparation | None]:
    """Find out, while the engine loads, what a snapshot depends on; None if none will be taken.

    However the block ends, the claim is then kept for a snapshot that was taken, or given up.
    """
    if replica.criu is None or replica.capabilities.new_snapshots or not replica.settings.take_snapshot:
        yield None
        return
    from plugin.runtime.steps.criu_trial import Trial  # needed by cold starts only

    found_out = Preparation(Trial(replica.criu, replica.settings.home), _claim(replica), replica.snapshot)
    try:
        yield found_out
    finally:
        found_out.settle(replica)


def _claim(replica: StartContext) -> Claim | None:
    """Claim the snapshot in the store that this launch will push it to; None if it pushes to none."""
    settings = replica.settings
    # `strict`: whoever asked for the snapshot shall get it
    if not settings.push_to or not settings.rehearse or settings.strict:
        return None
    from checkpoint.compatibility.host_class import host_class
    from checkpoint.store.claim import Claim
    from checkpoint.store.variants import reference

    return Claim(settings.push_to, reference(replica.snapshot_name, host_class(replica.identity.host)))


def works(replica: StartContext, prepared: Preparation | None) -> bool:
    """Return True unless this host cannot take a snapshot, or another launch makes it: log which. Raises HostLacks (capability-off) with
    `--strict` on a host that cannot.
    """
    if prepared is None:
        return True
    if why := prepared.trial.wait():
        _turn_off(replica, why)
        return False
    if prepared.claim and (other := prepared.claim.holder(CLAIM_LIMIT_S)):
        log.info("snapshot %s: %s makes it for the store; this launch takes none", replica.snapshot_name, other)
        return False
    return True


def _turn_off(replica: StartContext, why: str) -> None:
    """Turn snapshots off and log why, once. Raises HostLacks (capability-off) with `--strict`."""
    replica.capabilities = dataclasses.replace(replica.capabilities, snapshots=why)
    replica.capabilities.log_off()
    if replica.settings.strict:
        raise HostLacks("capability-off", f"--strict, and snapshots are off here: {why}")


def take(replica: StartContext, sandbox: Sandbox, running: Running, cold_s: float) -> None:
    """Warm up, trim, dump and resume an engine. Failures are logged and the engine then serves without a snapshot.

    `sandbox` is where the engine is `running`; `cold_s` is the duration of its start in seconds. Raises NotResumed when
    the engine itself is lost; with `strict`, raises any error.
    """
    client = running.client
    settings, engine, tracker = replica.settings, replica.engine, replica.tracker
    assert replica.criu is not None and replica.canary is not None
    try:
        # The engine may answer before its own warm-up, which a snapshot must not catch halfway.
        engine.wait_healthy(client, Probe(lambda: running.place.exit_code(running.pid), running.last_line, START_UP_S))
        # Warm up only for a snapshot. Without one, the held requests are served at once, as the engine alone would.
        engine.warm_up(client, replica.canary)
    except LauncherError as error:
        if settings.strict:
            raise
        log.warning("no snapshot: %s; the engine serves without one", error)
        return
    weight_bytes, asleep, excluded = 0, False, False
    offloading = False  # an offload without an answer leaves an engine that may or may not have its memory
    awake: dict[str, int] | None = None
    try:
        tracker.to(Phase.TRIMMING)
        limit_s = max(LEAST_PROOF_S, PROOF_SHARE * cold_s)
        identity = compatibility.check_unchanged(settings, replica.weights, replica.criu, replica.identity, limit_s)
        driver = replica.driver()
        gpu = driver is not None and _uses_gpu(driver, sandbox)
        if gpu:
            running.leave_gpu = partial(ending.leave, replica, sandbox, client)
        canary = engine.record(client, gpu, replica.canary)
        excluded = _excludes_weights(replica, client, gpu)
        kv_bytes = 0
        if settings.trim:
            model = replica.weights.engine_path if replica.weights.path else ""
            control.exclude_weights(sandbox.control_dir, model if excluded else None)
            when_idle(lambda: engine.trim(client), lambda: replica.stop_requested)
            control.exclude_weights(sandbox.control_dir, None)
            if driver is not None and gpu:
                awake = _free_memory(driver)
                offloading = True
                asleep = engine.offload(client, replica.command, excluded)
                offloading = False
            kv_bytes = control.bytes_dropped(sandbox.control_dir, "kv")
            weight_bytes = control.bytes_dropped(sandbox.control_dir, "weights")
            control.trim_all(sandbox.init_pid, sandbox.control_dir)
        else:
            try:
                engine.name_weights(client)
            except LauncherError as error:  # this affects only the speed of a restore
                log.info("restores will copy the weights: %s", one_line(error))
        tracker.to(Phase.CHECKPOINTING)
        draft = Snapshot(
            format=FORMAT,
            name=replica.snapshot_name,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            engine=settings.engine,
            model=settings.command.model,
            model_digest=identity.model,
            weights="excluded" if weight_bytes or (asleep and excluded) else "included",
            identity=identity.record().encode(),
            root_pid=running.pid,
            top_pid=running.pid,
            port=running.port,
            pipes={stream: output.name for stream, output in running.outputs.items()},
            monotonic_ns=0,
            canary=canary,
            image_bytes=0,
            kv_cache_bytes=kv_bytes,
            cold_s=round(cold_s, 3),
            timeline=[TimelinePhase(str(span.phase), round(span.took_s, 4)) for span in replica.start_spans()],
            files={},
            asleep=asleep,
            model_path=replica.weights.engine_path if replica.weights.path else "",
            cwd=os.getcwd(),
            weight_areas=control.weight_areas(sandbox.control_dir),
        )
        from checkpoint.snapshot.digests import digest_folder

        replica.snapshot = dump.take(
            replica.library,
            replica.criu,
            sandbox,
            draft,
            compile_cache(replica.settings),
            digest_folder,
            _signer(replica),
            driver,
            visible=[gpu.uuid for gpu in replica.identity.host.gpus],
            awake=awake,
            extra=_weight_layout(sandbox.control_dir) if draft.weights == "excluded" else {},
        )
        replica.library.clear_failures(draft.name)
        paging.map_pages(replica.library, replica.snapshot)
    except Busy as error:
        log.info("not taking a snapshot: %s", error)
    except (CheckpointError, LauncherError, OSError) as error:
        stuck = offloading or (isinstance(error, CheckpointError) and error.code == "cuda-stuck")
        log.warning("no snapshot: %s%s", one_line(error), "" if stuck else "; the engine serves without one")
        if settings.strict:
            raise
        if stuck:
            raise NotResumed(error) from error
    weight_layout.forget(sandbox.control_dir)
    tracker.to(Phase.RESUMING)
    try:
        again = _resume(replica, client, asleep, bool(weight_bytes), excluded)
    except (LauncherError, OSError) as error:
        if settings.strict:
            raise
        _drop(replica, str(error))
        raise NotResumed(error) from error
    if replica.snapshot is not None and (differs := replica.snapshot.canary.difference(again)):
        log.warning("after its own dump the engine %s; the snapshot is removed", differs)
        _drop(replica, "canary-differs: after its own dump")
        if asleep or weight_bytes:  # what was reloaded is not what it had
            raise NotResumed(Integrity("canary-differs", f"it {differs}"))


def _weight_layout(answers: Path) -> dict[str, Path]:
    """Return the files from which a restore reads the excluded weights ahead; none, with one line, where the engine recorded none."""
    found = weight_layout.collect(answers)
    if isinstance(found, str):
        log.info("a restore leaves the weights to the engine's own reload: %s", found)
        return {}
    return found


def _drop(replica: StartContext, why: str) -> None:
    """Remove the snapshot just taken. If that fails, record a failure: launches then skip it and take it again."""
    if replica.snapshot is None:
        return
    name, replica.snapshot = replica.snapshot.name, None
    try:
        replica.library.remove(name)
    except CheckpointError as error:
        log.warning("snapshot %s is not removed: %s", name, error)
        replica.library.record_failure(name, why)


def _resume(replica: StartContext, client: Client, asleep: bool, dropped: bool, excluded: bool) -> Answer:
    """Reload what was offloaded and return the answer to the canary; [] if there is no snapshot to compare it with."""
    engine, model = replica.engine, replica.settings.command.model
    if asleep:
        engine.reload(client, model, excluded)
    elif dropped:
        engine.reload_weights(client, model)
    if replica.snapshot is None:
        assert replica.canary is not None
        engine.try_canary(client, replica.canary)
        return []
    return engine.answer(client, replica.snapshot.canary)


def on_gpu(replica: StartContext) -> bool:
    """Return True if this launch's snapshot will hold GPU state, as far as is known before the engine runs."""
    settings = replica.settings
    return (
        settings.take_snapshot
        and not replica.capabilities.new_snapshots
        and replica.driver() is not None
        and bool(replica.identity.host.gpus)
        and not replica.multi_gpu()
    )


def _uses_gpu(driver: Driver, sandbox: Sandbox) -> bool:
    """Return True if a process of the engine holds a CUDA context: an engine may compute on the CPU of a GPU host."""
    from checkpoint.cuda import checkpoint as cuda

    return bool(cuda.holders(driver, process_tree.processes(sandbox.init_pid)))


def _free_memory(driver: Driver) -> dict[str, int]:
    """Return free bytes per GPU while the engine holds all of its memory."""
    from checkpoint.cuda import checkpoint as cuda

    return cuda.free_memory(driver)


def _excludes_weights(replica: StartContext, client: Client, gpu: bool) -> bool:
    """Return True if the snapshot excludes the weights: as configured, or (`auto`) the faster way as measured on this host."""
    configured = replica.settings.weights
    if gpu and configured != "included" and (why := _unsafe(replica)):
        log.log(
            logging.WARNING if configured == "excluded" else logging.INFO, "weights included: reload-unsafe: %s", why
        )
        return False
    if configured != "auto":
        return configured == "excluded"
    if not can_reload(replica.settings.command):
        log.info("weights included: the engine cannot reload weights of this --load-format, or of a single file")
        return False
    size, home = replica.weights.size, replica.settings.home
    if size < SMALL:
        log.info("weights included: %.0f MB delay a restore too little to measure", size / 1e6)
        return False
    known = restore_rates.measured(home, gpu)
    rate, source = (
        (known[0], f"{known[1]} restores here") if known else (restore_rates.probe(home), "a probe, no restore yet")
    )
    carry_s = size / rate
    estimate = f"carrying {size / 1e9:.2f} GB costs a restore {carry_s:.2f} s at {rate / 1e9:.1f} GB/s ({source})"
    if carry_s < WORTH_S:
        log.info("weights included: %s, so excluding them could not win much", estimate)
        return False
    began = time.monotonic()
    try:
        replica.engine.reload_weights(client, replica.settings.command.model)
    except LauncherError as error:
        log.warning("weights included: the engine cannot reload them (%s)", error)
        return False
    reload_s = time.monotonic() - began
    chosen = "excluded" if reload_s < carry_s else "included"
    log.info("weights %s: %s, and reloading them took %.2f s", chosen, estimate, reload_s)
    return chosen == "excluded"


def _unsafe(replica: StartContext) -> str:
    """Return why the engine's own reload may not bring back all weights that a GPU has lost, or "". Raises CheckpointError."""
    path = replica.weights.path
    return replica.engine.unsafe_reload(replica.command, Path(path) if path else None, replica.identity.engine)


def _signer(replica: StartContext) -> Callable[[bytes], bytes] | None:
    if replica.settings.sign_key is None:
        return None
    from checkpoint.snapshot.signatures import signer

    return signer(replica.settings.sign_key)


def one_line(error: Exception) -> str:
    """Format an error for the log."""
    return str(disk.failure("it is not written", error)) if isinstance(error, OSError) else str(error)


def refusal(error: Incompatible) -> str:
    """Format a refusal with all of its reasons for the log."""
    more = [reason for reason in error.reasons if reason != error.code]
    return f"{error}; also: {', '.join(more)}" if more else str(error)
