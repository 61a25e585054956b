"""A launch whose model is `hf://ORG/MODEL[@REVISION]`: the engine reads it through a lazy mount while it arrives.

The mount lies below the state folder, at a path that only the commit decides; the engine is given that path, and the model's name as
the one under which it serves. Where nothing can be mounted, the engine is given the model's own name, and downloads it itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from launchers.given_options import given_options, last

log = logging.getLogger("quickthaw")
PREFIX = "hf://"
# It outlives this module's call until the launch holds a file of it open, and a launch that was killed by no more than this.
_IDLE_EXIT_S = 60.0
# How long the hub may take to name the files of the model, in seconds: where they are known from an earlier start, and else. The
# launch does not listen before.
_KNOWN_LIMIT_S, _LIMIT_S = 4.0, 60.0


def names_hub(arguments: Sequence[str]) -> bool:
    """Return whether an argument is a model of the hub by its URL."""
    return any(_url_of(argument) for argument in arguments)


def resolve(arguments: Sequence[str], home: Path, cache_limit: int, *, mounts: bool) -> tuple[str, ...]:
    """Return the engine's arguments with the model's path in place of its URL.

    Mounts the model. Without `mounts`, and where that fails, the arguments are those of an engine that downloads it; the log
    says why. A `--revision` counts as that of the URL. Raises Usage for a URL that names no model, or another revision.
    """
    from lazyfs.errors import Usage
    from lazyfs.stores.hub import parse

    found = next(url for url in map(_url_of, arguments) if url)
    repository, revision = parse(found)
    options = given_options(arguments)
    source, given = found, last(options, "revision")
    if given:
        if "@" in found and given != revision:
            raise Usage(f"{found} and --revision {given} are two revisions; give one of them")
        source = f"{PREFIX}{repository}@{given}"
    served = () if "served-model-name" in options else ("--served-model-name", repository)
    place = _mounted(source, home, cache_limit) if mounts else None
    if place is not None:
        return (*_replaced(arguments, found, str(place)), *served)
    at = () if revision == "main" or given else ("--revision", revision)
    return (*_replaced(arguments, found, repository), *at)


def _mounted(url: str, home: Path, cache_limit: int) -> Path | None:
    from lazyfs.api import mount, read_through
    from lazyfs.errors import LazyfsError, Usage

    try:
        manifest = read_through(url, limit_s=_LIMIT_S, known_limit_s=_KNOWN_LIMIT_S)
        _say_if_streamed(url, manifest, home / "cache", cache_limit)
        place = home / "mounts" / manifest[:16]
        return mount(manifest, place, idle_exit_s=_IDLE_EXIT_S, cache_limit=cache_limit).mountpoint
    except Usage:
        raise
    except (LazyfsError, OSError) as error:
        code = getattr(error, "code", "host-io")
        log.warning("%s is not mounted: %s: %s; the engine downloads it itself", url, code, error)
        return None


def _say_if_streamed(url: str, digest: str, cache: Path, cache_limit: int) -> None:
    """Log that the cache has no room for the whole model, if so; a launch goes on all the same."""
    from lazyfs.cache.cache import Cache
    from lazyfs.content.manifest import decode
    from lazyfs.content.stat_index import source_folder
    from lazyfs.errors import DiskFull

    manifest = decode((source_folder(cache) / digest).read_bytes(), digest, local=True)
    here = Cache(cache, cache_limit)
    absent = manifest.size - sum(map(here.present_bytes, manifest.files))
    try:
        here.need_room(absent, manifest.size)
    except DiskFull as error:
        log.warning(
            "%s is streamed, at least in part, and comes anew at the next start: %s: %s", url, error.code, error
        )


def mounted_manifest(path: Path, home: Path) -> str:
    """Return the manifest that a path below the state folder shows, or "" for any other path."""
    if path.absolute().parent != (home / "mounts").absolute():
        return ""
    from lazyfs.content.stat_index import source_folder

    found = [file.name for file in source_folder(home / "cache").glob(f"{path.name}*")]
    return found[0] if len(found) == 1 else ""


def _url_of(argument: str) -> str:
    _, _, value = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
    return value if value.startswith(PREFIX) else ""


def _replaced(arguments: Sequence[str], old: str, new: str) -> tuple[str, ...]:
    return tuple(
        argument[: len(argument) - len(old)] + new if _url_of(argument) == old else argument for argument in arguments
    )
