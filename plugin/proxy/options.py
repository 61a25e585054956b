"""Options of everything that runs a proxy: `quickthaw proxy`, `launch` and `restore` say them the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


class Place(click.ParamType[tuple[str, int]]):
    """HOST:PORT."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """To host and port; an IPv6 host stands in brackets."""
        if isinstance(value, tuple):
            return value
        host, _, port = str(value).rpartition(":")
        if not port.isdigit() or int(port) > 65535:
            self.fail(f"{value!r} is not HOST:PORT", param, ctx)
        return host.strip("[]") or "127.0.0.1", int(port)


def _prefix(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if len(value) < 2 or not value.startswith("/") or value.endswith("/"):
        raise click.BadParameter(f"{value!r} has to start with a slash, name a folder, and not end in a slash")
    return value


_SHARED = (
    click.option(
        "--hold-timeout",
        type=click.FloatRange(min=0),
        help="Seconds a request may wait.  [default: from the measured starts, with a margin]",
    ),
    click.option(
        "--early-stream", is_flag=True, help="Answer waiting streams at once, with comments on the start's progress."
    ),
    click.option("--token", help="The own pages ask for this bearer token."),
    click.option(
        "--own-prefix",
        default="/-",
        callback=_prefix,
        help="Where the own pages live: PREFIX/status, /ready, /metrics, and PREFIX/.",
    ),
    click.option("--own-listen", type=Place(), help="HOST:PORT for the own pages alone; they leave the public port."),
    click.option("--access-log", is_flag=True, help="Log every request, not only those that waited or failed."),
)


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command that is being declared."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


def knobs(options: dict[str, Any]) -> dict[str, Any]:
    """What of a command's options goes into `settings.Settings` as it is."""
    return {
        "hold_timeout_s": options["hold_timeout"],
        "early_stream": options["early_stream"],
        "token": options["token"],
        "own_prefix": options["own_prefix"],
        "own_on_main": options["own_listen"] is None,
        "access_log": options["access_log"],
    }
