"""A cold start's beginning: the engine's process, in a sandbox where this host can make one."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.errors import CheckpointError
from checkpoint.sandbox import CACHE_DIR, Sandbox, SandboxConfig
from launchers.bare import BareProcess, free_port
from launchers.base import ENGINE_SITE, INNER_PORT
from launchers.client import Client
from launchers.engine_site import engine_site
from launchers.errors import LauncherError
from plugin import taking
from plugin.output import Output
from plugin.running import Running

if TYPE_CHECKING:
    from plugin.compile_cache import CompileCache
    from plugin.replica import Replica

log = logging.getLogger("quickthaw")


def begin(replica: Replica, mounted: Path | None) -> Running:
    """Start the engine's process; its model from `mounted`, where the lazy mount is up. Raises LauncherError (engine-not-started); then
    nothing is left."""
    outputs = {"stdout": Output(replica.stdout), "stderr": Output(replica.stderr)}
    sandboxed = not replica.layers.sandbox
    site = engine_site(replica.settings.home, Path(__file__).parent / "engine")
    folder = replica.compile_cache()
    place: Sandbox | BareProcess
    if sandboxed:
        facts = replica.criu.kernel_facts(replica.settings.home) if replica.criu else None
        binds = replica.binds(mounted, replica.weights.shown_at if mounted else "")
        place = Sandbox(SandboxConfig(binds=binds, kernel_facts=facts), on_exit=replica.on_exit())
        port = INNER_PORT
    else:
        place = BareProcess(on_exit=replica.on_exit())
        port = free_port()
    environment = replica.engine.environment(
        replica.settings.given_environment,
        replica.settings.command,
        sandboxed=sandboxed,
        site=ENGINE_SITE if sandboxed else str(site),
        cache=CACHE_DIR if sandboxed else str(folder),
    )
    command = replica.settings.command
    if sandboxed and taking.on_gpu(replica):
        extra = replica.engine.gpu_arguments(command, replica.identity.engine.packages)
        command = replace(command, arguments=(*command.arguments, *extra))
    replica.command = command
    argv = replica.engine.command(replica.settings.engine_python, command, "127.0.0.1", port)
    client = Client(lambda: place.connect(port), replica.settings.command.api_key)
    try:
        pid = place.start(argv, environment, os.getcwd(), outputs["stdout"].write_fd, outputs["stderr"].write_fd)
    except (CheckpointError, LauncherError) as error:
        place.close()
        raise LauncherError(
            "engine-not-started", f"{error}; give the engine's interpreter with --engine-python"
        ) from error
    finally:
        for output in outputs.values():
            output.handed_over()
    return Running(place, pid, port, client, outputs)


def kept_cache(replica: Replica) -> CompileCache | None:
    """The archive of compiled code in the snapshot store, where one is given; None else, or where it may not be believed."""
    url = replica.settings.snapshot_store
    if url is None:
        return None
    try:
        name = replica.identity.compile_cache
    except CheckpointError as error:
        log.warning("compile cache not used: %s", error)
        return None
    from plugin.compile_cache import CompileCache

    keys, sign_key = replica.settings.trust_keys, replica.settings.sign_key
    return CompileCache(replica.compile_cache(), url, name, keys, sign_key)
