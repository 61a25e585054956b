"""The commands `quickthaw weights …` and `quickthaw mount …`: lazyfs without the rest of the project."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from lazyfs.errors import LazyfsError, one_line

if TYPE_CHECKING:
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.content.importer import Progress
    from lazyfs.mount.client import MountHandle

F = TypeVar("F", bound=Callable[..., Any])


def _guarded(command: F) -> F:
    """Print an error of the command as one line on standard error, and exit with its exit code."""

    @functools.wraps(command)
    def inner(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except LazyfsError as error:
            _fail(error)
        except OSError as error:
            # A file opened by click, a closed pipe, a path that the command itself checks: one line as well.
            from lazyfs.errors import from_os_error

            _fail(from_os_error(error, str(error.filename or command.__name__.rstrip("_"))))

    return inner  # type: ignore[return-value]


def _fail(error: LazyfsError) -> NoReturn:
    click.echo(f"quickthaw: {error} [{error.code}]", err=True)
    sys.exit(error.exit_code)


_store = click.option(
    "--store",
    envvar="QUICKTHAW_STORE",
    metavar="URL",
    help="A directory, s3://, gs://, az://, http(s)://. Default: the directory store/ under $QUICKTHAW_HOME.",
)
_json = click.option("--json", "as_json", is_flag=True, envvar="QUICKTHAW_JSON", help="Print JSON instead of text.")


class _Number(click.FloatRange):
    """A finite number of 0 or more: click's FloatRange accepts "nan" and "inf"."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number of 0 or more", param, ctx)
        return number


