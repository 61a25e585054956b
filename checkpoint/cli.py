"""`quickthaw snapshot …`: list, inspect, verify, push, pull and remove snapshots."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import msgspec

from checkpoint.errors import CheckpointError, Failed, NotFound
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.manifest import Snapshot
from lazyfs.errors import one_line


def _library() -> Library:
    return Library(Path(os.environ.get("QUICKTHAW_HOME") or Path.home() / ".cache" / "quickthaw"))


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
@click.option("--json", "as_json", is_flag=True, help="Plain data instead of the table.")
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
@click.option("--check", "check_here", is_flag=True, help="Say what speaks against a restore on this host.")
@click.option("--contents", is_flag=True, help="Say what the bytes are: by process and kind, zero and duplicate pages.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    help="Draw the working set, address space by order of need (.svg or .png).",
)
@click.option("--json", "as_json", is_flag=True, help="Plain data.")
def inspect(name: str, check_here: bool, contents: bool, picture: Path | None, as_json: bool) -> int:
    """Show what a snapshot is, and why it would or would not be restored here.

    \b
    quickthaw snapshot inspect NAME --check
    quickthaw snapshot inspect NAME --contents
    quickthaw snapshot inspect NAME --picture working-set.svg
    """
    library = _library()
    with library.in_use(name):
        return _inspect(library, name, check_here, contents, picture, as_json)


def _inspect(library: Library, name: str, check_here: bool, contents: bool, picture: Path | None, as_json: bool) -> int:
    from checkpoint.inspect import picture as pictures

    found = library.load(name)
    data: dict[str, Any] = msgspec.to_builtins(found)
    files = data.pop("files")
    del data["weight_areas"]
    data["file_bytes"] = sum(file["size"] for file in files.values())
    data["health"] = msgspec.to_builtins(library.health(name)) | {"quarantined": library.health(name).quarantined}
    data["secrets_present"] = found.identity.get("secret_names", [])
    mismatches: list[dict[str, str]] = []
    if check_here:
        mismatches = [{"code": code, "message": message} for code, message in _against(library, found)]
        data["mismatches"] = mismatches
    inside = None
    if contents:
        from checkpoint.inspect import contents as reader

        inside = reader.inspect(library.path(name), weights=found.weight_areas)
        data["contents"] = msgspec.to_builtins(inside)
    needed: list[pictures.ProcessShare] = []
    state = "not recorded yet; the first restore does"
    try:
        needed = pictures.shares(library.path(name))
    except NotFound:
        pass  # the first restore records it
    except Failed as error:
        state = f"[{error.code}] {error}; the next two restores record it anew"
        data["working_set_error"] = {"code": error.code, "message": str(error)}
    data["working_set"] = msgspec.to_builtins(needed)
    if picture:
        pictures.draw(library.path(name), picture)
        click.echo(f"wrote {picture}", err=True)
    if as_json:
        click.echo(json.dumps(data, indent=1))
        return 1 if mismatches else 0
    for key in ("name", "created", "engine", "model", "model_digest"):
        click.echo(f"{key.replace('_', ' '):<22} {data[key]}")
    where = "left out; read again at a restore" if found.weights == "thin" else "in the images"
    click.echo(f"{'weights':<22} {found.weights} ({where})")
    click.echo(
        f"{'images':<22} {found.image_bytes / 1e9:.3f} GB, without {found.kv_cache_bytes / 1e9:.3f} GB of empty KV cache"
    )
    if found.gpu.processes:
        memory = ", ".join(f"{size / 1e9:.1f} GB on {uuid}" for uuid, size in found.gpu.memory.items())
        click.echo(f"{'GPU':<22} {found.gpu.processes} processes, {memory or 'nothing on it'}")
    parts = ", ".join(f"{p.phase} {p.took_s:.1f}" for p in found.timeline if p.took_s >= 0.05)
    click.echo(f"{'saves a cold start of':<22} {found.cold_s:.1f} s ({parts})")
    click.echo(f"{'canary':<22} {found.canary.prompt!r} → {found.canary.token_ids}")
    click.echo(
        f"{'secrets present':<22} {', '.join(data['secrets_present']) or 'none recognised'} (names only; --scrub-env leaves them out)"
    )
    health = library.health(name)
    click.echo(f"{'failed restores':<22} {health.failures}{' (last: ' + health.reason + ')' if health.reason else ''}")
    if health.quarantined:
        click.echo(
            f"{'quarantined':<22} since {health.at}; launches pass it over until it is removed: quickthaw snapshot rm {name}"
        )
    if check_here:
        for one in mismatches:
            click.echo(f"{'against a restore':<22} {one['code']}: {one['message']}")
        if not mismatches:
            click.echo(f"{'against a restore':<22} nothing on this host")
    if needed:
        click.echo()
        for line in pictures.render(needed):
            click.echo(one_line(line))
    else:
        click.echo(f"{'working set':<22} {state}")
    if inside is not None:
        click.echo()
        for line in reader.render(inside):
            click.echo(one_line(line))
    return 1 if mismatches else 0


def _against(library: Library, found: Snapshot) -> list[tuple[str, str]]:
    """List all reasons against a restore here, independent of the launch: (stable code, one line)."""
    from checkpoint.compatibility import check as identity
    from checkpoint.compatibility.engine import engine_facts
    from checkpoint.compatibility.host import host_facts
    from checkpoint.criu.binary import Criu
    from checkpoint.snapshot import digests
    from lazyfs.content.stat_index import known_digest

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
        if folder and not Path(folder).is_dir():
            reasons.append((code, f"the engine expects the folder {folder}, which is not here"))
    if found.model_path and Path(found.model_path).is_dir():
        digest = known_digest(Path(found.model_path))
        if digest and recorded.model and digest != recorded.model:
            reasons.append(
                ("model-differs", f"model manifest {recorded.model[:12]} in the snapshot, {digest[:12]} here")
            )
    try:
        digests.verify(library.path(found.name), found.files)
    except CheckpointError as error:
        reasons.append((error.code, str(error.args[0])))
    health = library.health(found.name)
    if health.quarantined:
        reasons.append(("quarantined", f"{health.failures} restores in a row failed, the last with {health.reason}"))
    return reasons


@snapshot.command("verify")
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Plain data.")
@click.option(
    "--trust-key",
    "trust_keys",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Ask for a signature by one of these keys.",
)
def verify(names: tuple[str, ...], as_json: bool, trust_keys: tuple[Path, ...]) -> int:
    """Read every byte of snapshots and compare with their digests (all of them, where none is named).

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
    """Remove snapshots. One that is being restored is left alone, with an error.

    \b
    quickthaw snapshot rm NAME NAME
    """
    library = _library()
    for name in names:
        library.remove(name)
        click.echo(f"removed {name}")


