"""`quickthaw snapshot …`: list, inspect, verify, push, pull and remove snapshots."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from checkpoint.errors import CheckpointError, Failed, NotFound
from checkpoint.gc import gc
from checkpoint.snapshot.library import Health, Library
from checkpoint.snapshot.manifest import Snapshot
from lazyfs.errors import one_line
from lazyfs.paths import state_folder

if TYPE_CHECKING:
    from checkpoint.store.archive import OpenedArchive
    from lazyfs.content.chunk_store import ChunkStore

_json = click.option(
    "--json", "as_json", is_flag=True, envvar="QUICKTHAW_JSON", show_envvar=True, help="Print JSON instead of text."
)
_trust_keys = click.option(
    "--trust-key",
    "trust_keys",
    type=click.Path(path_type=Path),
    multiple=True,
    envvar="QUICKTHAW_TRUST_KEY",
    show_envvar=True,
    help="Require a signature by one of these keys.",
)
_store = click.argument("store", required=False, envvar="QUICKTHAW_STORE")


def _library() -> Library:
    return Library(state_folder())


def _row(library: Library, name: str) -> dict[str, Any]:
    health = library.health(name)
    row: dict[str, Any] = {
        "name": name,
        "failures": health.failures,
        "quarantined": health.quarantined,
        "reason": health.reason,
    }
    try:
        snapshot = library.load(name)
    except CheckpointError as error:
        return row | {"damaged": str(error)}
    return row | {
        "created": snapshot.created,
        "engine": snapshot.engine,
        "model": snapshot.model,
        "weights": snapshot.weights,
        "image_bytes": snapshot.image_bytes,
        "kv_cache_bytes_left_out": snapshot.kv_cache_bytes,
        "cold_s": snapshot.cold_s,
        "damaged": None,
    }


@click.group()
def snapshot() -> None:
    """Snapshots of warmed-up engines on this host.

    \b
    quickthaw snapshot ls
    quickthaw snapshot inspect NAME --contents
    quickthaw snapshot rm NAME
    """


@snapshot.command("ls")
@_json
def ls(as_json: bool) -> None:
    """List the snapshots of this host, oldest first.

    \b
    quickthaw snapshot ls --json
    """
    library = _library()
    rows = [_row(library, name) for name in library.names()]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        click.echo("no snapshots yet; quickthaw launch takes one at the first start")
        return
    width = max(len(row["name"]) for row in rows)
    click.echo(f"{'NAME':<{width}}  {'ENGINE':<7} {'IMAGES':>9} {'SAVES':>8}  CREATED               STATE")
    for row in rows:
        if row["damaged"]:
            click.echo(one_line(f"{row['name']:<{width}}  damaged: {row['damaged']}"))
            continue
        state = (
            f"quarantined: {row['reason']}"
            if row["quarantined"]
            else f"{row['failures']} failed restores"
            if row["failures"]
            else "ok"
        )
        size = f"{row['image_bytes'] / 1e9:.2f} GB"
        click.echo(
            f"{row['name']:<{width}}  {row['engine']:<7} {size:>9} {row['cold_s']:>6.1f} s  {row['created']:<20}  {state}"
        )


@snapshot.command("inspect")
@click.argument("name")
@click.option(
    "--check",
    "check_here",
    is_flag=True,
    envvar="QUICKTHAW_SNAPSHOT_CHECK",
    show_envvar=True,
    help="List every reason against a restore on this host.",
)
@click.option(
    "--contents",
    "with_contents",
    is_flag=True,
    envvar="QUICKTHAW_SNAPSHOT_CONTENTS",
    show_envvar=True,
    help="Break the bytes down by process and kind of memory, with zero and duplicate pages.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    envvar="QUICKTHAW_SNAPSHOT_PICTURE",
    show_envvar=True,
    help="Draw the working set into this file (.svg or .png): address space by order of need.",
)
@_json
def inspect(name: str, check_here: bool, with_contents: bool, picture: Path | None, as_json: bool) -> int:
    """Show what a snapshot is, and why it would or would not be restored here.

    \b
    quickthaw snapshot inspect NAME --check
    quickthaw snapshot inspect NAME --contents
    quickthaw snapshot inspect NAME --picture working-set.svg
    """
    from checkpoint.inspect import contents
    from checkpoint.inspect import picture as pictures

    library = _library()
    with library.in_use(name) as folder:
        found = library.load(name)
        data: dict[str, Any] = msgspec.to_builtins(found)
        del data["weight_areas"]
        data["file_bytes"] = sum(file["size"] for file in data.pop("files").values())
        health = library.health(name)
        data["health"] = msgspec.to_builtins(health) | {"quarantined": health.quarantined}
        data["secrets_present"] = found.identity.get("secret_names", [])
        if check_here:
            data["mismatches"] = [{"code": code, "message": text} for code, text in _reasons_against(library, found)]
        memory = contents.inspect(folder, found.weight_areas) if with_contents else None
        if memory:
            data["contents"] = msgspec.to_builtins(memory)
        shares: list[pictures.ProcessShare] = []
        state = "not recorded yet; the first restore records it"
        try:
            shares = pictures.shares(folder)
        except NotFound:
            pass
        except Failed as error:
            state = f"[{error.code}] {error}; the next two restores record it again"
            data["working_set_error"] = {"code": error.code, "message": str(error)}
        data["working_set"] = msgspec.to_builtins(shares)
        if picture:
            pictures.draw(folder, picture)
            click.echo(f"wrote {picture}", err=True)
    if as_json:
        click.echo(json.dumps(data, indent=1))
    else:
        for line in _described(found, health, data):
            click.echo(line)
        for line in ("", *pictures.render(shares)) if shares else (f"{'working set':<22} {state}",):
            click.echo(one_line(line))
        for line in ("", *contents.render(memory)) if memory else ():
            click.echo(one_line(line))
    return 1 if data.get("mismatches") else 0


def _described(found: Snapshot, health: Health, data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `inspect` that need no images."""

    def row(name: str, text: str) -> str:
        return f"{name:<22} {text}"

    for key in ("name", "created", "engine", "model", "model_digest"):
        yield row(key.replace("_", " "), data[key])
    where = "excluded; a restore reads them again" if found.weights == "excluded" else "in the images"
    yield row("weights", f"{found.weights} ({where})")
    yield row(
        "images", f"{found.image_bytes / 1e9:.3f} GB, without {found.kv_cache_bytes / 1e9:.3f} GB of empty KV cache"
    )
    if found.gpu.processes:
        memory = ", ".join(f"{size / 1e9:.1f} GB on {uuid}" for uuid, size in found.gpu.memory.items())
        yield row("GPU", f"{found.gpu.processes} processes, {memory or 'no memory in use'}")
    phases = ", ".join(f"{phase.phase} {phase.took_s:.1f}" for phase in found.timeline if phase.took_s >= 0.05)
    yield row("saves a cold start of", f"{found.cold_s:.1f} s ({phases})")
    yield row("canary", str(found.canary))
    secrets = ", ".join(data["secrets_present"]) or "none recognised"
    yield row("secrets present", f"{secrets} (names only; --scrub-env excludes them)")
    yield row("failed restores", f"{health.failures}{f' (last: {health.reason})' if health.reason else ''}")
    if health.quarantined:
        yield row("quarantined", f"since {health.at}; launches skip it until: quickthaw snapshot rm {found.name}")
    if "mismatches" in data:
        for one in data["mismatches"] or ({"code": "none", "message": "this host can restore it"},):
            yield row("against a restore", f"{one['code']}: {one['message']}")


