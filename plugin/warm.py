"""`quickthaw warm`: bring what a launch needs to this host before it is needed, its snapshot and its model.

It is for nodes, as a DaemonSet or a Job, so whatever cannot be brought costs a line with its code, and the rest is brought. What is
there is left alone; what was interrupted goes on where it stopped; of two on one host, one fetches and the other one waits.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plugin.launch import PASS_THROUGH, engine_options, start_log
from plugin.options import Duration, Rate, log_options, option, sources, trusting, using

if TYPE_CHECKING:
    from checkpoint.compatibility.host import HostFacts
    from checkpoint.snapshot.library import Library
    from checkpoint.store.variants import Accept
    from lazyfs.stores.rate import Limiter
    from plugin.runtime.config import LaunchSettings

log = logging.getLogger("quickthaw")
OTHER_LIMIT_S, _POLL_S = 3600.0, 0.5
"""How long another process of this host may take for the same snapshot."""


@dataclasses.dataclass
class Warmed:
    """What is here afterwards, and the bytes that were fetched for it; `failed`: what is not, by code."""

    snapshots: list[str] = dataclasses.field(default_factory=list)
    models: list[str] = dataclasses.field(default_factory=list)
    fetched_bytes: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)

    def attempt(self, what: Callable[[], None]) -> None:
        """Run one part. A failure is one line, and the other parts follow."""
        from checkpoint.errors import CheckpointError
        from launchers.errors import LauncherError
        from lazyfs.errors import LazyfsError
        from plugin.cli import with_code

        try:
            what()
        except (CheckpointError, LauncherError, LazyfsError) as error:
            log.warning("%s", with_code(error))
            self.failed.append(error.code)
        except OSError as error:
            log.warning("host-io: %s; quickthaw doctor checks this host", error)
            self.failed.append("host-io")


class Warming:
    """One run, with one rate for all that it fetches."""

    def __init__(self, home: Path, options: dict[str, Any]) -> None:
        from lazyfs.stores.rate import Limiter

        self.home, self.options, self.done = home, options, Warmed()
        self.limiter: Limiter = Limiter(options["rate"])

    def launch(self, settings: LaunchSettings) -> None:
        """Bring the model and the snapshot that a launch with these settings selects."""
        from plugin.runtime.steps.model_mount import Weights

        weights = Weights.of(settings, enabled=False)
        try:
            self.done.attempt(lambda: self._weights(settings, weights))
            if weights.path is None:
                log.warning("no snapshot is looked for: its name is not known without the model")
            else:
                self.done.attempt(lambda: self._snapshot_of(settings, weights))
        finally:
            weights.close()

    def _weights(self, settings: LaunchSettings, weights: Any) -> None:
        from checkpoint.errors import NotFound

        if weights.hub.names_model:
            if self.limiter.bytes_per_s:
                log.info("%s comes by the hub's own client, which keeps to no --rate", settings.command.model)
            weights.fetch(2)
        if weights.path is None:
            raise NotFound(
                "model-not-here", f"{settings.command.model} is no folder or file of this host; mount it here"
            )
        if digest := weights.stored():
            self._chunks(settings.command.model, digest, str(settings.store_url))
        else:
            self.done.models.append(settings.command.model)
            log.info("model %s: read in place, at %s", settings.command.model, weights.path)

    def _chunks(self, name: str, digest: str, url: str) -> None:
        """Fetch a model's chunks into the cache. Raises LazyfsError."""
        from lazyfs.cli.options import size_text
        from lazyfs.fetch.warm import warm
        from lazyfs.mount.config import MountConfig
        from lazyfs.mount.manifest_source import load_manifest

        config = MountConfig.without_mount(
            digest,
            url,
            self.home,
            cache_limit=self.options["cache_limit"],
            trust_keys=tuple(str(key.absolute()) for key in self.options["trust_key"]),
        )
        found = warm(config, load_manifest(config), limiter=self.limiter)
        self.done.models.append(name)
        self.done.fetched_bytes += found.fetched
        log.info("model %s: %s fetched, %s were there", name, size_text(found.fetched), size_text(found.present))

    def _snapshot_of(self, settings: LaunchSettings, weights: Any) -> None:
        from checkpoint.compatibility.check import Identity
        from checkpoint.compatibility.host_class import as_seen
        from checkpoint.snapshot import manifest
        from plugin.runtime.steps import compatibility

        here = compatibility.gather(settings, weights, None)
        name = settings.name or compatibility.snapshot_name(settings, here)

        def accept(document: bytes, _: bytes | None) -> None:
            found = manifest.parse(document, Path(name), name)
            then = Identity.decode(found.identity).host
            compatibility.check(found, dataclasses.replace(here, host=as_seen(here.host, then)), settings, weights)

        self._snapshot(name, here.host, accept)

    def _snapshot(self, name: str, host: HostFacts, accept: Accept) -> None:
        """Fetch a snapshot that this host may restore. Raises CheckpointError."""
        from checkpoint.errors import CheckpointError, NotFound
        from checkpoint.snapshot import manifest, rehearsal
        from checkpoint.snapshot.library import Library
        from lazyfs.cli.options import size_text

        library = Library(self.home)
        if not library.has(name) and not self.options["snapshot_store"]:
            raise NotFound("no-snapshot-store", f"{name} is not on this host; give --snapshot-store")
        fetched = self._pull(library, name, host, accept)
        if fetched is None:
            accept((library.path(name) / manifest.FILE_NAME).read_bytes(), None)
        try:
            with library.in_use(name) as folder:
                rehearsal.prepare(folder, library.load(name))
        except CheckpointError as error:  # it is here and complete
            log.warning("snapshot %s: its first restore will be a slower one: %s", name, error)
        self.done.snapshots.append(name)
        self.done.fetched_bytes += fetched or 0
        log.info("snapshot %s: %s", name, "here already" if fetched is None else f"{size_text(fetched)} fetched")

    def _pull(self, library: Library, name: str, host: HostFacts, accept: Accept) -> int | None:
        """Fetch a snapshot; return the bytes, None if it is here, also by another process, for which it waits."""
        from checkpoint.compatibility.host_class import host_class
        from checkpoint.errors import Busy, Failed
        from checkpoint.store import archive
        from checkpoint.store.variants import open_fitting
        from lazyfs.content.chunk_store import ChunkStore
        from lazyfs.stores.rate import Limited

        deadline, waited = time.monotonic() + OTHER_LIMIT_S, False
        if library.has(name):
            return None
        limited = ChunkStore(Limited(archive.open_chunks(self.options["snapshot_store"]).store, self.limiter))
        trusted = self.options["trust_key"]
        while not library.has(name):
            try:
                return archive.pull(
                    name,
                    limited,
                    library.path(name),
                    trust_keys=trusted,
                    find=lambda: open_fitting(name, limited, host_class(host), accept, trusted),
                ).fetched
            except Busy:
                if time.monotonic() > deadline:
                    raise
                if not waited:
                    log.info("snapshot %s: another process fetches it; waiting", name)
                waited = True
                time.sleep(_POLL_S)
            except Failed as error:
                if error.code != "snapshot-exists" or not library.has(name):
                    raise  # a folder without a manifest is no snapshot
        return None

    def name(self, name: str) -> None:
        """Bring a snapshot of --snapshot-store or a model of --store by its name."""
        from checkpoint.compatibility.host import host_facts
        from checkpoint.compatibility.host_class import accepts
        from checkpoint.errors import NotFound
        from lazyfs.cli.mount import resolve

        if self.options["snapshot_store"] and "://" not in name and "-" in name:
            host = host_facts()
            try:
                self._snapshot(name, host, accepts(host, name))
                return
            except NotFound as error:
                if error.code != "archive-not-found":
                    raise
                log.info("%s; looking for a model of that name", error)
        self._chunks(name, *resolve(name, self.options["store"]))


