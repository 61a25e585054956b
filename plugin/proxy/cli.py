"""`quickthaw proxy`: run the proxy for an existing endpoint, or for several models."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plugin.options import (
    Address,
    Duration,
    consume_variables,
    log_level,
    option,
    serving,
    settings_of,
    using,
    warn,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from plugin.proxy.http.address import Upstream
    from plugin.proxy.kubernetes.workload import Workload
    from plugin.proxy.settings import Settings

log = logging.getLogger("quickthaw.proxy")
EPILOG = """\b
Examples:
  # in front of an engine that may be down, starting or scaled to zero
  quickthaw proxy --listen :8000 --upstream http://127.0.0.1:8001
\b
  # start the engine when a request comes, stop it after ten idle minutes
  quickthaw proxy --upstream http://127.0.0.1:8001 --sleep-after 10m \\
      --wake 'exec vllm serve my-model --port 8001' --ready-model my-model
\b
  # in front of a Deployment: scaled from zero when a request comes, back to zero after ten idle minutes
  quickthaw proxy --listen :8000 --upstream k8s://models/llama:8000 --sleep-after 10m
\b
  # several models, at most one awake
  quickthaw proxy --config models.yaml
"""


def _refuse_own_address(upstream: Upstream | None, host: str, port: int) -> None:
    """Raise UsageError if the upstream is the proxy's own port: each request would loop forever."""
    spec = upstream.spec if upstream is not None else None
    if spec is None or spec["kind"] != "tcp" or spec["port"] != port:
        return
    if spec["host"] == host or (host in ("0.0.0.0", "::") and spec["host"] in ("localhost", "127.0.0.1", "::1")):
        raise click.UsageError(f"the upstream {spec['host']}:{port} is where this proxy itself listens")


def _read_import(path: Path) -> None:
    """Raise UsageError unless it is a configuration of llama-swap; warn of what has no counterpart."""
    from plugin.proxy.endpoints.models_file import check_import

    try:
        check_import(path, warn)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _read_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Take the file's settings as defaults of the other options: a variable or an option takes precedence."""
    if value is not None and not ctx.resilient_parsing:
        from plugin.proxy.endpoints.models_file import settings_in

        try:
            ctx.default_map = settings_in(value, warn)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    return value


@click.command(epilog=EPILOG)
@using(
    option(
        "--upstream",
        help="Where the engine listens: http://host:port, https://host or unix:/path; or a workload of a cluster that is "
        "scaled from zero: k8s://NAMESPACE/DEPLOYMENT[:PORT] or k8s://NAMESPACE/statefulset/NAME[:PORT].",
    ),
    option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        callback=_read_file,
        help="A YAML file of several models; it may set the options below too, as sleep_after: 10m.",
    ),
    option(
        "--import",
        "import_",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A configuration of llama-swap, in place of --config.",
    ),
    option(
        "--listen",
        type=Address(),
        default="127.0.0.1:8000",
        help="HOST:PORT of the public port. :8000 listens on every interface; port 0 takes a free one.",
    ),
    option("--wake", help="A command that starts the engine. It may return, or stay as the engine itself."),
    option("--sleep", help="A command that stops the engine. Without one, a wake command that stays is ended."),
    option(
        "--wake-url",
        help="A URL to POST to instead of a command; beside one, it wakes an engine that sleeps and stays up.",
    ),
    option("--sleep-url", help="A URL to POST to instead of running a command."),
    option("--ready-path", default="/health", help="The path that answers 200 once the engine is ready."),
    option("--ready-model", help="Also generate one token with this model before the engine counts as ready."),
    option(
        "--api-key",
        help="The key that the engine was started with, for the readiness check. The variable keeps it out of process lists.",
    ),
    option("--wake-timeout", type=Duration(0.1), default="10m", help="How long a wake may take."),
    option(
        "--schedule-timeout",
        type=Duration(0),
        default="30s",
        help="How long a pod of k8s://… may be without a node or an image before held requests get the reason.",
    ),
    option(
        "--keda-listen",
        type=Address(),
        help="HOST:PORT of KEDA's external scaler (gRPC). KEDA then scales, and this proxy only follows the pods of k8s://….",
    ),
    option("--root-path", default="", help="The engine's --root-path; --deny and --allow apply behind it too."),
    option("--workers", type=click.IntRange(1, 64), default=1, help="Processes on the one port; they share one wake."),
    *serving,
)
def proxy(**options: Any) -> None:
    """Hold requests while an engine is down, starting or asleep, and forward each exactly once.

    In front of one endpoint (--upstream), which a command or a URL wakes when a request comes and puts to sleep when
    idle; or of several models behind one port (--config). /-/ is the admin page, /-/metrics is for Prometheus.
    """
    consume_variables(click.get_current_context().command, os.environ)
    if (imported := options.pop("import_")) is not None:
        if options["config"] is not None:
            raise click.UsageError("give either --config or --import")
        _read_import(imported)
        options["config"] = imported
    if (options["upstream"] is None) == (options["config"] is None):
        raise click.UsageError("give either --upstream or --config")
    if options["standby_after"] and options["config"] is None:
        raise click.UsageError("--standby-after is for snapshots: give --config, or the option to launch or restore")
    settings = _settings(options)

    import asyncio

    import uvloop

    from plugin.proxy import descriptor_limit, logs

    descriptor_limit.require_files(descriptor_limit.LEAST_FILES)
    logs.configure(log_level(options), options["log_format"])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options, settings))


def _listen(option_name: str, address: tuple[str, int], count: int, backlog: int) -> list[socket.socket]:
    """Return `count` listening sockets of one address. Raises ClickException (port-in-use)."""
    from plugin.proxy.workers.supervisor import listening_sockets
    from plugin.runtime.listening import refused

    try:
        return listening_sockets(*address, count, backlog)
    except OSError as exc:
        why = refused(*address, exc, f"choose another with {option_name}")
        raise click.ClickException(f"port-in-use: {why}") from exc


