"""The commands `quickthaw cache …`: what this host's cache holds, how large it may be, and what goes or comes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lazyfs.cli.mount import resolve
from lazyfs.cli.options import (
    CacheLimit,
    Duration,
    Gigabytes,
    cache_limit_option,
    json_option,
    option,
    peer_options,
    reports_errors,
    size_text,
    store_option,
)
from lazyfs.errors import one_line

if TYPE_CHECKING:
    from lazyfs.cache.cache import Cache


def _cache() -> Cache:
    from lazyfs.cache.bound import AUTO
    from lazyfs.cache.cache import Cache
    from lazyfs.paths import home

    return Cache(home() / "cache", AUTO)


def _bound_text(cache: Cache) -> str:
    """Return the bound in words."""
    import shutil

    from lazyfs.cache.bound import AUTO, UNBOUNDED, kept_free

    disk = shutil.disk_usage(cache.root)
    if cache.bound == AUTO:
        return f"auto: {size_text(kept_free(disk.total))} of {size_text(disk.total)} stay free"
    return "none: only the disk's size" if cache.bound == UNBOUNDED else size_text(cache.bound)


@click.group()
def cache() -> None:
    """Show and bound what this host keeps of models, and fetch models before they are used.

    \b
    quickthaw cache ls
    quickthaw cache limit 200
    quickthaw cache warm llama:v1
    """


@cache.command()
@json_option
@reports_errors
def ls(as_json: bool) -> None:
    """List what the cache holds, by kind and by model, and how much more may come."""
    from lazyfs.admin.cache_report import report
    from lazyfs.cache.bound import shown

    here = _cache()
    found = report(here)
    if as_json:
        models = [{k: v for k, v in asdict(m).items() if k != "locks"} for m in found.models]
        click.echo(json.dumps({**asdict(found), "bound": shown(found.bound), "models": models}))
        return
    click.echo(f"{here.root.parent}: {size_text(found.counted)} count under the limit ({_bound_text(here)})")
    click.echo(f"{size_text(found.free)} free on the disk; {size_text(found.room)} more may be cached")
    for share in found.shares:
        part = f"{100 * share.bytes / found.counted:5.1f} %" if share.counts and found.counted else "      -"
        note = "" if share.counts else "  (does not count; `quickthaw weights rm` and `gc`)"
        click.echo(f"  {share.name:15} {size_text(share.bytes):>9}  {part}{note}")
    for model in found.models:
        name = f"{model.manifest[:16] or '-':16}"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.used))
        kept = "  in use" if model.pinned else ""
        what = model.source or ("" if model.manifest else "of no known manifest")
        click.echo(one_line(f"{name}  {size_text(model.bytes):>9}  {model.files:5} files  used {used}{kept}  {what}"))


@cache.command()
@click.argument("value", type=CacheLimit(), required=False, metavar="[auto|none|GB]")
@json_option
@reports_errors
def limit(value: int | None, as_json: bool) -> None:
    """Print this host's limit of the cache, or set it; running mounts without one of their own heed it at once.

    auto leaves a tenth of the disk free, at least 20 GB (of a small disk a quarter). What exceeds the new limit and is not
    in use goes at once, least recently used first. $QUICKTHAW_CACHE_LIMIT takes precedence.
    """
    import os

    from lazyfs.admin.cache_report import prune, prune_target
    from lazyfs.cache.bound import VARIABLE, set_host_bound, shown

    here, freed = _cache(), 0
    if value is not None:
        set_host_bound(here.root, value)
        if given := os.environ.get(VARIABLE):
            click.echo(f"quickthaw: warning: {VARIABLE}={given} takes precedence here", err=True)
        freed = prune(here, prune_target(here)).chunks
    if as_json:
        click.echo(json.dumps({"limit": shown(here.bound), "freed_bytes": freed}))
        return
    click.echo(_bound_text(here) + (f"; {size_text(freed)} freed" if freed else ""))


@cache.command("prune")
@click.option("--to", type=Gigabytes(), help="Down to this size of chunks.  [default: what the limit allows]")
@option(
    "--unused",
    type=Duration(),
    default="0",
    envvar="QUICKTHAW_UNUSED",
    metavar="TIME",
    help="Only what was not used for this time, such as 720h; all of it, unless --to is given.",
)
@option("--dry-run", is_flag=True, envvar="QUICKTHAW_DRY_RUN", help="Only print what would go.")
@json_option
@reports_errors
def prune_(to: int | None, unused: float, dry_run: bool, as_json: bool) -> None:
    """Empty the quarantine, and remove cached chunks, least recently used first, and records of models of which nothing is here and that
    were not mounted for a month. What a living mount uses stays.

    Snapshots and compile caches are not touched: `quickthaw snapshot rm NAME`.
    """
    from lazyfs.admin.cache_report import prune, prune_target

    here = _cache()
    target = (0 if unused else prune_target(here)) if to is None else to
    done = prune(here, target, older_than=time.time() - unused if unused else 0.0, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps({**asdict(done), "dry_run": dry_run}))
        return
    verb = "would free" if dry_run else "freed"
    click.echo(
        f"{verb} {size_text(done.chunks)} of chunks and {size_text(done.quarantine)} of quarantine, "
        f"{done.records} records of models that are not here; "
        f"{size_text(done.left)} of chunks left"
    )


@cache.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@cache_limit_option
@peer_options
@store_option
@json_option
@reports_errors
def warm(
    names: tuple[str, ...],
    cache_limit: int,
    peers: str,
    peer_token: str,
    peer_self: str,
    store: str | None,
    as_json: bool,
) -> None:
    """Fetch models into the cache before they are used: names as of `quickthaw mount`. Refused if they find no room."""
    from lazyfs.fetch.warm import warm as fetch_all
    from lazyfs.mount.config import MountConfig
    from lazyfs.mount.manifest_source import load_manifest
    from lazyfs.paths import home

    show, answers = sys.stderr.isatty() and not as_json, []

    def progress(done: int, total: int) -> None:
        if show:
            click.echo(f"\r{100 * done / max(1, total):5.1f} %  of {size_text(total)} ", nl=False, err=True)

    for name in names:
        digest, url = resolve(name, store)
        config = MountConfig.without_mount(
            digest,
            url,
            home(),
            cache_limit=cache_limit,
            peers=peers,
            peer_token=peer_token,
            peer_self=peer_self,
        )
        done = fetch_all(config, load_manifest(config), progress)
        answers.append({"name": name, "manifest": digest, **asdict(done)})
        if not as_json:
            click.echo(
                ("\r" if show else "")
                + one_line(
                    f"{name}: {size_text(done.fetched)} fetched, {size_text(done.present)} were there, "
                    f"{size_text(done.in_place)} are read in place"
                )
            )
    if as_json:
        click.echo(json.dumps(answers))
