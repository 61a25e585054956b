"""Read a configuration of llama-swap as one of `quickthaw proxy --config`.

Each model becomes a `command` (or an `upstream` with a `wake`, where its `proxy` has a port of its own), and one model
at a time is awake, as there. What has no counterpart is named in a warning and left out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

_KNOWN = frozenset({"models", "healthCheckTimeout", "macros", "groups"})
_MODEL = frozenset({"cmd", "proxy", "aliases", "checkEndpoint", "ttl", "useModelName", "env", "cmdStop", "macros"})
_NAMES = frozenset({"name", "description", "metadata", "unlisted"})
"""What only describes a model there."""
_HEALTH_S = 120
"""llama-swap's own limit of a start, in seconds."""


def recognises(document: Mapping[str, Any]) -> bool:
    """Return True if this is llama-swap's format: its models have a `cmd`."""
    models = document.get("models")
    return isinstance(models, dict) and any(isinstance(model, dict) and "cmd" in model for model in models.values())


def convert(document: Mapping[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    """Return the configuration as keys and values of ours. `warn` is called for what is left out. Raises ValueError."""
    for key in sorted(document.keys() - _KNOWN):
        warn(f"llama-swap's {key} has no counterpart and is left out")
    macros = _macros(document.get("macros"))
    models = {}
    for name, model in document["models"].items():
        if not isinstance(model, dict) or not isinstance(model.get("cmd"), str):
            raise ValueError(f"model {name!r} has no cmd")
        for key in sorted(model.keys() - _MODEL - _NAMES):
            warn(f"llama-swap's {key} of model {name!r} has no counterpart and is left out")
        models[name] = _model(str(name), model, macros | _macros(model.get("macros")), document)
    return {"max_awake": _max_awake(document, warn), "min_awake": 0, "models": models}


def _macros(given: object) -> dict[str, str]:
    return {str(name): str(value) for name, value in given.items()} if isinstance(given, dict) else {}


def _model(
    name: str, model: Mapping[str, Any], macros: Mapping[str, str], document: Mapping[str, Any]
) -> dict[str, Any]:
    known = {**macros, "MODEL_ID": name}
    command = _in_one_line(_filled(model["cmd"], known)).removeprefix("exec ")
    if model.get("env"):
        if not isinstance(model["env"], list):
            raise ValueError(f"env of model {name!r} is no list of NAME=VALUE")
        command = f"env {shlex.join(map(str, model['env']))} {command}"
    found: dict[str, Any] = {"wake_timeout": document.get("healthCheckTimeout", _HEALTH_S)}
    address = _filled(str(model.get("proxy", "http://localhost:${PORT}")), known)
    if "${PORT}" in address:
        found["command"] = f"exec {command}"
    else:
        found |= {"upstream": address, "wake": f"exec {command}"}
    if model.get("cmdStop"):
        found["sleep"] = _in_one_line(_filled(str(model["cmdStop"]), known))
    if model.get("checkEndpoint", "/health") != "/health":
        found["ready_path"] = "/" if model["checkEndpoint"] == "none" else model["checkEndpoint"]
    if model.get("ttl"):
        found["sleep_after"] = model["ttl"]
    if model.get("useModelName"):
        found["served_name"] = model["useModelName"]
    if model.get("aliases"):
        found["aliases"] = model["aliases"]
    return found


def _filled(text: str, macros: Mapping[str, str]) -> str:
    """Replace macros, which may contain others; `${PORT}` stays."""
    for _ in range(len(macros) + 1):
        filled = re.sub(r"\$\{([\w-]+)\}", lambda found: macros.get(found[1], found[0]), text)
        if filled == text:
            break
        text = filled
    return text


def _in_one_line(text: str) -> str:
    """Join a command over several lines, with or without a backslash at their ends; lines of comment are left out."""
    lines = (line.strip() for line in text.replace("\\\n", "\n").splitlines())
    return " ".join(line for line in lines if line and not line.startswith("#"))


def _max_awake(document: Mapping[str, Any], warn: Callable[[str], None]) -> int:
    """Return how many models may be awake: one, or all of the only group without `swap`."""
    groups = document.get("groups") or {}
    if not groups:
        return 1
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError("groups is no mapping of names to groups")
    (first, *others) = groups.values()
    together = len(first.get("members") or ()) if not others and first.get("swap") is False else 0
    if together == len(document["models"]):
        return together
    warn("llama-swap's groups have no counterpart: one model is awake at a time; set max_awake and priority")
    return 1