def _reasons_against(library: Library, found: Snapshot) -> list[tuple[str, str]]:
    """List every reason against a restore here that does not depend on the launch: (stable code, one line)."""
    from checkpoint.compatibility import check as identity
    from checkpoint.compatibility.engine import engine_facts
    from checkpoint.compatibility.host import host_facts
    from checkpoint.compatibility.model_files import ModelFiles
    from checkpoint.criu.binary import Criu
    from checkpoint.snapshot import digests

    recorded = identity.Identity.decode(found.identity)
    reasons: list[tuple[str, str]] = []
    criu = ""
    try:
        found_criu = Criu.find(library.home)
        criu = found_criu.cached_version(library.home)
        found_criu.check_cpu(library.path(found.name) / "images")
    except CheckpointError as error:
        reasons.append((error.code, str(error.args[0])))
    try:
        reasons += [
            (m.code, m.message)
            for m in identity.check_host(recorded, host_facts(criu))
            if criu or m.code != "criu-older"
        ]
        now = engine_facts(found.engine, Path(recorded.engine.interpreter))
        reasons += [(m.code, m.message) for m in identity.check_engine(recorded.engine, now)]
    except CheckpointError as error:
        reasons.append((error.code, str(error.args[0])))
    for folder, code in ((found.model_path, "model-path-missing"), (found.cwd, "working-folder-missing")):
        if folder and not Path(folder).exists():
            reasons.append((code, f"the engine uses {folder}, which does not exist here"))
    if found.model_path and Path(found.model_path).exists():
        with contextlib.suppress(OSError):
            digest = ModelFiles(Path(found.model_path), library.home).known_digest()
            if digest and recorded.model:
                reasons += [(m.code, m.message) for m in identity.check_model(recorded.model, digest)]
    try:
        digests.verify(library.path(found.name), found.files)
    except CheckpointError as error:
        reasons.append((error.code, str(error.args[0])))
    health = library.health(found.name)
    if health.quarantined:
        reasons.append(
            ("quarantined", f"{health.failures} restores in a row failed, the last one with {health.reason}")
        )
    return reasons


