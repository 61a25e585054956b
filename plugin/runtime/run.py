"""Run a launch to its end: check this host, bind the ports, then run `launcher.Launch`."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import launchers
from checkpoint.compatibility.environment import classify
from launchers.errors import LauncherError, Usage
from launchers.model_source import why_plain
from plugin.proxy.descriptor_limit import LEAST_FILES_WITH_ENGINE, require_files
from plugin.runtime.capabilities import Capabilities, detect
from plugin.runtime.home import hidden, protect
from plugin.runtime.launcher import Launch
from plugin.runtime.listening import announcement, bind, bind_front
from plugin.runtime.steps.model_mount import Weights

if TYPE_CHECKING:
    from checkpoint.criu.binary import Criu
    from launchers.base import Engine
    from launchers.options.tls import Tls
    from plugin.proxy.tls import Certificates
    from plugin.runtime.config import LaunchSettings

log = logging.getLogger("quickthaw")


def prepare(settings: LaunchSettings) -> tuple[Engine, Criu | None, Capabilities, Weights]:
    """Return what a replica of this launch is made of, and log once what this host cannot do. Raises LauncherError."""
    for warning in protect(settings.home):
        log.warning("%s", warning)
    engine = launchers.engine(settings.engine)
    host = detect(settings.home)
    capabilities = host.capabilities
    weights = Weights.of(settings, enabled=settings.mount and not capabilities.mount)
    if not settings.named and (why := _why_plain(settings, weights)):
        capabilities = Capabilities(
            mount=why, sandbox=capabilities.sandbox or why, snapshots=capabilities.snapshots or why
        )
    capabilities.log_off()
    if host.state_folder and host.state_folder not in capabilities.off().values():
        log.warning("nothing new is kept: %s", host.state_folder)
    # --no-mount: lazy weights are not asked for
    lacking = (capabilities if settings.mount else replace(capabilities, mount=None)).off()
    if settings.strict and lacking:
        raise LauncherError("capability-off", f"--strict, and {', '.join(lacking)} are off here; see quickthaw doctor")
    return engine, host.criu, capabilities, weights


def launch(settings: LaunchSettings, stdout: int | None = 1, stderr: int | None = 2) -> int:
    """Run a launch to its end and return the exit code. Raises LauncherError for errors found before any process has started."""
    require_files(LEAST_FILES_WITH_ENGINE)
    engine, criu, capabilities, weights = prepare(settings)
    with contextlib.ExitStack() as bound:
        remedy = "choose another with the engine's --port"
        certificates = None
        if settings.command.tls:
            certificates = _certificates(settings.command.tls)
        run = Launch(settings, None, capabilities, None, certificates, bound, stdout=stdout, stderr=stderr)
        run.install_signal_handlers()  # before anybody can connect
        run.sock = bound.enter_context(bind_front(settings.command, remedy))
        if settings.admin_listen:
            run.admin_sock = bound.enter_context(bind(*settings.admin_listen, "choose another with --admin-listen"))
        prefix = settings.proxy.get("admin_prefix", "/-")
        log.info("%s", announcement(run.sock, run.admin_sock, prefix, certificates is not None))
        return _run(run, criu, engine, weights)


def _why_plain(settings: LaunchSettings, weights: Weights) -> str | None:
    """Return why the engine starts as it would alone, whatever this host can do, or None."""
    if why := why_plain(settings.command, settings.given_environment):
        return why
    if weights.path is None and not (weights.hub and weights.hub.names_model):
        return f"model-missing: {settings.command.model} is no path on this host and no hub name; check its spelling"
    return _hidden_input(settings)


def _hidden_input(settings: LaunchSettings) -> str | None:
    """Return why a sandboxed engine would not find a file that its launch names, or None."""
    read = classify(settings.given_environment).relevant.values()
    words = [os.getcwd(), settings.engine_python, *settings.command.arguments]
    for word in (*words, *(part for value in read for part in value.split(os.pathsep))):
        path = word.partition("=")[2] if word.startswith("--") else word
        if path.startswith("/") and (own := hidden(Path(path))) and os.access(path, os.F_OK):
            return f"input-hidden: {path} lies below {own}, where a sandbox has its own files; move it, for snapshots"
    return None


def _certificates(tls: Tls) -> Certificates:
    """Read the files of an engine's TLS options. Raises Usage (tls-files)."""
    from plugin.proxy.tls import Certificates  # takes some 15 ms, which a launch without TLS need not wait for

    try:
        return Certificates(**asdict(tls))
    except ValueError as error:
        raise Usage("tls-files", f"{error}; check the engine's --ssl-… options") from error


def _run(run: Launch, criu: Criu | None, engine: Engine, weights: Weights) -> int:
    try:
        run.begin(criu, engine, weights)
        return run.run()
    finally:
        for replica in run.replicas:
            if replica.running:
                replica.running.close()
        weights.close()
