"""`quickthaw proxy`: run the proxy for an existing endpoint, or for several models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plugin.proxy.options import Place, Seconds, knobs, shared

if TYPE_CHECKING:
    import socket

    from plugin.proxy.http.address import Upstream
    from plugin.proxy.settings import Settings

EPILOG = """\b
Examples:
  # in front of an engine that may be down, starting or scaled to zero
  quickthaw proxy --listen 0.0.0.0:8000 --upstream http://127.0.0.1:8001
\b
  # start the engine when a request comes, stop it after ten idle minutes
  quickthaw proxy --upstream http://127.0.0.1:8001 --idle-timeout 600 \\
      --wake 'exec vllm serve my-model --port 8001' --ready-model my-model
\b
  # several models, at most one awake
  quickthaw proxy --config models.yaml
"""


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _not_itself(upstream: Upstream | None, host: str, port: int) -> None:
    """Raise UsageError if the upstream is the proxy's own port: each request would loop forever."""
    spec = upstream.spec if upstream is not None else None
    if spec is None or spec["kind"] != "tcp" or spec["port"] != port:
        return
    if spec["host"] == host or (host in ("0.0.0.0", "::") and spec["host"] in ("localhost", "127.0.0.1", "::1")):
        raise click.UsageError(f"the upstream {spec['host']}:{port} is where this proxy itself listens")


def _denied(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    from plugin.proxy.http.path_rules import check_denied

    try:
        return tuple(check_denied(path) for path in value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command(epilog=EPILOG, context_settings={"show_default": True, "auto_envvar_prefix": "QUICKTHAW_PROXY"})
@click.option("--upstream", help="Where the engine listens: http://host:port, https://host or unix:/path.")
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A YAML file of several models."
)
@click.option(
    "--listen", type=Place(), default="127.0.0.1:8000", help="HOST:PORT of the public port; port 0 takes a free one."
)
@click.option("--wake", help="A command that brings the engine up. It may return, or stay as the engine itself.")
@click.option("--sleep", help="A command that puts it down. Without one, a wake command that stays is ended.")
@click.option(
    "--wake-url", help="A URL to POST to instead of a command; beside one, it wakes an engine that sleeps and stays up."
)
@click.option("--sleep-url", help="A URL to POST to instead of running a command.")
@click.option("--ready-path", default="/health", help="Answers 200 once the engine is ready.")
@click.option("--ready-model", help="Also generate one token with this model before it counts as ready.")
@click.option("--wake-timeout", type=click.FloatRange(min=0.1), default=600.0, help="Seconds a wake may take.")
@click.option("--idle-timeout", type=Seconds(), default="0", help="How long idle before sleep; 0: never.")
@click.option("--max-held", type=click.IntRange(min=0), default=4096, help="Requests that may wait at once.")
@click.option("--max-held-mb", type=click.IntRange(min=0), default=256, help="Megabytes of their bodies that are kept.")
@click.option(
    "--deny",
    multiple=True,
    callback=_denied,
    help="A path of the engine that must not be reached; may be given several times.",
)
@click.option("--root-path", default="", help="The engine's --root-path, behind which --deny holds as well.")
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, help="Processes on the one port; they share one wake."
)
@click.option(
    "--trust-forwarded", is_flag=True, help="Keep X-Forwarded-* of the client: a trusted proxy stands in front."
)
@click.option("--drain", type=Seconds(), default="30s", help="How long for what is in flight, at the end.")
@shared
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
@click.option(
    "--log-format", type=click.Choice(["auto", "json", "text"]), default="auto", help="auto: text at a terminal."
)
def proxy(**options: Any) -> None:
    """Hold requests while an engine is down, starting or asleep, and forward each exactly once.

    In front of one endpoint (--upstream), woken by a command or a hook when a request comes and put to sleep when
    idle; or of several models
    behind one port (--config). The log goes to standard error (JSON lines, text at a terminal); /-/ is a page for people, /-/metrics for
    Prometheus.

    Every option can be set by a variable: --idle-timeout is QUICKTHAW_PROXY_IDLE_TIMEOUT.
    """
    if (options["upstream"] is None) == (options["config"] is None):
        raise click.UsageError("give either --upstream or --config")
    settings = _settings(options)

    import asyncio

    import uvloop

    from plugin.proxy import logs

    logs.configure(options["log_level"], options["log_format"])
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(options, settings))
    except OSError as exc:
        raise click.ClickException(f"cannot listen: {exc.strerror or exc}") from exc