@snapshot.command("verify")
@click.argument("names", nargs=-1)
@_json
@_trust_keys
def verify(names: tuple[str, ...], as_json: bool, trust_keys: tuple[Path, ...]) -> int:
    """Compare every byte of the named snapshots, or of all, with their digests.

    \b
    quickthaw snapshot verify
    quickthaw snapshot verify NAME --trust-key release.pub
    """
    from checkpoint.snapshot import digests, signatures

    library = _library()
    results: list[dict[str, Any]] = []
    for name in names or library.names():
        try:
            with library.in_use(name) as folder:
                if trust_keys:
                    signatures.check_folder(folder, trust_keys)
                files = library.load(name).files
                done = digests.verify(folder, files, always=True)
            results.append({"name": name, "ok": True, "bytes": done.hashed, "error": None})
        except CheckpointError as error:
            results.append({"name": name, "ok": False, "bytes": 0, "error": str(error)})
    if as_json:
        click.echo(json.dumps(results, indent=1))
    else:
        for one in results:
            click.echo(
                f"{one['name']}: " + (f"ok, {one['bytes'] / 1e9:.2f} GB read" if one["ok"] else f"{one['error']}")
            )
    return 0 if all(one["ok"] for one in results) else 1


@snapshot.command("rm")
@click.argument("names", nargs=-1, required=True)
def rm(names: tuple[str, ...]) -> None:
    """Remove snapshots. Fails for one that is being restored.

    \b
    quickthaw snapshot rm NAME NAME
    """
    library = _library()
    for name in names:
        library.remove(name)
        click.echo(f"removed {name}")


@snapshot.command("push")
@click.argument("name")
@_store
@click.option(
    "--sign-key",
    type=click.Path(path_type=Path),
    envvar="QUICKTHAW_SIGN_KEY",
    show_envvar=True,
    help="Sign the archive, so that a host with --trust-key can begin a restore before it has fetched all of it.",
)
@_json
def push(name: str, store: str | None, sign_key: Path | None, as_json: bool) -> None:
    """Store a snapshot as content-addressed chunks. Chunks that the store already has are not sent again.

    The archive begins with the recorded working set, so that a restore can begin before it has fetched the rest.

    \b
    quickthaw snapshot push NAME s3://bucket/quickthaw
    quickthaw snapshot push NAME /mnt/shared/store
    """
    from checkpoint.snapshot import signatures
    from checkpoint.store import archive

    library = _library()
    url = store or str(library.home / "store")
    with library.in_use(name) as folder:
        done = archive.push(
            folder,
            archive.open_chunks(url),
            progress=None if as_json else _meter("pushed"),
            sign=signatures.signer(sign_key) if sign_key else None,
        )
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(done)))
        return
    reused = done.zero + done.copies + done.shared
    click.echo(
        f"pushed {name} to {url}: {done.size / 1e9:.2f} GB, of which {done.stored / 1e9:.2f} GB were written (compressed) "
        f"and {reused / 1e9:.2f} GB were zeros or already stored"
    )
    if not library.working_set(name).exists():
        click.echo(
            "no working set recorded yet (the first restore records it): restores from the store wait for the whole snapshot"
        )


