"""Run a launch to its end: check this host, bind the ports, then run `launcher.Launch`."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

import launchers
from checkpoint.snapshot.library import Library
from launchers.errors import LauncherError
from launchers.model_source import why_plain
from plugin.proxy.descriptor_limit import LEAST_FILES_WITH_ENGINE, require_files
from plugin.runtime.capabilities import Capabilities, detect
from plugin.runtime.home import exposed, unusable
from plugin.runtime.launcher import Launch
from plugin.runtime.listening import announcement, bind
from plugin.runtime.steps.model_mount import Weights

if TYPE_CHECKING:
    from checkpoint.criu.binary import Criu
    from launchers.base import Engine
    from plugin.runtime.config import LaunchSettings

log = logging.getLogger("quickthaw")


def launch(settings: LaunchSettings, stdout: int | None = 1, stderr: int | None = 2) -> int:
    """Run a launch to its end and return the exit code. Raises LauncherError for errors found before any process has started."""
    require_files(LEAST_FILES_WITH_ENGINE)
    if open_to_others := exposed(settings.home):
        log.warning("%s", open_to_others)
    engine = launchers.engine(settings.engine)
    capabilities, criu = detect(settings.home)
    full = unusable(settings.home)
    if full and not Library(settings.home).names():
        # A restore of an existing snapshot writes almost nothing and may still succeed.
        capabilities = Capabilities.none(full)
    weights = Weights.of(settings, enabled=settings.mount and not capabilities.mount)
    if not settings.named and (why := _why_plain(settings, weights)):
        capabilities = Capabilities(
            mount=why, sandbox=capabilities.sandbox or why, snapshots=capabilities.snapshots or why
        )
    capabilities.log_off()
    if settings.strict and capabilities.off():
        raise LauncherError(
            "capability-off", f"--strict, and {', '.join(capabilities.off())} are off here; see quickthaw doctor"
        )
    with contextlib.ExitStack() as bound:
        remedy = "choose another with the engine's --port"
        sock = bound.enter_context(bind(settings.command.host, settings.command.port, remedy))
        admin_sock = None
        if settings.admin_listen:
            admin_sock = bound.enter_context(bind(*settings.admin_listen, "choose another with --admin-listen"))
        log.info("%s", announcement(sock, admin_sock, settings.proxy.get("admin_prefix", "/-")))
        run = Launch(settings, sock, capabilities, admin_sock, stdout=stdout, stderr=stderr)
        return _run(run, criu, engine, weights)


def _why_plain(settings: LaunchSettings, weights: Weights) -> str | None:
    """Return why the engine starts as it would alone, whatever this host can do, or None."""
    if why := why_plain(settings.command, settings.given_environment):
        return why
    if weights.path is None and not (weights.hub and weights.hub.names_model):
        return f"model-missing: {settings.command.model} is no path on this host and no hub name; check its spelling"
    return None


def _run(run: Launch, criu: Criu | None, engine: Engine, weights: Weights) -> int:
    run.install_signal_handlers()
    try:
        run.begin(criu, engine, weights)
        return run.run()
    finally:
        for replica in run.replicas:
            if replica.running:
                replica.running.close()
        weights.close()
