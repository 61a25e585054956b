"""The command-line options shared by `quickthaw proxy`, `launch` and `restore`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from plugin.proxy.durations import limit, seconds


class Place(click.ParamType[tuple[str, int]]):
    """A parameter of the form HOST:PORT."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Convert to (host, port); an IPv6 host is in brackets."""
        if isinstance(value, tuple):
            return value
        host, _, port = str(value).rpartition(":")
        if not port.isdigit() or int(port) > 65535:
            self.fail(f"{value!r} is not HOST:PORT", param, ctx)
        return host.strip("[]") or "127.0.0.1", int(port)


class Seconds(click.ParamType[float]):
    """A duration with an optional unit."""

    name = "time"
    read = staticmethod(seconds)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert to seconds."""
        try:
            return value if isinstance(value, float) else self.read(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Limit(Seconds):
    """A duration with an optional unit; 0 or `none` for no limit."""

    read = staticmethod(limit)


def _prefix(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    if len(value) < 2 or not value.startswith("/") or value.endswith("/"):
        raise click.BadParameter(f"{value!r} has to start with a slash, name a folder, and not end in a slash")
    return value


def _token(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("the token is empty; leave the option out to answer clients of this host only")
    return value


_SHARED = (
    click.option(
        "--hold-timeout",
        type=Seconds(),
        help="How long a request may wait.  [default: from the measured starts, with a margin]",
    ),
    click.option(
        "--early-stream", is_flag=True, help="Answer waiting streams at once, with comments on the start's progress."
    ),
    click.option(
        "--upstream-timeout",
        type=Limit(),
        default="1h",
        show_default=True,
        help="How long an engine may send nothing while it answers; 0 or none: no limit.",
    ),
    click.option(
        "--body-timeout",
        type=Limit(),
        default="15m",
        show_default=True,
        help="How long a client may take to send one body in all; 0 or none: no limit.",
    ),
    click.option(
        "--admin-token",
        envvar="QUICKTHAW_ADMIN_TOKEN",
        callback=_token,
        help="Status, metrics and the page ask for this bearer token.  [default: they answer clients of this host only]",
    ),
    click.option(
        "--admin-prefix",
        default="/-",
        callback=_prefix,
        help="Where the admin pages live: PREFIX/live, /ready, /status, /metrics, and PREFIX/.",
    ),
    click.option(
        "--admin-listen", type=Place(), help="HOST:PORT for the admin pages alone; they leave the public port."
    ),
    click.option("--access-log", is_flag=True, help="Log every request, not only those that waited or failed."),
)


# Old names, which work for one version more.
_RENAMED = {"token": "admin_token", "own_prefix": "admin_prefix", "own_listen": "admin_listen"}
_OLD_NAMES = (
    click.option("--token", callback=_token, hidden=True),
    click.option("--own-prefix", callback=_prefix, hidden=True),
    click.option("--own-listen", type=Place(), hidden=True),
)


def _take_old_names(options: dict[str, Any]) -> None:
    """Move the values given by old names to the new ones, with a warning. A new name that is given too wins."""
    ctx = click.get_current_context()
    for old, new in _RENAMED.items():
        value = options.pop(old)
        if value is None:
            continue
        names = f"--{old} is now --{new}".replace("_", "-")
        text = f"warning: {names}; the next version drops the old name"
        if ctx.get_parameter_source(new) is ParameterSource.DEFAULT:
            options[new] = value
        else:
            text += "; ignored here, because the new one is given too"
        click.echo(text, err=True)


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the shared options to a command."""

    @functools.wraps(command)
    def renamed(*arguments: Any, **options: Any) -> Any:
        _take_old_names(options)
        return command(*arguments, **options)

    wrapped: Callable[..., Any] = renamed
    for option in reversed((*_SHARED, *_OLD_NAMES)):
        wrapped = option(wrapped)
    return wrapped


def knobs(options: dict[str, Any]) -> dict[str, Any]:
    """Return the command's options as keyword arguments of `settings.Settings`."""
    return {
        "hold_timeout_s": options["hold_timeout"],
        "early_stream": options["early_stream"],
        "upstream_timeout_s": options["upstream_timeout"],
        "body_total_s": options["body_timeout"],
        "admin_token": options["admin_token"],
        "admin_prefix": options["admin_prefix"],
        "admin_on_public_port": options["admin_listen"] is None,
        "access_log": options["access_log"],
    }
