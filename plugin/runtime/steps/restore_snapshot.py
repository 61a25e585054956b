"""Restore a replica from its snapshot: check that it fits, let CRIU restore it, wake the engine, run the canary.

Counterpart of take_snapshot. plugin/runtime/replica.py chooses the snapshot and the way, and handles a failure.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.errors import Failed, Integrity
from checkpoint.snapshot import restore, speculative
from launchers import control
from launchers.errors import LauncherError
from plugin.records import restore_rates
from plugin.runtime import way_out
from plugin.runtime.gpu import ending
from plugin.runtime.phases import Phase
from plugin.runtime.steps.engine_output import Output
from plugin.runtime.steps.engine_process import Running, client_of
from plugin.runtime.steps.model_mount import model_place
from plugin.runtime.steps.sandbox_binds import binds, compile_cache
from plugin.runtime.weight_ring.feed import WeightFeed

if TYPE_CHECKING:
    from checkpoint.compatibility.check import Identity as IdentityRecord
    from checkpoint.sandbox.sandbox import Sandbox
    from checkpoint.snapshot.manifest import Answer, Snapshot
    from plugin.runtime.steps.context import RestoreContext

log = logging.getLogger("quickthaw")


def run(replica: RestoreContext, name: str, served: bool) -> None:
    """Restore the snapshot `name` and return once the replica serves.

    `served`: a page server puts the pages in place, those of the working set first or, for GPU state and `--no-lazy`, all
    of them before the engine runs. Otherwise CRIU does, before it returns.

    The caller holds the snapshot's lock (`Fetching.held`) and ends what is left after an error. Raises CheckpointError
    or LauncherError.
    """
    with WeightFeed(replica.tracker) as feed:
        _run(replica, name, served, feed)


def _run(replica: RestoreContext, name: str, served: bool, feed: WeightFeed) -> None:
    assert replica.criu is not None
    began = time.monotonic()
    replica.page_server_error = ""
    replica.mounting()
    snapshot = replica.library.load(name)
    replica.on_gpu = snapshot.gpu.processes > 0
    if snapshot.asleep:  # its engine runs with what an offload needs, on the way to standby too
        given = replica.settings.command
        replica.command = replace(given, arguments=(*given.arguments, replica.engine.offload_flag))
    lazy = served and replica.settings.lazy_restore
    if replica.settings.trust_keys and not replica.fetching.unfinished:
        from checkpoint.snapshot.signatures import check_folder

        check_folder(replica.library.path(name), replica.settings.trust_keys)
    recorded = replica.check_identity(snapshot)
    place = model_place(snapshot, replica.weights, replica.settings.named)
    excluded, fetching = snapshot.weights == "excluded", replica.fetching.unfinished
    ringed = excluded and not fetching and begin_weights(replica, name, place, feed)
    mounted = replica.weights.mounted()
    shown = binds(replica.settings, replica.weights, mounted, place)
    replica.spans = {"identity": time.monotonic() - began}
    replica.cancellation = restore.Cancellation()
    replica.fetching.watch(replica.on_page_server_failed)
    later = _lazy(replica, snapshot, fill=not lazy) if served else None
    replica.recording = bool(later and later.record)
    replica.tracker.to(Phase.RESTORING)
    outputs = {
        "stdout": Output(replica.stdout, pipe=speculative.take_pipe("stdout")),
        "stderr": Output(replica.stderr, pipe=speculative.take_pipe("stderr")),
    }
    try:
        if not replica.fetching.ready(lazy, snapshot):
            _verify(replica, name, snapshot)
        if excluded and fetching:  # until now the layout was not here
            ringed = begin_weights(replica, name, place, feed)
        _check_cpu(replica, name, recorded)
        restored = restore.restore(
            replica.library,
            replica.criu,
            snapshot,
            shown,
            compile_cache(replica.settings),
            {stream: output.write_fd for stream, output in outputs.items()},
            on_exit=replica.on_exit(),
            lazy=later,
            driver=replica.driver(),
            gpu_pairs=_gpu_pairs(replica, recorded),
            underway=replica.underway.set,
            cancellation=replica.cancellation,
            egress=way_out.recorded(recorded.arguments),
            before_kill=partial(ending.leave, replica),
        )
    finally:
        for output in outputs.values():
            output.close_write_end()
    replica.spans |= restored.spans
    for work, (at, until) in restored.times.items():
        replica.tracker.worked(work, at, until)
    parts = {part: round(took, 4) for part, took in replica.spans.items()}
    log.debug("parts of the restore%s: %s", ", begun speculatively" if restored.begun_speculatively else "", parts)
    sandbox = restored.sandbox
    client = client_of(sandbox, snapshot.port, replica.settings.command)
    running = Running(sandbox, restored.root_pid, snapshot.port, client, outputs, restored)
    if snapshot.gpu.processes:
        running.leave_gpu = partial(ending.leave, replica, sandbox, client)
    replica.set_running(running)
    if replica.page_server_error:  # lost before `running` was set
        raise Failed("pages-lost", replica.page_server_error)
    sandbox.wait_egress()
    replica.tracker.to(Phase.WAKING)
    _wake(replica, running, snapshot, recorded, None if mounted or ringed else place, feed)
    check(replica, running, snapshot, feed.settle(), feed)
    replica.library.clear_failures(name)
    replica.snapshot, replica.restored = snapshot, True
    replica.serve()
    log.debug(
        "begin and end: %s", {one.name: (round(one.at_s, 3), round(one.until_s, 3)) for one in replica.tracker.work}
    )
    if restored.plan and not replica.settings.trust_keys:
        speculative.save_plan(restored.plan)
    if restored.pages:
        if replica.recording:
            log.info("this first restore records the snapshot's working set; later restores load it first")
        replica.page_follower.begin(replica.library, snapshot, restored.pages, recording=replica.recording)
    if (replica.on_gpu or not restored.pages) and replica.page_follower.pace.measured:
        took_s = restored.spans["criu"] + restored.spans.get("fill", 0.0)
        restore_rates.remember(replica.settings.home, snapshot.image_bytes, took_s, replica.on_gpu)


def begin_weights(replica: RestoreContext, name: str, place: str, feed: WeightFeed) -> bool:
    """Begin to read the excluded weights; return whether the engine needs no mount for them.

    Their ring reads a model's own files, or else the mount. The mount is made in a thread: it prefetches what the last load
    read while CRIU is at work.
    """
    folder, weights = replica.library.path(name), replica.weights
    if weights.in_place and feed.begin(folder, place, weights.path):
        return True
    if weights.in_place:
        threading.Thread(target=weights.mount, name="weights", daemon=True).start()
    else:
        feed.begin_later(folder, place, lambda: weights.mount() or weights.path)
    return False


def save_next_plan(replica: RestoreContext, snapshot: Snapshot) -> None:
    """Save the plan of this command line's first restore, which can then begin as early as the later ones do.

    Only for a snapshot with its weights, of which this host has the working set: else the plan depends on the lazy
    mount, or is made for recording. A plan that does not fit is not used. Raises CheckpointError, OSError.
    """
    if replica.criu is None or replica.settings.trust_keys or not replica.settings.lazy_restore:
        return
    lazy = _lazy(replica, snapshot)
    if snapshot.weights != "included" or snapshot.gpu.processes or lazy.record:
        return
    from checkpoint.compatibility.check import Identity

    place = model_place(snapshot, replica.weights, replica.settings.named)
    shown = binds(replica.settings, replica.weights, None, place)
    egress = way_out.recorded(Identity.decode(snapshot.identity).arguments)
    speculative.save_plan(
        restore.next_plan(replica.library, replica.criu, snapshot, shown, ("stdout", "stderr"), lazy, egress)
    )


def _lazy(replica: RestoreContext, snapshot: Snapshot, fill: bool = False) -> restore.LazyRestore:
    """Return how the pages come: all at once (`fill`), or by the working set what has no GPU state."""
    known = replica.library.working_set(snapshot.name)
    only: tuple[int, ...] = ()
    if snapshot.gpu.processes and not fill:
        only = restore.gpu_processes(replica.library, snapshot)
        fill = not only
    recorded = known.exists() or fill
    return restore.LazyRestore(
        known if recorded and not fill else None,
        not recorded,
        replica.on_page_server_failed,
        lambda text: log.warning("%s", text),
        replica.fetching.downloading,
        pack=replica.settings.verify != "always",
        fill=fill or bool(only),
        fill_only=only,
    )


def _verify(replica: RestoreContext, name: str, snapshot: Snapshot) -> None:
    if replica.settings.verify == "never":
        return
    from checkpoint.snapshot.digests import verify

    verify(replica.library.path(name), snapshot.files, always=replica.settings.verify == "always")


def _check_cpu(replica: RestoreContext, name: str, recorded: IdentityRecord) -> None:
    """Run CRIU's own CPU check if this processor differs from the snapshot's."""
    from checkpoint.compatibility.check import same_cpu

    assert replica.criu is not None
    if not same_cpu(recorded.host, replica.identity.host):
        replica.criu.check_cpu(replica.library.path(name) / "images")


def _gpu_pairs(replica: RestoreContext, recorded: IdentityRecord) -> list[tuple[str, str]]:
    if not recorded.host.gpus:
        return []
    from checkpoint.cuda.checkpoint import gpu_pairs

    return gpu_pairs(recorded.host.gpus, replica.identity.host.gpus)


def _wake(
    replica: RestoreContext,
    running: Running,
    snapshot: Snapshot,
    recorded: IdentityRecord,
    unmounted: str | None,
    feed: WeightFeed,
) -> None:
    """Renew the engine's environment, signal its processes, and reload what was left out of the snapshot.

    `unmounted`: where the engine reads its model, if the lazy mount was not up when the sandbox was made.
    """
    assert running.restored is not None
    sandbox = running.restored.sandbox
    excluded = snapshot.weights == "excluded"
    try:
        control.renew(sandbox.control_dir, recorded.renewed, replica.identity.renewed)
    except OSError as error:
        raise Failed("sandbox-gone", f"the sandbox ended while it was woken ({error.strerror})") from error
    control.notify(sandbox.init_pid, control.WAKE)
    if excluded and unmounted is not None:
        _wait_weights(replica, sandbox, unmounted)
    if excluded:
        feed.offer(sandbox.control_dir)
    if snapshot.asleep:
        replica.engine.reload(running.client, snapshot.model, excluded)
    elif excluded:
        replica.engine.reload_weights(running.client, snapshot.model)


def _wait_weights(replica: RestoreContext, sandbox: Sandbox, place: str) -> None:
    mounted = replica.weights.mount()
    if mounted:
        sandbox.attach(mounted, Path(place))


def check(replica: RestoreContext, running: Running, snapshot: Snapshot, filled: bool, feed: WeightFeed) -> None:
    """Run the canary. If it differs after weights from the ring (`filled`), repeat it after the engine's own reload.

    Raises Integrity (canary-differs).
    """
    try:
        check_canary(replica, running, snapshot)
    except Integrity as error:
        if not filled:
            raise
        log.warning("weights-ring-differs: %s; reloading its weights itself, from now on", error)
        feed.distrust()
        replica.engine.reload_weights(running.client, snapshot.model)
        check_canary(replica, running, snapshot)


def check_canary(replica: RestoreContext, running: Running, snapshot: Snapshot) -> None:
    """Run the canary and compare its answer. Raises Integrity (canary-differs) if they differ.

    The canary is sent first. A waiting request runs beside it, and its answer is held until the canary has ended.
    """

    def sent() -> None:
        if replica.tracker.phase is not Phase.VERIFYING:  # it is when the check is repeated
            replica.tracker.to(Phase.VERIFYING)

    got = _answer(replica, running, snapshot, sent, replica.expects())
    if snapshot.canary.difference(got) and replica.cancel_requests():
        # Rounding may differ between a batch of two and a batch of one, so repeat it alone.
        log.debug("beside a request the engine %s; repeating the canary alone", snapshot.canary.difference(got))
        got = _answer(replica, running, snapshot)
    if differs := snapshot.canary.difference(got):
        raise Integrity("canary-differs", f"the restored engine {differs}")


def _answer(
    replica: RestoreContext,
    running: Running,
    snapshot: Snapshot,
    sent: Callable[[], None] | None = None,
    joined: bool = False,
) -> Answer:
    client = replace(running.client, sent=sent)
    try:
        return replica.engine.answer(client, snapshot.canary, joined)
    except LauncherError as error:
        raise Failed("canary-failed", f"the restored engine does not answer: {error}") from error
