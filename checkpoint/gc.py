"""`quickthaw snapshot gc`: remove what killed commands left on this host, or old snapshots from a store."""

from __future__ import annotations

import dataclasses
import json
import os

import click

from checkpoint.snapshot.library import Library
from lazyfs.cli.options import Duration, size_text
from lazyfs.paths import state_folder


@click.command()
@click.argument("store", required=False)
@click.option(
    "--keep",
    type=click.IntRange(0),
    envvar="QUICKTHAW_GC_KEEP",
    show_envvar=True,
    metavar="N",
    help="Of a store: keep the newest N snapshots of each model for each kind of host.  [default: 1 with --older-than]",
)
@click.option(
    "--older-than",
    type=Duration(),
    envvar="QUICKTHAW_GC_OLDER_THAN",
    show_envvar=True,
    metavar="TIME",
    help="Of a store: keep snapshots and compile caches that were pushed within this time, such as 720h.  [default: 0]",
)
@click.option(
    "--grace",
    type=Duration(),
    default="1h",
    show_default=True,
    envvar="QUICKTHAW_GC_GRACE",
    show_envvar=True,
    metavar="TIME",
    help="Of a store: how long a pull that has begun may go on reading what was removed.",
)
@click.option(
    "--dry-run", is_flag=True, envvar="QUICKTHAW_DRY_RUN", show_envvar=True, help="Only print what would be removed."
)
@click.option(
    "--json", "as_json", is_flag=True, envvar="QUICKTHAW_JSON", show_envvar=True, help="Print JSON instead of text."
)
def gc(
    store: str | None, keep: int | None, older_than: float | None, grace: float, dry_run: bool, as_json: bool
) -> None:
    """Remove the leftovers of killed launches and interrupted pulls; with --keep or --older-than, old snapshots of a store.

    In a store go the snapshots that are neither among the newest N of their model and kind of host nor young, and a run after
    --grace removes their bytes. It may be used by others meanwhile. To continue an interrupted pull, pull again instead.

    \b
    quickthaw snapshot gc
    quickthaw snapshot gc s3://bucket/quickthaw --keep 3 --older-than 720h --dry-run
    """
    if keep is None and older_than is None:
        if store or dry_run:
            raise click.UsageError("give --keep or --older-than: which snapshots of the store may go")
        count = Library(state_folder()).sweep(pulls_older_s=0.0)
        click.echo(json.dumps({"unfinished": count}) if as_json else f"removed {count} unfinished snapshots")
        return
    from checkpoint.store import archive
    from checkpoint.store.retention import retire

    url = store or os.environ.get("QUICKTHAW_STORE") or str(Library(state_folder()).home / "store")
    done = retire(
        archive.open_chunks(url),
        keep=1 if keep is None else keep,
        older_than_s=older_than or 0.0,
        grace_s=grace,
        dry_run=dry_run,
    )
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(done), "dry_run": dry_run}))
        return
    for name in done.names:
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}")
    freed = f"{size_text(done.bytes)} of {done.archives} archives"
    later = f"; {done.waiting} more wait for --grace, and then for another run" if done.waiting else ""
    click.echo(f"{'would free, once --grace is over,' if dry_run else 'freed'} {freed}{later}")