@click.command(context_settings=PASS_THROUGH)
@using(
    option(
        "--rate",
        type=Rate(),
        default="none",
        help="How much to fetch a second, such as 200M (bytes): what serves on this host needs the link, too.",
    ),
    option(
        "--every",
        type=Duration(),
        default="0",
        help="Stay, and look again after each such time: for a DaemonSet. 0: end.",
    ),
    *engine_options,
    *sources,
    trusting,
    option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
    *log_options,
)
@click.argument("engine", metavar="vllm|sglang|COMMAND|NAME")
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGS…")
def warm(engine: str, engine_arguments: tuple[str, ...], **options: Any) -> None:
    """Bring a launch's snapshot and model to this host before they are needed. Starts no engine.

    The arguments are those of `quickthaw launch`, or names of snapshots and models. Where this host cannot restore the
    snapshot of the store, it says why and brings the model only. Fails only if nothing of it is here afterwards.

    \b
    quickthaw warm --rate 200M --snapshot-store s3://bucket/quickthaw vllm --model /models/llama
    quickthaw warm --snapshot-store s3://bucket/quickthaw vllm-llama-3f9a1c2b7d
    quickthaw warm --every 10m --snapshot-store s3://bucket/quickthaw vllm --model Qwen/Qwen3-8B
    """
    from plugin.runtime.config import state_home
    from plugin.runtime.home import protect

    start_log(options)
    home = state_home()
    for warning in protect(home):
        log.warning("%s", warning)
    while True:
        run = Warming(home, options)
        _run(run, (engine, *engine_arguments))
        done = run.done
        if options["as_json"]:
            click.echo(json.dumps(dataclasses.asdict(done)))
        if not options["every"]:
            break
        time.sleep(options["every"])
    if not done.snapshots and not done.models:
        from checkpoint.errors import Failed

        raise Failed(
            "nothing-warmed", f"nothing of it is on this host ({', '.join(done.failed)}); the lines above say why"
        )


def _run(run: Warming, words: tuple[str, ...]) -> None:
    from launchers import command_words
    from launchers.errors import Usage
    from plugin.snapshots import settings_of

    try:
        command_words.read(words)
    except Usage as error:
        if error.code != "unknown-engine" or any(word.startswith("-") for word in words):
            raise
        for name in words:
            run.done.attempt(lambda name=name: run.name(name))  # type: ignore[misc]
        return
    if hub := [match[0] for word in words for match in re.finditer(r"hf://[^\s'\"]+", word)]:
        log.info("no snapshot is looked for: that of a model at hf:// is known once it is mounted")
        for url in hub:
            run.done.attempt(lambda url=url: run.name(url))  # type: ignore[misc]
        return
    options = run.options
    run.launch(
        settings_of(
            words[0],
            words[1:],
            options,
            store_url=options["store"],
            snapshot_store=options["snapshot_store"],
            cache_limit=options["cache_limit"],
            trust_keys=options["trust_key"],
        )
    )