class _Place(click.Path):
    """A path. Rejects an empty one, which an unset variable leaves and which would mean the current directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        if str(value).startswith("--"):
            self.fail(f"{value!r} stands where the path should", param, ctx)
        return super().convert(value, param, ctx)


def _chunks(store: str | None) -> ChunkStore:
    """Open the store. Raises NotFound for a named directory that is not a store, which would look like an empty one."""
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.errors import NotFound, from_os_error
    from lazyfs.paths import default_store_url
    from lazyfs.stores import open_store
    from lazyfs.stores.urls import local_path

    url = store or default_store_url()
    folder = local_path(url)
    if store is not None and folder is not None:
        try:
            inside = set(os.listdir(folder))
        except OSError as error:
            inside = set()
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise from_os_error(error, f"cannot read {folder}") from error
        if not inside & {"chunks", "manifests", "refs"}:
            raise NotFound(f"there is no store at {folder}; `quickthaw weights import DIRECTORY --store …` makes one")
    return ChunkStore(open_store(url))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


@click.group()
def weights() -> None:
    """Keep model weights as content-addressed chunks in a store.

    \b
    quickthaw weights import ./SmolLM2 --tag smollm2:v1
    quickthaw mount smollm2:v1 /mnt/smollm2
    """


@weights.command("import")
@click.argument("directory", type=_Place())
@click.option("--tag", envvar="QUICKTHAW_TAG", metavar="NAME[:TAG]", help="A name for the manifest (tag: latest).")
@click.option("--zstd", envvar="QUICKTHAW_ZSTD", default="auto", metavar="auto|never|1-19", help="When to compress.")
@_store
@_json
@_guarded
def import_(directory: Path, tag: str | None, zstd: str, store: str | None, as_json: bool) -> None:
    """Store DIRECTORY as chunks and print the digest of its manifest.

    What the store has is skipped, so an interrupted import goes on where it was, and a fine-tune costs only what
    differs.

    \b
    quickthaw weights import ./model --tag model:v2
    quickthaw weights import ./model --store s3://bucket/weights
    """
    from lazyfs.content.stat_index import import_directory

    level: int | str | None = "auto" if zstd == "auto" else None
    if zstd not in ("auto", "never"):
        try:
            level = int(zstd)
        except ValueError:
            raise click.UsageError("--zstd is auto, never or a level from 1 to 19") from None
    last: list[Progress] = []
    show = sys.stderr.isatty()
    started = time.monotonic()

    def progress(now: Progress) -> None:
        last[:] = [now]
        if show:
            share = 100 * now.done / max(1, now.total)
            click.echo(
                f"\r{share:5.1f} %  {_size(now.done)} of {_size(now.total)}  {now.path[-40:]:40}", nl=False, err=True
            )

    digest = import_directory(directory, store, tag=tag, progress=progress, zstd=level, thorough=True)
    if show and last:
        click.echo("\r" + " " * 78 + "\r", nl=False, err=True)
    final = last[0] if last else None
    answer = {
        "manifest": digest,
        "tag": tag,
        "bytes": final.total if final else 0,
        "stored_bytes": final.stored if final else 0,
        "shared_bytes": final.skipped if final else 0,
        "unchanged": final is None,
        "seconds": round(time.monotonic() - started, 3),
    }
    if as_json:
        click.echo(json.dumps(answer))
        return
    click.echo(digest)
    if final is None:
        click.echo("unchanged since the last import", err=True)
    else:
        shared = f"{_size(final.skipped)} shared with what the store had"
        click.echo(f"{_size(final.total)} read, {_size(final.stored)} written, {shared}", err=True)


@weights.command()
@_store
@_json
@_guarded
def ls(store: str | None, as_json: bool) -> None:
    """List the manifests of a store, with their names and how much of each is shared with others. Damaged ones, and names
    that lead to none, are listed as such."""
    from lazyfs.admin.listing import listing, unnamed

    chunks = _chunks(store)
    entries = listing(chunks)
    if as_json:
        click.echo(json.dumps([asdict(e) for e in entries]))
        return
    if not entries:
        count, size = unnamed(chunks)
        if count:
            click.echo(
                f"no manifest in {chunks.store.url}, and {count} chunks ({_size(size)}) that none mentions: "
                "`quickthaw weights gc` deletes those older than a day",
                err=True,
            )
        else:
            click.echo(f"nothing in {chunks.store.url} yet: `quickthaw weights import DIRECTORY`", err=True)
    for e in entries:
        shared = _size(e.size - e.unshared)
        name = ", ".join(e.names) or "-"
        if e.damage:
            click.echo(one_line(f"{e.manifest[:16]:16}  DAMAGED   {name}: {e.damage}"))
            continue
        click.echo(
            one_line(
                f"{e.manifest[:16]}  {e.kind:8}  {_size(e.size):>9}  shared {shared:>9}  {e.files:5} files  {name}"
            )
        )


@weights.command()
@click.argument("names", nargs=-1, metavar="[MANIFEST]...")
@click.option(
    "--repair",
    is_flag=True,
    envvar="QUICKTHAW_REPAIR",
    help="Delete damaged chunks and manifests: the next import writes them. Empty the quarantine.",
)
@click.option(
    "--cache/--no-cache", "with_cache", default=True, envvar="QUICKTHAW_VERIFY_CACHE", help="The cache as well."
)
@_store
@_json
@_guarded
def verify(names: tuple[str, ...], repair: bool, with_cache: bool, store: str | None, as_json: bool) -> None:
    """Read and hash every chunk of the manifests (default: all). Exit code 1 when anything is damaged or missing."""
    from lazyfs.admin.verify import verify as check
    from lazyfs.admin.verify import verify_cache
    from lazyfs.cache.cache import Cache
    from lazyfs.paths import home

    chunks = _chunks(store)
    digests = [chunks.resolve(n) for n in names] or None
    report = check(chunks, digests, repair=repair)
    cache = Cache(home() / "cache")
    if with_cache:
        verify_cache(cache, chunks, report, digests)
    quarantined = cache.quarantined()
    if as_json:
        kept = [{"name": name, "reason": why} for name, why in quarantined]
        click.echo(json.dumps({**asdict(report), "quarantine": kept, "clean": report.clean}))
    else:
        click.echo(f"{report.manifests} manifests, {report.chunks} chunks, {_size(report.bytes)} read", err=True)
        for kind, found in (("damaged", report.bad), ("missing", report.missing)):
            for digest, path in found.items():
                click.echo(one_line(f"{kind} chunk {digest[:16]} of {path}"))
        for digest, why in report.broken_manifests.items():
            gone = "; it was removed" if repair and not chunks.has_manifest(digest) else ""
            click.echo(one_line(f"manifest {digest[:16]}: {why}{gone}"))
        for name, why in report.broken_names.items():
            click.echo(one_line(f"{name}: {why}"))
        if report.cache_bad:
            click.echo(f"{report.cache_bad} damaged chunks in the cache were dropped; they will be fetched again")
        if report.cache_skipped:
            click.echo(
                f"{report.cache_skipped} cached files were not checked: the disk has no room to open them", err=True
            )
        if quarantined:
            click.echo(
                f"{len(quarantined)} bodies that did not hash to their digest were met before, and never served; "
                f"{'they were' if repair else 'to look at, they are'} kept in {cache.root / 'quarantine'}:",
                err=True,
            )
            for name, why in quarantined:
                click.echo(one_line(f"  {name}: {why}"), err=True)
        if report.bad or report.missing or report.broken_manifests:
            first = (
                ""
                if repair or chunks.store.url.startswith("http") or not (report.bad or report.broken_manifests)
                else "`quickthaw weights verify --repair`, then "
            )
            click.echo(
                f"way out: {first}`quickthaw weights import` of the original again writes what is gone", err=True
            )
        click.echo("clean" if report.clean else "NOT clean")
    if repair:
        cache.clear_quarantine()
    sys.exit(0 if report.clean else 1)


@weights.command()
@click.argument("name", metavar="MANIFEST")
@_store
@_json
@_guarded
def rm(name: str, store: str | None, as_json: bool) -> None:
    """Remove a tag, and its manifest if that has no other name; or a manifest by digest, with all its names. Chunks stay until
    `quickthaw weights gc`. A mount of it goes on, with what is cached or lies in the original: unmount first."""
    from lazyfs.admin.listing import remove

    removed = remove(_chunks(store), name)
    click.echo(json.dumps({"removed": removed}) if as_json else "\n".join(f"removed {r}" for r in removed))


@weights.command()
@click.option(
    "--grace",
    type=_Number(),
    default=24.0,
    envvar="QUICKTHAW_GC_GRACE",
    metavar="HOURS",
    help="Spare what is younger (24).",
)
@click.option("--untagged", is_flag=True, envvar="QUICKTHAW_GC_UNTAGGED", help="Remove weights that no tag names, too.")
@click.option("--dry-run", is_flag=True, envvar="QUICKTHAW_DRY_RUN", help="Only say what would go.")
@_store
@_json
@_guarded
def gc(grace: float, untagged: bool, dry_run: bool, store: str | None, as_json: bool) -> None:
    """Delete chunks that no manifest mentions. Snapshots and tags are roots; nothing they need is touched."""
    from lazyfs.admin.gc import collect

    done = collect(_chunks(store), grace_s=grace * 3600, untagged=untagged, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps({**asdict(done), "dry_run": dry_run}))
        return
    verb = "would delete" if dry_run else "deleted"
    click.echo(
        f"{verb} {done.chunks} chunks ({_size(done.bytes)}) and {done.manifests} manifests; {done.kept} in use, {done.young} too young"
    )


@click.command()
@click.argument("manifest", required=False)
@click.argument("directory", required=False, type=_Place())
@click.option("--detach", is_flag=True, envvar="QUICKTHAW_DETACH", help="Return once mounted; the daemon goes on.")
@click.option("--unmount", "unmount_at", type=_Place(), metavar="DIR", help="Unmount DIR instead.")
@click.option("--force", is_flag=True, help="With --unmount: even while files are open.")
@click.option("--status", "status_of", type=_Place(), metavar="DIR", help="Print what the mount at DIR does.")
@click.option("--metrics", "metrics_of", type=_Place(), metavar="DIR", help="The same for Prometheus.")
@click.option(
    "--prefetch",
    "prefetch_in",
    type=_Place(),
    metavar="PATH",
    help="Fetch a mount, or one file of it.",
)
@click.option("--pin", "pin_in", type=_Place(), metavar="PATH", help="Fetch it and never evict it.")
@click.option("--drop", "drop_in", type=_Place(), metavar="PATH", help="Free its disk cache where not in use.")
@click.option(
    "--native",
    type=click.Choice(["auto", "passthrough", "off"]),
    default="auto",
    envvar="QUICKTHAW_NATIVE",
    help="Kernel passthrough of complete files.",
)
@click.option(
    "--transport",
    type=click.Choice(["auto", "raw", "pyfuse3"]),
    default="auto",
    envvar="QUICKTHAW_TRANSPORT",
    help="Who speaks to the kernel; pyfuse3 needs no root.",
)
@click.option(
    "--cache-limit",
    type=_Number(),
    default=0.0,
    envvar="QUICKTHAW_CACHE_LIMIT",
    metavar="GB",
    help="Bound of the cache on disk and in memory (0: the disk).",
)
@click.option(
    "--idle-exit",
    type=_Number(),
    default=0.0,
    envvar="QUICKTHAW_IDLE_EXIT",
    metavar="SECONDS",
    help="Unmount after so long unused (0: never).",
)
@click.option(
    "--allow-other", is_flag=True, envvar="QUICKTHAW_ALLOW_OTHER", help="Let other users of this host use the mount."
)
@click.option("--log-file", type=_Place(), envvar="QUICKTHAW_MOUNT_LOG", help="Where the daemon writes.")
@_store
@_json
@_guarded
def mount(
    manifest: str | None,
    directory: Path | None,
    detach: bool,
    unmount_at: Path | None,
    force: bool,
    status_of: Path | None,
    metrics_of: Path | None,
    prefetch_in: Path | None,
    pin_in: Path | None,
    drop_in: Path | None,
    native: str,
    transport: str,
    cache_limit: float,
    idle_exit: float,
    allow_other: bool,
    log_file: Path | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Show MANIFEST (a digest, the beginning of one, a tag, a snapshot, or the path or URL of a model directory read in
    place) at DIRECTORY, read-only. A path begins with "/", "." or "~": anything else is a name in the store.

    In the foreground it unmounts on Ctrl-C, SIGTERM, or when the terminal goes. A stale mount point of a killed daemon is recovered.

    \b
    quickthaw mount smollm2:v1 /mnt/smollm2 --detach
    quickthaw mount --status /mnt/smollm2
    quickthaw mount --unmount /mnt/smollm2
    """
    from lazyfs.mount import client as mounting

    others = {"--unmount": unmount_at, "--status": status_of, "--metrics": metrics_of}
    others |= {"--prefetch": prefetch_in, "--pin": pin_in, "--drop": drop_in}
    asked = [option for option, place in others.items() if place is not None]
    if len(asked) > 1 or (asked and manifest is not None):
        raise click.UsageError(f"{' and '.join(asked)}: one at a time, and without MANIFEST")
    if force and unmount_at is None:
        raise click.UsageError("--force goes with --unmount")
    if unmount_at is not None:
        mounting.unmount(unmount_at, force=force)
        click.echo(json.dumps({"unmounted": str(unmount_at)}) if as_json else f"unmounted {unmount_at}")
        return
    if status_of is not None:
        _print_status(status_of, as_json)
        return
    if metrics_of is not None:
        click.echo(_living(metrics_of).control("metrics")["text"], nl=False)
        return
    for op, path in (("prefetch", prefetch_in), ("pin", pin_in), ("drop", drop_in)):
        if path is not None:
            _control(op, path, as_json)
            return
    if manifest is None or directory is None:
        raise click.UsageError(f"give MANIFEST and DIRECTORY, or one of {', '.join(others)} with its path")
    if not manifest:
        raise click.UsageError("MANIFEST is empty")
    digest, url = _what(manifest, store)
    handle = mounting.mount(
        digest,
        directory,
        store_url=url,
        log_file=log_file,
        native=native,
        transport=transport,
        cache_limit=int(cache_limit * 1e9),
        idle_exit_s=idle_exit,
        allow_other=allow_other,
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


def _what(name: str, store: str | None) -> tuple[str, str | None]:
    """Return the manifest's digest and the store's URL for a name given by the user.

    A folder is named by a path that begins with "/", "." or "~", or ends with "/". Anything else is a name in the store,
    whatever the working directory contains. Raises NotFound.
    """
    from lazyfs.content.stat_index import read_through
    from lazyfs.errors import NotFound
    from lazyfs.paths import default_store_url
    from lazyfs.stores.retry import RetryPolicy, retrying

    url = store or default_store_url()
    if "://" in name or name.startswith(("/", ".", "~")) or name.endswith("/"):
        return read_through(name), url
    try:
        chunks = _chunks(store)
        return retrying(lambda: chunks.resolve(name), RetryPolicy()), url
    except NotFound as error:
        if Path(name).is_dir():
            raise NotFound(f"{error}. For the folder of that name here, write ./{name}") from None
        raise


def _living(where: Path) -> MountHandle:
    from lazyfs.mount.client import find_mount, no_mount

    found = find_mount(where)
    if found is None:
        raise no_mount(where)
    return found


def _control(op: str, path: Path, as_json: bool) -> None:
    """Send a request about a mount, or about one file below it. Never touches the path: its mount may hang."""
    from lazyfs.errors import NotFound
    from lazyfs.mount.client import find_mount, no_mount

    where = Path(path).expanduser().absolute()
    for folder in (*reversed(where.parents), where):
        found = find_mount(folder)
        if found is not None:
            below = str(where.relative_to(folder))
            answer = found.control(op, **({} if below == "." else {"path": below}))
            answer.pop("ok")
            click.echo(json.dumps(answer) if as_json else "  ".join(f"{k}: {v}" for k, v in answer.items()))
            return
        reason = no_mount(folder)
        if not isinstance(reason, NotFound):
            raise reason
    raise NotFound(f"no daemon serves {path}")


def _print_status(where: Path, as_json: bool) -> None:
    status = _living(where).status()
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
