"""The commands `quickthaw weights …`: import, list, verify, remove and collect what a store holds."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazyfs.cli.options import (
    Duration,
    PathArgument,
    Source,
    json_option,
    open_chunks,
    option,
    reports_errors,
    size_text,
    store_option,
)
from lazyfs.errors import one_line

if TYPE_CHECKING:
    from lazyfs.content.artifacts import Moved
    from lazyfs.content.importer import Progress


@click.group()
def weights() -> None:
    """Keep model weights as content-addressed chunks in a store.

    \b
    quickthaw weights import ./SmolLM2 --tag smollm2:v1
    quickthaw mount smollm2:v1 /mnt/smollm2
    """


@weights.command("import")
@click.argument("source", type=Source())
@option(
    "--tag",
    envvar="QUICKTHAW_TAG",
    metavar="NAME[:TAG]",
    help="Name of the manifest; the tag is `latest` unless given.",
)
@option(
    "--sign-key",
    type=click.Path(path_type=Path),
    envvar="QUICKTHAW_SIGN_KEY",
    help="Sign the manifest with this Ed25519 key (`quickthaw snapshot keygen`).",
)
@option(
    "--zstd",
    envvar="QUICKTHAW_ZSTD",
    default="auto",
    show_default=True,
    metavar="auto|never|1-19",
    help="Whether to compress: where a sample shows that it pays, never, or always at this level.",
)
@store_option
@json_option
@reports_errors
def import_(
    source: Path | str, tag: str | None, sign_key: Path | None, zstd: str, store: str | None, as_json: bool
) -> None:
    """Store SOURCE, a directory or a URL, as chunks and print the digest of its manifest.

    A model of the hub is checked against the digests that the hub gives; its files in formats that no engine reads are left out.
    Chunks that the store has are skipped: an interrupted import resumes, and a fine-tune stores only what differs.

    \b
    quickthaw weights import ./model --tag model:v2
    quickthaw weights import ./model --store s3://bucket/weights
    quickthaw weights import hf://org/model@main --tag model:v2
    """
    from lazyfs.content.stat_index import import_directory

    level: int | str | None = "auto" if zstd == "auto" else None
    if zstd not in ("auto", "never"):
        try:
            level = int(zstd)
        except ValueError:
            raise click.UsageError("--zstd must be auto, never or a level from 1 to 19") from None
    sign = None
    if sign_key is not None:
        from lazyfs.signing import signer

        sign = signer(sign_key)  # a key that cannot be used is said before the import
    last: list[Progress] = []
    show = sys.stderr.isatty()
    started = time.monotonic()

    def progress(now: Progress) -> None:
        last[:] = [now]
        if show:
            share = 100 * now.done / max(1, now.total)
            click.echo(
                f"\r{share:5.1f} %  {size_text(now.done)} of {size_text(now.total)}  {now.path[-40:]:40}",
                nl=False,
                err=True,
            )

    if isinstance(source, str):
        digest = _import_url(source, store, tag, progress, level)
    else:
        digest = import_directory(source, store, tag=tag, progress=progress, zstd=level, thorough=True)
    if sign is not None:
        from lazyfs.stores.retry import RetryPolicy, retrying

        chunks = open_chunks(store)
        retrying(lambda: chunks.sign_manifest(digest, sign), RetryPolicy())
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
        shared = f"{size_text(final.skipped)} shared with what the store had"
        click.echo(f"{size_text(final.total)} read, {size_text(final.stored)} written, {shared}", err=True)


def _import_url(
    source: str, store: str | None, tag: str | None, progress: Callable[[Progress], None], zstd: int | str | None
) -> str:
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.content.source_import import import_source
    from lazyfs.content.stat_index import set_tag
    from lazyfs.paths import default_store_url
    from lazyfs.stores import open_store

    url = store or default_store_url()
    digest, _ = import_source(source, ChunkStore(open_store(url), zstd=zstd), progress)
    if tag is not None:
        set_tag(url, tag, digest)
    return digest


@weights.command()
@store_option
@json_option
@reports_errors
def ls(store: str | None, as_json: bool) -> None:
    """List the manifests of a store.

    Prints kind, size, bytes shared with others and names. Damaged manifests, and names without a manifest, are marked DAMAGED.
    """
    from lazyfs.admin.listing import listing, unreferenced_chunks

    chunks = open_chunks(store)
    entries = listing(chunks)
    if as_json:
        click.echo(json.dumps([asdict(e) for e in entries]))
        return
    if not entries:
        count, size = unreferenced_chunks(chunks)
        if count:
            click.echo(
                f"no manifest in {chunks.store.url}, only {count} unreferenced chunks ({size_text(size)}); "
                "`quickthaw weights gc` deletes those older than a day",
                err=True,
            )
        else:
            click.echo(
                f"nothing in {chunks.store.url} yet; `quickthaw weights import DIRECTORY` adds a model", err=True
            )
    for e in entries:
        shared = size_text(e.size - e.unshared)
        name = ", ".join(e.names) or "-"
        if e.damage:
            click.echo(one_line(f"{e.manifest[:16]:16}  DAMAGED   {name}: {e.damage}"))
            continue
        click.echo(
            one_line(
                f"{e.manifest[:16]}  {e.kind:8}  {size_text(e.size):>9}  shared {shared:>9}  {e.files:5} files  {name}"
            )
        )


@weights.command()
@click.argument("names", nargs=-1, metavar="[MANIFEST]...")
@option(
    "--repair",
    is_flag=True,
    envvar="QUICKTHAW_REPAIR",
    help="Delete damaged chunks and manifests, so that the next import writes them again. Empty the quarantine.",
)
@option(
    "--cache/--no-cache",
    "with_cache",
    default=True,
    envvar="QUICKTHAW_VERIFY_CACHE",
    show_default=True,
    help="Whether to verify this host's cache too.",
)
@store_option
@json_option
@reports_errors
def verify(names: tuple[str, ...], repair: bool, with_cache: bool, store: str | None, as_json: bool) -> None:
    """Read and hash every chunk of the manifests (default: all). The exit code is 1 if anything is damaged or missing."""
    from lazyfs.admin.verify import verify as check
    from lazyfs.admin.verify import verify_cache
    from lazyfs.cache.cache import Cache
    from lazyfs.paths import home

    chunks = open_chunks(store)
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
        click.echo(f"{report.manifests} manifests, {report.chunks} chunks, {size_text(report.bytes)} read", err=True)
        for kind, found in (("damaged", report.bad), ("missing", report.missing)):
            for digest, path in found.items():
                click.echo(one_line(f"{kind} chunk {digest[:16]} of {path}"))
        for digest, why in report.broken_manifests.items():
            removed = "; removed" if repair and not chunks.has_manifest(digest) else ""
            click.echo(one_line(f"manifest {digest[:16]}: {why}{removed}"))
        for name, why in report.broken_names.items():
            click.echo(one_line(f"{name}: {why}"))
        if report.cache_bad:
            click.echo(f"{report.cache_bad} damaged chunks of the cache removed; they will be fetched again")
        if report.cache_skipped:
            click.echo(f"{report.cache_skipped} cached files not verified: the disk has no room to open them", err=True)
        if quarantined:
            click.echo(
                f"quarantine ({cache.root / 'quarantine'}{', emptied now' if repair else ''}): {len(quarantined)} bodies "
                "that did not match their digest and were not served",
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
            click.echo(f"remedy: {first}`quickthaw weights import` of the original writes what is missing", err=True)
        click.echo("clean" if report.clean else "NOT clean")
    if repair:
        cache.clear_quarantine()
    sys.exit(0 if report.clean else 1)


@weights.command()
@click.argument("name", metavar="MANIFEST")
@store_option
@json_option
@reports_errors
def rm(name: str, store: str | None, as_json: bool) -> None:
    """Remove a tag or a manifest.

    The last name of a manifest removes the manifest; the digest of a manifest removes it with all its names.

    `quickthaw weights gc` then deletes the chunks. A mount of the manifest loses what is neither cached nor in the original
    directory: unmount it first.
    """
    from lazyfs.admin.listing import remove

    removed = remove(open_chunks(store), name)
    click.echo(json.dumps({"removed": removed}) if as_json else "\n".join(f"removed {r}" for r in removed))


@weights.command()
@option(
    "--grace",
    type=Duration(bare="h"),
    default="24h",
    show_default=True,
    envvar="QUICKTHAW_GC_GRACE",
    metavar="TIME",
    help="Keep chunks younger than this; a number without a unit counts hours.",
)
@option("--untagged", is_flag=True, envvar="QUICKTHAW_GC_UNTAGGED", help="Remove weights without a tag too.")
@option("--dry-run", is_flag=True, envvar="QUICKTHAW_DRY_RUN", help="Only print what would be deleted.")
@store_option
@json_option
@reports_errors
def gc(grace: float, untagged: bool, dry_run: bool, store: str | None, as_json: bool) -> None:
    """Delete the chunks that no manifest mentions."""
    from lazyfs.admin.gc import collect

    done = collect(open_chunks(store), grace_s=grace, untagged=untagged, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps({**asdict(done), "dry_run": dry_run}))
        return
    verb = "would delete" if dry_run else "deleted"
    click.echo(
        f"{verb} {done.chunks} chunks ({size_text(done.bytes)}) and {done.manifests} manifests; "
        f"{done.kept} in use, {done.young} younger than --grace"
    )


@weights.command()
@click.argument("source", metavar="DIRECTORY|NAME")
@click.argument("target", metavar="oci://HOST/REPOSITORY[:TAG]")
@store_option
@json_option
@reports_errors
def push(source: str, target: str, store: str | None, as_json: bool) -> None:
    """Push a directory, or weights of the store by their name, to an OCI registry: one layer for each file, as ORAS and ModelPack do.

    A directory is named by a path that begins with "/", "." or "~", or ends with "/". Credentials are those of `docker login`.

    \b
    quickthaw weights push ./model oci://registry.example/team/model:v1
    quickthaw weights push model:v1 oci://registry.example/team/model:v1
    """
    from lazyfs.content.artifacts import push_folder, push_manifest
    from lazyfs.stores import opened
    from lazyfs.stores.oci import OciStore, parse

    parse(target)
    with opened(target) as registry:
        assert isinstance(registry, OciStore)
        if source.startswith(("/", ".", "~")) or source.endswith("/"):
            done = push_folder(Path(source).expanduser(), registry)
        else:
            done = push_manifest(source, open_chunks(store), registry)
    _print_moved(done, f"{done.new} blobs sent, the others were there", as_json)


@weights.command()
@click.argument("source", metavar="oci://HOST/REPOSITORY[:TAG|@DIGEST]")
@click.argument("directory", type=PathArgument())
@json_option
@reports_errors
def pull(source: str, directory: Path, as_json: bool) -> None:
    """Pull the files of an artifact into DIRECTORY, each verified. (`import` pulls them into a store, `mount` reads them in place.)"""
    from lazyfs.content.artifacts import pull as pull_files
    from lazyfs.stores import opened
    from lazyfs.stores.oci import OciStore, parse

    parse(source)
    with opened(source) as registry:
        assert isinstance(registry, OciStore)
        done = pull_files(registry, directory.expanduser())
    _print_moved(done, f"{done.new} files written, the others were there", as_json)


def _print_moved(done: Moved, what: str, as_json: bool) -> None:
    click.echo(json.dumps(asdict(done)) if as_json else done.digest)
    if not as_json:
        click.echo(f"{done.files} files, {size_text(done.bytes)}; {what}", err=True)
