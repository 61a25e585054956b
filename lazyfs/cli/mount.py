"""The command `quickthaw mount …`: mount a manifest, unmount it, and control a running mount."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazyfs.cli.options import (
    Duration,
    PathArgument,
    cache_limit_option,
    json_option,
    open_chunks,
    option,
    peer_options,
    reports_errors,
    store_option,
    trust_option,
)
from lazyfs.errors import NotFound

if TYPE_CHECKING:
    from lazyfs.mount.client import MountHandle

# Requests about a mount or one file of it, and their help.
_REQUESTS = {
    "prefetch": "Fetch the absent chunks of a mount, or of one file below it.",
    "pin": "Fetch it, and never evict it while the mount lives.",
    "drop": "Remove it from the disk cache, except files in use.",
}


def _request_options(command: click.decorators.FC) -> click.decorators.FC:
    for name, text in reversed(_REQUESTS.items()):
        command = click.option(f"--{name}", type=PathArgument(), metavar="PATH", help=text)(command)
    return command


@click.command()
@click.argument("manifest", required=False)
@click.argument("directory", required=False, type=PathArgument())
@option("--detach", is_flag=True, envvar="QUICKTHAW_DETACH", help="Return once mounted; the daemon keeps serving.")
@click.option("--unmount", type=PathArgument(), metavar="DIR", help="Unmount DIR.")
@click.option("--force", is_flag=True, help="With --unmount: even while files are open.")
@click.option(
    "--status", type=PathArgument(), metavar="DIR", help="Print the state and the counters of the mount at DIR."
)
@click.option("--metrics", type=PathArgument(), metavar="DIR", help="Print them in Prometheus text format.")
@_request_options
@option(
    "--native",
    type=click.Choice(["auto", "passthrough", "off"]),
    default="auto",
    show_default=True,
    envvar="QUICKTHAW_NATIVE",
    help="Whether the kernel reads complete files itself (passthrough).",
)
@option(
    "--transport",
    type=click.Choice(["auto", "raw", "pyfuse3"]),
    default="auto",
    show_default=True,
    envvar="QUICKTHAW_TRANSPORT",
    help="FUSE implementation: auto is raw. Without CAP_SYS_ADMIN, either needs fusermount3.",
)
@cache_limit_option
@option(
    "--idle-exit",
    type=Duration(),
    default="0",
    envvar="QUICKTHAW_IDLE_EXIT",
    metavar="TIME",
    help="Unmount after this time without an open file, such as 10m.  [default: 0, never]",
)
@option(
    "--allow-other", is_flag=True, envvar="QUICKTHAW_ALLOW_OTHER", help="Let other users of this host use the mount."
)
@trust_option
@peer_options
@option("--log-file", type=PathArgument(), envvar="QUICKTHAW_MOUNT_LOG", help="The daemon's log file.")
@store_option
@json_option
@reports_errors
def mount(
    manifest: str | None,
    directory: Path | None,
    detach: bool,
    unmount: Path | None,
    force: bool,
    status: Path | None,
    metrics: Path | None,
    native: str,
    transport: str,
    cache_limit: int,
    idle_exit: float,
    allow_other: bool,
    trust_keys: tuple[Path, ...],
    peers: str,
    peer_token: str,
    peer_self: str,
    log_file: Path | None,
    store: str | None,
    as_json: bool,
    **requests: Path | None,
) -> None:
    """Show MANIFEST at DIRECTORY as files, read-only.

    MANIFEST is a tag, a snapshot, a digest or its beginning, or a model directory that is read in place: a URL, or a path
    that begins with "/", "." or "~".

    In the foreground the command unmounts on Ctrl-C, SIGTERM and SIGHUP. It replaces the mount of a killed daemon.

    \b
    quickthaw mount smollm2:v1 /mnt/smollm2 --detach
    quickthaw mount --status /mnt/smollm2
    quickthaw mount --unmount /mnt/smollm2
    """
    actions = {"unmount": unmount, "status": status, "metrics": metrics, **requests}
    given = {name: path for name, path in actions.items() if path is not None}
    if len(given) > 1 or (given and manifest is not None):
        raise click.UsageError(f"{' and '.join(f'--{name}' for name in given)}: give one at a time, without MANIFEST")
    if force and unmount is None:
        raise click.UsageError("--force needs --unmount")
    for name, path in given.items():
        _act(name, path, force=force, as_json=as_json)
        return
    if not manifest or directory is None:
        options = ", ".join(f"--{name}" for name in actions)
        raise click.UsageError(f"give MANIFEST and DIRECTORY, or one of {options} with a path")
    from lazyfs.mount.client import mount as mount_manifest

    digest, url = resolve(manifest, store)
    handle = mount_manifest(
        digest,
        directory,
        store_url=url,
        log_file=log_file,
        native=native,
        transport=transport,
        cache_limit=cache_limit,
        idle_exit_s=idle_exit,
        allow_other=allow_other,
        peers=peers,
        peer_token=peer_token,
        peer_self=peer_self,
        trust_keys=tuple(str(key.absolute()) for key in trust_keys),
    )
    stop = threading.Event()
    if not detach:
        # Install the handlers before reporting ready: a signal sent right after it would leave the mount behind. Under
        # nohup, SIGHUP stays ignored.
        hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
        for number in (signal.SIGINT, signal.SIGTERM, *hangup):
            signal.signal(number, lambda *_: stop.set())
    answer = {"pid": handle.pid, "mountpoint": str(handle.mountpoint), "manifest": digest, "socket": str(handle.socket)}
    click.echo(json.dumps(answer) if as_json else f"ready: {digest[:16]} at {handle.mountpoint} (pid {handle.pid})")
    if not detach:
        while not stop.wait(0.5) and Path(f"/proc/{handle.pid}").exists():
            pass
        if stop.is_set():
            handle.unmount(force=True)


def resolve(name: str, store: str | None) -> tuple[str, str]:
    """Return the manifest's digest and the store's URL for a name given by the user.

    A folder is named by a path that begins with "/", "." or "~", or ends with "/". Anything else is a name in the store,
    whatever the working directory contains. Raises NotFound.
    """
    from lazyfs.content.stat_index import read_through
    from lazyfs.paths import default_store_url
    from lazyfs.stores.retry import RetryPolicy, retrying

    url = store or default_store_url()
    if "://" in name or name.startswith(("/", ".", "~")) or name.endswith("/"):
        return read_through(name), url
    try:
        chunks = open_chunks(store)
        return retrying(lambda: chunks.resolve(name), RetryPolicy()), url
    except NotFound as error:
        if Path(name).is_dir():
            raise NotFound(f"{error}. For the folder of that name here, write ./{name}") from None
        raise


def _act(action: str, path: Path, *, force: bool, as_json: bool) -> None:
    """Do what an option such as --unmount or --pin asks of the mount at `path`."""
    if action == "unmount":
        from lazyfs.mount.client import unmount

        unmount(path, force=force)
        click.echo(json.dumps({"unmounted": str(path)}) if as_json else f"unmounted {path}")
    elif action == "metrics":
        click.echo(_live_mount(path).control("metrics")["text"], nl=False)
    elif action == "status":
        _print_status(_live_mount(path).status(), as_json)
    else:
        answer = _request(action, path)
        answer.pop("ok")
        click.echo(json.dumps(answer) if as_json else "  ".join(f"{k}: {v}" for k, v in answer.items()))


def _live_mount(where: Path) -> MountHandle:
    from lazyfs.mount.client import find_mount, no_mount_error

    found = find_mount(where)
    if found is None:
        raise no_mount_error(where)
    return found


def _request(op: str, path: Path) -> dict[str, object]:
    """Send a request about a mount, or about one file below it. Never touches the path: its mount may hang."""
    from lazyfs.mount.client import find_mount, no_mount_error

    where = path.expanduser().absolute()
    for folder in (*reversed(where.parents), where):
        found = find_mount(folder)
        if found is not None:
            below = str(where.relative_to(folder))
            return found.control(op, **({} if below == "." else {"path": below}))
        reason = no_mount_error(folder)
        if not isinstance(reason, NotFound):
            raise reason
    raise NotFound(f"no daemon serves {path}; `quickthaw mount MANIFEST {path}` starts one")


def _print_status(status: dict[str, object], as_json: bool) -> None:
    status.pop("ok")
    if as_json:
        click.echo(json.dumps(status))
        return
    for key, value in status.items():
        if isinstance(value, dict):
            for name, number in value.items():
                click.echo(f"{key}.{name}: {number}")
        else:
            click.echo(f"{key}: {value}")