def _settings(options: dict[str, Any]) -> Settings:
    from plugin.proxy.settings import Settings

    try:
        return Settings(
            **knobs(options),
            denied_paths=frozenset(options["deny"]),
            root_path=options["root_path"],
            max_held=options["max_held"],
            max_held_bytes=options["max_held_mb"] << 20,
            trust_forwarded=options["trust_forwarded"],
            drain_s=options["drain"],
        )
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc


async def _serve(options: dict[str, Any], settings: Settings) -> None:
    import asyncio
    import os
    import signal

    from plugin.proxy.endpoints.endpoint import Endpoint, EndpointSpec
    from plugin.proxy.http.address import from_url
    from plugin.proxy.limits import raise_files
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.pool.router import Router
    from plugin.proxy.server import ProxyServer
    from plugin.proxy.workers.supervisor import Supervisor, listening_sockets
    from plugin.runtime.signals import stopping

    host, port = options["listen"]
    own_place = options["admin_listen"]
    owner: Any
    target: ReplicaPool | Router
    try:
        if options["config"] is not None:
            from plugin.proxy.endpoints.models import ModelRouter, Models, load

            config = load(options["config"])
            owner = Models(config)
            pools = owner.pools
            target = ModelRouter(config, pools)
        else:
            spec = EndpointSpec(
                upstream=from_url(options["upstream"]),
                wake=options["wake"],
                sleep=options["sleep"],
                wake_url=options["wake_url"],
                sleep_url=options["sleep_url"],
                ready_path=options["ready_path"],
                ready_model=options["ready_model"],
                wake_limit_s=options["wake_timeout"],
                idle_timeout_s=options["idle_timeout"] or None,
            )
            owner = Endpoint("default", spec)
            target = owner.pool
            pools = {"default": owner.pool}
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc

    for pool in pools.values():
        for replica in pool.replicas.values():
            _not_itself(replica.upstream, host, port)
    raise_files()
    sockets = listening_sockets(host, port, options["workers"], settings.backlog)
    admin_sock = listening_sockets(own_place[0], own_place[1], 1, 128)[0] if own_place else None
    supervisor: Supervisor | None = None
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    interrupts = 0

    def interrupted() -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            owner.kill()
            if supervisor is not None:
                supervisor.kill()
            os._exit(1)  # a second Ctrl-C ends at once, without draining
        stop.set()

    for number in stopping():
        loop.add_signal_handler(number, interrupted if number == signal.SIGINT else stop.set)
    where = _url(sockets[0])
    page = f"(for people: {_url(admin_sock) if admin_sock else where}{settings.admin_prefix}/)"
    await owner.start()
    if options["workers"] == 1:
        server = ProxyServer(target, settings)
        await server.start(sockets[0], admin_sock=admin_sock)
        click.echo(f"listening on {where} {page}", err=True)
        await stop.wait()
        await server.shutdown()
    else:
        config_path = str(options["config"]) if options["config"] is not None else None
        log = (options["log_level"], options["log_format"])
        supervisor = Supervisor(
            list(pools.values()), settings, sockets, config=config_path, admin_sock=admin_sock, log=log
        )
        await supervisor.start()
        click.echo(f"listening on {where} with {options['workers']} workers {page}", err=True)
        await stop.wait()
        await supervisor.shutdown(settings.drain_s)
    await owner.close()