def _settings(options: dict[str, Any]) -> Settings:
    from plugin.proxy.settings import Settings

    try:
        return Settings(**settings_of(options), root_path=options["root_path"])
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc


def _refuse_workers(options: dict[str, Any], *upstreams: str | None) -> None:
    """Raise UsageError for several workers in front of a cluster: their pools mirror a fixed set of replicas."""
    from plugin.proxy.kubernetes.address import is_workload

    if options["workers"] != 1 and (options["keda_listen"] or any(map(is_workload, upstreams))):
        what = "k8s:// upstreams and --keda-listen take one worker"
        raise click.UsageError(f"{what}; run several proxies behind a Service, they agree")


def _workload(options: dict[str, Any]) -> Workload:
    """Return the owner of the workload that --upstream names. Raises ValueError, UsageError."""
    from plugin.proxy.kubernetes import address as k8s
    from plugin.proxy.kubernetes.extra import connect

    address = k8s.parse(options["upstream"])
    given = [f"--{key.replace('_', '-')}" for key in ("wake", "sleep", "wake_url", "sleep_url") if options[key]]
    if given:
        raise click.UsageError(f"a workload is scaled, so {', '.join(given)} is for other upstreams")
    workload, session = connect()
    from plugin.proxy.kubernetes.asking import WorkloadSpec

    spec = WorkloadSpec(
        address=address,
        ready_path=options["ready_path"],
        ready_model=options["ready_model"],
        api_key=options["api_key"] or None,
        wake_limit_s=options["wake_timeout"],
        sleep_after_s=options["sleep_after"] or None,
        schedule_grace_s=options["schedule_timeout"],
        scales=options["keda_listen"] is None,
    )
    return workload("default", spec, session, owns_session=True)


async def _serve(options: dict[str, Any], settings: Settings) -> None:
    import asyncio
    import signal

    from plugin.proxy.descriptor_limit import raise_files
    from plugin.proxy.endpoints.endpoint import Endpoint, EndpointSpec
    from plugin.proxy.http.address import from_url
    from plugin.proxy.kubernetes import address as k8s
    from plugin.proxy.kubernetes.extra import scaler_of
    from plugin.proxy.pool.facts import Facts
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.pool.router import Router
    from plugin.proxy.server import ProxyServer
    from plugin.proxy.workers.supervisor import Supervisor
    from plugin.runtime.listening import announcement, url
    from plugin.runtime.signals import stopping

    host, port = options["listen"]
    _refuse_workers(options, options["upstream"])
    owner: Any
    target: ReplicaPool | Router
    try:
        if options["config"] is not None:
            from plugin.proxy.endpoints.models import ModelRouter, Models
            from plugin.proxy.endpoints.models_file import load

            config = load(options["config"])
            scales = options["keda_listen"] is None
            limits = [name for name in ("max_awake", "gpu_memory") if getattr(config, name)]
            if limits and not scales and any(k8s.is_workload(model.upstream) for model in config.models.values()):
                warn(f"limit-ignored: {' and '.join(limits)}: not applied to k8s://…, which KEDA scales")
            owner = Models(config, options["sleep_after"], options["standby_after"], scales=scales)
            pools = owner.pools
            target = ModelRouter(config, pools)
            _refuse_workers(options, *(model.upstream for model in config.models.values()))
        elif k8s.is_workload(options["upstream"]):
            owner = _workload(options)
            target = owner.pool
            pools = {"default": owner.pool}
        else:
            spec = EndpointSpec(
                upstream=from_url(options["upstream"]),
                wake=options["wake"],
                sleep=options["sleep"],
                wake_url=options["wake_url"],
                sleep_url=options["sleep_url"],
                ready_path=options["ready_path"],
                ready_model=options["ready_model"],
                api_key=options["api_key"] or None,
                wake_limit_s=options["wake_timeout"],
                sleep_after_s=options["sleep_after"] or None,
                facts=Facts(model=options["ready_model"] or ""),
            )
            owner = Endpoint("default", spec)
            target = owner.pool
            pools = {"default": owner.pool}
        scaler = scaler_of(pools) if options["keda_listen"] is not None else None
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc

    for pool in pools.values():
        for replica in pool.replicas.values():
            _refuse_own_address(replica.upstream, host, port)
    raise_files()
    sockets = _listen("--listen", options["listen"], options["workers"], settings.backlog)
    admin_sock = _listen("--admin-listen", options["admin_listen"], 1, 128)[0] if options["admin_listen"] else None
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
    if scaler is not None:
        try:
            await scaler.start(*options["keda_listen"])
        except ValueError as exc:
            raise click.ClickException(str(exc)) from exc
    await owner.start()
    end: Callable[[], Awaitable[None]]
    if options["workers"] == 1:
        server = ProxyServer(target, settings)
        await server.start(sockets[0], admin_sock=admin_sock)
        end = server.shutdown
    else:
        supervisor = Supervisor(
            list(pools.values()),
            settings,
            sockets,
            config=str(options["config"]) if options["config"] is not None else None,
            admin_sock=admin_sock,
            log=(log_level(options), options["log_format"]),
        )
        await supervisor.start()
        end = functools.partial(supervisor.shutdown, settings.drain_s)
    fields = {"url": url(sockets[0]), "admin_url": url(admin_sock or sockets[0]), "workers": options["workers"]}
    text = announcement(sockets[0], admin_sock, settings.admin_prefix)
    log.info("%s", text, extra={"event": "listening", "fields": fields})
    await stop.wait()
    if scaler is not None:
        await scaler.close()
    await end()
    await owner.close()
