"""`python -m plugin.restore [OPTIONS] SNAPSHOT`: serve a replica from a named snapshot, behind the proxy.

Unlike `launch` it needs no engine arguments and never starts cold: it serves this snapshot or fails.
"""

from __future__ import annotations

# This comes first: helper processes work while this process imports its modules.
if __name__ == "__main__":
    import sys

    from plugin.startup import pid1

    pid1.begin(["restore", *sys.argv[1:]])

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from plugin.launch import start_log
from plugin.options import option, replica, replica_settings_of, serving, using


def _argument(identity: Mapping[str, Any], *flags: str) -> str:
    """Return the value that the engine's command line gave one of these flags, or ""."""
    for flag in flags:
        for values in identity.get("arguments", {}).get(flag, ()):
            return str(values[0]) if values else ""
    return ""


@click.command()
@click.argument("snapshot")
@using(
    option("--host", show_default="the engine's own", help="Address to listen on."),
    option("--port", type=click.IntRange(0, 65535), show_default="the engine's own", help="Port to listen on."),
    option("--uds", metavar="PATH", help="UNIX socket to listen on, in place of host and port."),
    option("--ssl-certfile", metavar="PATH", help="Certificate with which to serve TLS."),
    option("--ssl-keyfile", metavar="PATH", help="Key of --ssl-certfile, if it is not in that file."),
    option("--ssl-keyfile-password", help="Password of --ssl-keyfile."),
    option("--ssl-ca-certs", metavar="PATH", help="Certificates with which to check those of clients."),
    option(
        "--ssl-cert-reqs",
        type=click.Choice(["0", "1", "2"]),
        default="0",
        help="Certificates of clients: 0 none, 1 optional, 2 required.",
    ),
    option("--enable-ssl-refresh", is_flag=True, help="Read changed files of --ssl-… again."),
    option("--api-key", help="The key that the engine was started with, for the canary."),
    option("--admin-api-key", help="SGLang's key for its control endpoints, if it was started with one."),
    *replica,
    *serving,
)
def restore(snapshot: str, **options: Any) -> int:
    """Serve a replica from a named snapshot.

    \b
    quickthaw snapshot ls
    quickthaw restore vllm-llama-3f9a1c2b7d --port 8000
    quickthaw restore NAME --replicas 4
    quickthaw restore NAME --snapshot-store s3://bucket/quickthaw
    """
    import launchers
    from checkpoint.snapshot.library import Library
    from launchers.base import EngineCommand, shutdown_timeout
    from launchers.options.tls import Tls
    from plugin.runtime.config import LaunchSettings, state_home
    from plugin.runtime.run import launch
    from plugin.runtime.steps.snapshot_fetch import manifest_of

    start_log(options)
    home = state_home()
    found = manifest_of(Library(home), options["snapshot_store"], snapshot, options["trust_key"])
    engine = launchers.engine(found.engine)
    host = options["host"] or engine.default_host
    port = engine.default_port if options["port"] is None else options["port"]
    interpreter = found.identity.get("engine", {}).get("interpreter", sys.executable)
    key = options["api_key"] or engine.key_from(os.environ)
    # Use the folder that the engine reads, whatever the current directory: the model name on its command line may be a relative path.
    model = found.model_path if Path(found.model_path or "/nonexistent").is_dir() else found.model
    # What the engine may take to finish its requests is not cut short.
    options["grace"] = max(options["grace"], shutdown_timeout(_argument(found.identity, "--shutdown-timeout")))
    return launch(
        LaunchSettings(
            engine=found.engine,
            command=EngineCommand(
                found.engine,
                (),
                model,
                host,
                port,
                key,
                admin_key=options["admin_api_key"],
                root_path=_argument(found.identity, *engine.root_path_flags),
                uds=options["uds"] or "",
                tls=Tls.of(options | {"ssl_refresh": options["enable_ssl_refresh"]}),
            ),
            engine_python=str(interpreter),
            home=home,
            name=snapshot,
            mount=Path(model).is_dir(),
            take_snapshot=False,
            named=True,
            **replica_settings_of(options),
        )
    )


def main() -> None:
    """Run `python -m plugin.restore`."""
    from plugin.cli import run

    sys.modules["plugin.restore"] = sys.modules["__main__"]  # the command group must not execute this file again
    run(["restore", *sys.argv[1:]])


if __name__ == "__main__":
    main()
