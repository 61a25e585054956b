"""Shared by the commands of lazyfs: option types, common options, error reports, the store that `--store` names."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from lazyfs.cache.bound import parse
from lazyfs.durations import seconds
from lazyfs.errors import LazyfsError, from_os_error

if TYPE_CHECKING:
    from lazyfs.content.chunk_store import ChunkStore

F = TypeVar("F", bound=Callable[..., Any])
option = functools.partial(click.option, show_envvar=True)
store_option = option(
    "--store",
    envvar="QUICKTHAW_STORE",
    metavar="URL",
    help="A directory, s3://, gs://, az:// or http(s)://.  [default: store/ under $QUICKTHAW_HOME]",
)
trust_option = option(
    "--trust-key",
    "trust_keys",
    type=click.Path(path_type=Path),
    multiple=True,
    envvar="QUICKTHAW_TRUST_KEY",
    help="Show only weights whose manifest one of these keys has signed. Repeatable.",
)
json_option = option("--json", "as_json", is_flag=True, envvar="QUICKTHAW_JSON", help="Print JSON instead of text.")


def peer_options(command: F) -> F:
    """Add --peers, --peer-token and --peer-self."""
    for each in (
        option(
            "--peer-self",
            default="",
            envvar="QUICKTHAW_PEER_SELF",
            metavar="HOST:PORT",
            help="This host's own address among the peers.  [default: the one that is an address of this host]",
        ),
        option(
            "--peer-token",
            default="",
            envvar="QUICKTHAW_PEER_TOKEN",
            help="Token of the peers. The variable keeps it out of process lists.",
        ),
        option(
            "--peers",
            default="",
            envvar="QUICKTHAW_PEERS",
            metavar="HOST:PORT,…",
            help="Hosts that run `quickthaw peer`, asked before the store; dns://NAME:PORT is every address of a name, "
            "k8s://NAMESPACE/SERVICE every endpoint of a Service.",
        ),
    ):
        command = each(command)
    return command


def reports_errors(command: F) -> F:
    """Print an error of the command as one line on standard error, and exit with its exit code."""

    @functools.wraps(command)
    def inner(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except LazyfsError as error:
            _fail(error)
        except OSError as error:
            # A closed pipe, or a path that the command itself checks.
            _fail(from_os_error(error, str(error.filename or command.__name__.rstrip("_"))))

    return inner  # type: ignore[return-value]


def _fail(error: LazyfsError) -> NoReturn:
    click.echo(f"quickthaw: {error.code}: {error}", err=True)
    sys.exit(error.exit_code)


CACHE_LIMIT_HELP = (
    "Limit of the chunk cache: a number of GB, none, or auto: that of `quickthaw cache limit`, "
    "else what leaves a tenth of the disk free, at least 20 GB."
)


def size_text(count: float) -> str:
    """Return a number of bytes as people write it."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class Duration(click.ParamType[float]):
    """A duration such as 90s, 10m or 24h, in seconds, of at least `least` seconds. `bare`: the unit of a number without one."""

    name = "duration"

    def __init__(self, least: float = 0.0, bare: str = "s") -> None:
        self._least, self._bare = least, bare

    def read(self, text: str) -> float:
        """Return the duration in seconds. Raises ValueError."""
        return seconds(text, self._bare)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert to seconds."""
        try:
            found = self.read(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if found < self._least:
            self.fail(f"{value!r} is too short; give at least {self._least:g} s", param, ctx)
        return found


class CacheLimit(click.ParamType[int]):
    """A bound of the cache (`lazyfs.cache.bound`): auto, none, or a number of GB; in bytes."""

    name = "auto|none|GB"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert to a bound."""
        if isinstance(value, int):
            return value
        try:
            return parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Gigabytes(CacheLimit):
    """A number of GB of 0 or more, in bytes."""

    name = "GB"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert to bytes."""
        if str(value).lower() in ("auto", "none"):
            self.fail(f"{value!r} is not a number of GB", param, ctx)
        return super().convert(value, param, ctx)


cache_limit_option = option(
    "--cache-limit",
    type=CacheLimit(),
    default="auto",
    show_default=True,
    envvar="QUICKTHAW_CACHE_LIMIT",
    help=CACHE_LIMIT_HELP,
)


class PathArgument(click.Path):
    """A path. Rejects an empty one, which an unset variable leaves and which would mean the current directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        if str(value).startswith("--"):
            self.fail(f"expected a path, got the option {value!r}", param, ctx)
        return super().convert(value, param, ctx)


class Source(PathArgument):
    """A directory, or the URL of an object prefix or of a model of the hub, which stays a string."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert to a Path, or to a str for a URL."""
        return value if isinstance(value, str) and "://" in value else super().convert(value, param, ctx)


def open_chunks(store: str | None) -> ChunkStore:
    """Open the store. Raises NotFound for a named directory that is not a store: it would look like an empty one."""
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.errors import NotFound
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
            raise NotFound(f"no store at {folder}; `quickthaw weights import DIRECTORY --store {folder}` creates one")
    return ChunkStore(open_store(url))
