"""Decide on a launch's way out of the sandbox (checkpoint.sandbox.egress): as --egress says, else where its command line asks for it.

It is part of the identity: an engine may hold sockets bound to the address that the sandbox then has.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from checkpoint.errors import HostLacks
from launchers.base import INNER_PORT
from launchers.given_options import given_options
from launchers.options.egress import host_ports, uses_hub, why_egress

if TYPE_CHECKING:
    from checkpoint.sandbox.egress import Egress
    from plugin.runtime.config import LaunchSettings
    from plugin.runtime.steps.model_mount import Weights

log = logging.getLogger("quickthaw")
RECORDED = "quickthaw --egress"
"""Name under which an identity's arguments have the way out, with the host's ports as its value, and whether it may use the hub."""
_HUB = ("hub",)
_said: set[str] = set()


def reason(settings: LaunchSettings, weights: Weights) -> str:
    """Return why this launch has a way out, in a few words, or "" if it has none."""
    if settings.egress:
        return "--egress"
    options = given_options(settings.command.arguments)
    why = why_egress(settings.engine, options, settings.given_environment, weights.path)
    if why and settings.egress is False:
        if why not in _said:
            _said.add(why)
            log.warning("egress-off: %s cannot work without a network (--no-egress)", why)
        return ""
    return why


def of(settings: LaunchSettings, weights: Weights) -> Egress | None:
    """Return the way out of a launch, or None if it needs none. Raises HostLacks (egress-missing) with the remedy."""
    if not (why := reason(settings, weights)):
        return None
    if INNER_PORT in (ports := _ports(settings)):
        raise HostLacks(
            "egress-failed", f"{why} uses port {INNER_PORT} of this host, which in the sandbox is the engine's own"
        )
    from checkpoint.sandbox.egress import Egress  # takes 1 ms, which a launch without a way out need not wait for

    try:
        return Egress.find(ports)
    except HostLacks as error:
        raise HostLacks(
            error.code, f"{why} needs a way out of the sandbox, and {error.args[0]}, or give --no-egress to do without"
        ) from error


def online(settings: LaunchSettings) -> bool:
    """Return whether the engine may use the hub through its way out: the user says so, or its adapters come from there."""
    return bool(settings.egress) or uses_hub(settings.given_environment)


def identify(settings: LaunchSettings, weights: Weights) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Return the arguments to record in the identity of a launch."""
    if settings.named or not reason(settings, weights):
        return {}
    return {RECORDED: (tuple(map(str, _ports(settings))), *([_HUB] if online(settings) else []))}


def recorded(arguments: Mapping[str, Any]) -> Egress | None:
    """Return the way out that a snapshot's engine was started with, or None. Raises HostLacks (egress-missing)."""
    if RECORDED not in arguments:
        return None
    from checkpoint.sandbox.egress import Egress

    return Egress.find(tuple(int(port) for port in arguments[RECORDED][0]))


def _ports(settings: LaunchSettings) -> tuple[int, ...]:
    return host_ports(settings.engine, given_options(settings.command.arguments), settings.given_environment)