@snapshot.command("pull")
@click.argument("name")
@_store
@_trust_keys
@_json
def pull(name: str, store: str | None, trust_keys: tuple[Path, ...], as_json: bool) -> None:
    """Fetch a snapshot from a store. Every byte is verified before the snapshot gets its name.

    Of one that several kinds of hosts have made, the one that this host may restore.

    If it has a working set, what a fast first restore needs beside it is made, too, and its model is read once for its digest if it is
    here. An interrupted pull continues where it stopped.

    \b
    quickthaw snapshot pull NAME s3://bucket/quickthaw
    quickthaw snapshot pull NAME s3://bucket/quickthaw --trust-key release.pub
    """
    from checkpoint.compatibility.model_files import ModelFiles
    from checkpoint.snapshot import rehearsal
    from checkpoint.store import archive

    library = _library()
    chunks = archive.open_chunks(store or str(library.home / "store"))
    progress = None if as_json else _meter("pulled")
    fitting = functools.partial(_fitting, name, chunks, trust_keys) if "-" in name else None
    done = archive.pull(name, chunks, library.path(name), progress=progress, trust_keys=trust_keys, find=fitting)
    try:
        with library.in_use(name) as folder:
            found = library.load(name)
            rehearsal.prepare(folder, found)
        if found.model_path:
            with contextlib.suppress(OSError):  # the model need not be here
                ModelFiles(Path(found.model_path), library.home).digest()
    except CheckpointError as error:  # the snapshot is here and complete
        click.echo(f"its first restore will be a slower one: {error}", err=True)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(done)))
    else:
        click.echo(
            f"pulled {name}: {done.size / 1e9:.2f} GB in {done.files} files, of which {done.fetched / 1e9:.2f} GB were fetched"
        )


def _fitting(name: str, chunks: ChunkStore, trust_keys: tuple[Path, ...]) -> OpenedArchive:
    """Open the snapshot that this host may restore, else, with a line that says so, the one pushed last."""
    from checkpoint.compatibility.host import host_facts
    from checkpoint.compatibility.host_class import accepts, host_class
    from checkpoint.errors import HostLacks, Incompatible
    from checkpoint.store.variants import open_fitting

    try:
        here = host_facts()
        return open_fitting(name, chunks, host_class(here), accepts(here, name), trust_keys)
    except (HostLacks, Incompatible) as error:
        click.echo(one_line(f"{name} cannot be restored on this host: {error}"), err=True)
        return open_fitting(name, chunks, "", None, trust_keys)


def _meter(word: str) -> Any:
    """Return a callback that shows progress on standard error, at most ten times a second."""
    import sys
    import time

    last = [0.0]

    def show(progress: Any) -> None:
        now = time.monotonic()
        if now - last[0] > 0.1 and sys.stderr.isatty():
            last[0] = now
            click.echo(f"\r{word} {progress.done / 1e9:.2f} of {progress.total / 1e9:.2f} GB ", nl=False, err=True)

    return show


snapshot.add_command(gc)


@snapshot.command("keygen")
@click.argument("private", type=click.Path(path_type=Path))
def keygen(private: Path) -> None:
    """Make an Ed25519 key pair, PRIVATE and PRIVATE.pub, for --sign-key and --trust-key.

    \b
    quickthaw snapshot keygen release.key
    quickthaw launch --sign-key release.key vllm …
    quickthaw launch --trust-key release.key.pub vllm …
    """
    from checkpoint.snapshot import signatures

    click.echo(f"key {signatures.keygen(private)}: {private} (keep it secret), {private}.pub")
