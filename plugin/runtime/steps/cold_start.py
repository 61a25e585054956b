"""Begin a cold start: start the engine's process, in a sandbox if this host can make one."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.errors import CheckpointError
from checkpoint.sandbox.sandbox import CACHE_DIR, Sandbox, SandboxConfig
from launchers.bare import BareProcess, free_port
from launchers.base import ENGINE_SITE, INNER_PORT
from launchers.engine_site import engine_site
from launchers.errors import EngineDied, LauncherError
from launchers.readiness import Probe
from plugin.runtime import way_out
from plugin.runtime.capabilities import forget, sandbox_reason
from plugin.runtime.home import unusable
from plugin.runtime.steps import take_snapshot
from plugin.runtime.steps.engine_output import Output
from plugin.runtime.steps.engine_process import Running, client_of
from plugin.runtime.steps.sandbox_binds import binds, compile_cache

if TYPE_CHECKING:
    from plugin.runtime.steps.compile_cache import CompileCache
    from plugin.runtime.steps.context import StartContext

log = logging.getLogger("quickthaw")


def begin(replica: StartContext, mounted: Path | None) -> Running:
    """Start the engine's process and return its handle. It reads the model from `mounted`, if the lazy mount is up.

    Raises LauncherError (engine-not-started), leaving no process or sandbox behind.
    """
    outputs = {"stdout": Output(replica.stdout), "stderr": Output(replica.stderr)}
    place: Sandbox | BareProcess | None = None if replica.capabilities.sandbox else _sandbox(replica, mounted)
    sandboxed = place is not None
    if place is not None:
        port, site, cache = INNER_PORT, ENGINE_SITE, CACHE_DIR
    else:
        place, port = BareProcess(on_exit=replica.on_exit()), free_port()
        site, cache = _folders(replica)
    environment = replica.engine.environment(
        replica.settings.given_environment,
        replica.settings.command,
        sandboxed=sandboxed,
        site=site,
        cache=cache,
    )
    command = replica.settings.command
    if isinstance(place, Sandbox) and place.config.egress and way_out.online(replica.settings):
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environment.pop(name, None)
            if given := replica.settings.given_environment.get(name):
                environment[name] = given
    if sandboxed and replica.weights.hub_cache:
        environment["HF_HUB_CACHE"] = replica.weights.hub_cache
    if sandboxed and replica.weights.hub and replica.weights.hub.names_model:
        more = replica.engine.hub_arguments(command, replica.settings.given_environment)
        command = replace(command, arguments=(*command.arguments, *more))
    if sandboxed:
        command = replace(command, arguments=(*command.arguments, *replica.engine.control_arguments()))
    if sandboxed and take_snapshot.on_gpu(replica):
        extra = replica.engine.gpu_arguments(command, replica.identity.engine, environment)
        command = replace(command, arguments=(*command.arguments, *extra))
    replica.command = command
    argv = replica.engine.command(replica.settings.engine_python, command, "127.0.0.1", port)
    client = client_of(place, port, command)
    try:
        pid = place.start(argv, environment, os.getcwd(), outputs["stdout"].write_fd, outputs["stderr"].write_fd)
    except (CheckpointError, LauncherError) as error:
        place.close()
        raise LauncherError(
            "engine-not-started", f"{error}; give the engine's interpreter with --engine-python"
        ) from error
    finally:
        for output in outputs.values():
            output.close_write_end()
    return Running(place, pid, port, client, outputs)


class ModelLost(LauncherError):
    """The engine ended since the lazy mount did."""


def wait_ready(replica: StartContext, running: Running) -> None:
    """Wait until the engine is ready, and keep the canary that it answers. Raises LauncherError: ModelLost where another start can help."""

    def died() -> int | None:
        replica.weights.watch()
        return running.place.exit_code(running.pid)

    probe = Probe(died, running.last_line, replica.settings.start_timeout_s)
    try:
        replica.canary = replica.engine.wait_ready(running.client, probe)
    except EngineDied as error:
        if isinstance(running.place, Sandbox) and replica.weights.daemon_died():
            raise ModelLost(
                "weights-lost", "the daemon of the lazy mount ended while the engine read its model"
            ) from error
        raise


def _sandbox(replica: StartContext, mounted: Path | None) -> Sandbox | None:
    """Return a sandbox for the engine, or None (logged) if this host refuses one. Raises HostLacks with `--strict`."""
    try:
        facts = replica.criu.kernel_facts(replica.settings.home) if replica.criu else None
        shown = binds(replica.settings, replica.weights, mounted, replica.weights.engine_path if mounted else "")
        egress = way_out.of(replica.settings, replica.weights)
        sandbox = Sandbox(SandboxConfig(binds=shown, kernel_facts=facts, egress=egress), on_exit=replica.on_exit())
        try:
            sandbox.wait_egress()
        except BaseException:
            sandbox.close()
            raise
        return sandbox
    except CheckpointError as error:
        if error.code in ("egress-missing", "egress-failed"):  # a sandbox can be made, and has no way out
            replica.turn_off(str(error), error)
            return None
        forget(replica.settings.home)
        replica.turn_off(sandbox_reason(error), error)
    except OSError as error:
        replica.turn_off(unusable(replica.settings.home) or f"host-io: {error}", error)
    return None


def _folders(replica: StartContext) -> tuple[str, str]:
    """Return the folders of an unsandboxed engine: its PYTHONPATH and its compile cache; "" for both when they are unavailable."""
    if unusable(replica.settings.home):
        return "", ""
    try:
        return str(engine_site(replica.settings.home, Path(__file__).parents[2] / "engine")), str(
            compile_cache(replica.settings)
        )
    except OSError as error:
        log.info("compile caches stay where the engine keeps them: %s", error)
        return "", ""


def kept_cache(replica: StartContext) -> CompileCache | None:
    """Return the compile cache in the snapshot store, or None when no store is given or the cache cannot be trusted."""
    url = replica.settings.snapshot_store
    if url is None or unusable(replica.settings.home):
        return None
    try:
        name = replica.identity.compile_cache
    except CheckpointError as error:
        log.warning("compile cache not used: %s", error)
        return None
    from plugin.runtime.steps.compile_cache import CompileCache

    keys, sign_key = replica.settings.trust_keys, replica.settings.sign_key
    return CompileCache(compile_cache(replica.settings), url, name, keys, sign_key)