def _store(url: str | None) -> str:
    return url or os.environ.get("QUICKTHAW_STORE") or str(_library().home / "store")


@snapshot.command("push")
@click.argument("name")
@click.argument("store", required=False)
@click.option(
    "--sign-key",
    type=click.Path(path_type=Path),
    help="Sign the archive, so that hosts with a trust key can restore before all of it is there.",
)
@click.option("--json", "as_json", is_flag=True, help="Plain data.")
def push(name: str, store: str | None, sign_key: Path | None, as_json: bool) -> None:
    """Store a snapshot as content-addressed chunks; what the store has already is not sent again.

    What a restore needs first lies together in the archive, as the snapshot's restores have recorded it.

    \b
    quickthaw snapshot push NAME s3://bucket/quickthaw
    quickthaw snapshot push NAME /mnt/shared/store
    """
    from checkpoint.snapshot import signatures
    from checkpoint.store import archive

    library = _library()
    with library.in_use(name) as folder:
        done = archive.push(
            folder,
            archive.open_chunks(_store(store)),
            progress=None if as_json else _meter("pushed"),
            sign=signatures.signer(sign_key) if sign_key else None,
        )
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(done)))
    else:
        again = done.zero + done.copies + done.shared
        click.echo(
            f"pushed {name} to {_store(store)}: {done.size / 1e9:.2f} GB, {done.stored / 1e9:.2f} GB of it written compressed, "
            f"{again / 1e9:.2f} GB empty or there already"
        )
        if not library.working_set(name).exists():
            click.echo(
                "its working set is not known yet (its first restore records it): a restore from there waits for all of it"
            )


@snapshot.command("pull")
@click.argument("name")
@click.argument("store", required=False)
@click.option(
    "--trust-key",
    "trust_keys",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Ask for a signature by one of these keys.",
)
@click.option("--json", "as_json", is_flag=True, help="Plain data.")
def pull(name: str, store: str | None, trust_keys: tuple[Path, ...], as_json: bool) -> None:
    """Fetch a snapshot from a store; every byte is verified before the snapshot gets its name. An interrupted pull goes on where it was.

    \b
    quickthaw snapshot pull NAME s3://bucket/quickthaw
    quickthaw snapshot pull NAME s3://bucket/quickthaw --trust-key release.pub
    """
    from checkpoint.store import archive

    library = _library()
    chunks = archive.open_chunks(_store(store))
    progress = None if as_json else _meter("pulled")
    done = archive.pull(name, chunks, library.path(name), progress=progress, trust_keys=trust_keys)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(done)))
    else:
        click.echo(
            f"pulled {name}: {done.size / 1e9:.2f} GB in {done.files} files, {done.fetched / 1e9:.2f} GB of it fetched"
        )


def _meter(word: str) -> Any:
    """Return a callback that shows progress on standard error, at most ten times a second."""
    import sys
    import time

    last = [0.0]

    def tell(progress: Any) -> None:
        now = time.monotonic()
        if now - last[0] > 0.1 and sys.stderr.isatty():
            last[0] = now
            click.echo(f"\r{word} {progress.done / 1e9:.2f} of {progress.total / 1e9:.2f} GB ", nl=False, err=True)

    return tell


@snapshot.command("gc")
def gc() -> None:
    """Remove what killed launches and interrupted pulls left half-written; to go on with a pull, pull again instead."""
    click.echo(f"removed {_library().sweep(pulls_older_s=0.0)} unfinished")


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
