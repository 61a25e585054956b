"""The file of `quickthaw proxy --config`: its keys, their checks, and the endpoint or workload that each model becomes.

YAML; unknown keys are refused, and former names of keys work with a warning. What the proxy does with the models is in
`endpoints.models`.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from plugin.bench.client import free_port
from plugin.options import invalid, limit, seconds
from plugin.proxy.endpoints import llama_swap
from plugin.proxy.endpoints.endpoint import EndpointSpec
from plugin.proxy.http.address import from_url
from plugin.proxy.kubernetes import address as k8s
from plugin.proxy.pool.facts import Facts
from plugin.startup.own_module import own_module

if TYPE_CHECKING:
    from plugin.proxy.kubernetes.asking import WorkloadSpec


class Seconds(float):
    """A duration in the file: seconds, or with a unit as on the command line (`90`, `90s`, `10m`, `1h`)."""

    read = staticmethod(seconds)


class Limit(Seconds):
    """A duration, or `0` or `none` for no limit."""

    read = staticmethod(limit)


_UNITS = {unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))}
_UNITS |= {unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), 1)}


class Bytes(int):
    """A size of memory, read from a text with a unit: `80GB`, `24GiB`, `512 MiB`; 0 needs none."""

    @staticmethod
    def read(text: str) -> int:
        """Return the bytes. Raises ValueError."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?", text.strip(), re.IGNORECASE | re.ASCII)
        unit = found[2].lower() if found and found[2] else ""
        if not found or unit == "ib" or (not unit and float(found[1])):
            raise ValueError(f"{text!r} is not a size such as 80GB or 24GiB")
        return int(float(found[1]) * _UNITS.get(unit, 1))


def _times(kind: type, value: object) -> Any:
    """Decode a type that msgspec does not know. Raises ValueError."""
    if not issubclass(kind, Seconds | Bytes) or isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise invalid(value)
    return kind(kind.read(str(value)))


class ModelConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One model: exactly one of `snapshot` (restored by name), `command` (a server; `${PORT}` is its port), `upstream`.

    The upstream runs already, or is a workload of a cluster (k8s://…), which is scaled from zero.
    """

    snapshot: str | None = None
    command: str | None = None
    upstream: str | None = None
    wake: str | None = None
    sleep: str | None = None
    wake_url: str | None = None
    sleep_url: str | None = None
    aliases: tuple[str, ...] = ()
    served_name: str | None = None
    """The engine's own name of the model, which replaces the request's `model` in JSON bodies. None forwards the name unchanged."""
    ready_path: str = "/health"
    ready_model: str | None = None
    api_key: str | None = None
    """The key that the engine wants, for the readiness check; a snapshot's restore gets it for its canary."""
    sleep_after: Seconds | None = None
    standby_after: Seconds | None = None
    """Of a snapshot: time without a request after which its engine is frozen with its memory; it also makes room that way."""
    wake_timeout: Seconds = Seconds(600.0)
    upstream_timeout: Limit | None = None
    """Maximum time that the engine may send nothing while it answers; None uses the option --upstream-timeout."""
    priority: int = 0
    """Models with a lower priority are put to sleep first."""
    schedule_timeout: Seconds = Seconds(30.0)
    """Of a workload: how long its pod may be without a node or an image before held requests get the reason."""
    gpu_memory: Bytes | None = None
    """GPU memory that it takes while it is awake; None: of a snapshot, what it held at its dump, of others unknown."""
    rehearse: bool | None = None
    """--rehearse of the launch or restore that it starts. None: as QUICKTHAW_REHEARSE says, else not, since it would run
    beside the requests of the other models, of which that process knows nothing."""
    push: bool | None = None
    """--push of the launch or restore that it starts, to its --snapshot-store; None leaves that to QUICKTHAW_PUSH."""


SETTINGS = frozenset(
    {
        "listen",
        "root_path",
        "workers",
        "sleep_after",
        "standby_after",
        "grace",
        "hold_timeout",
        "early_stream",
        "upstream_timeout",
        "body_timeout",
        "max_held",
        "max_held_mb",
        "deny",
        "allow",
        "wake_on",
        "trust_forwarded",
        "admin_token",
        "admin_prefix",
        "admin_listen",
        "access_log",
        "log_level",
        "log_format",
        "quiet",
    }
)
"""Keys of the file that are options of `quickthaw proxy`, by their names (plugin/options.py)."""
_LISTS = ("deny", "allow", "wake_on")
"""Those that may be repeated; the file may give one without a list."""
_OLD_KEYS = {"drain": "evict_grace", "idle_timeout": "sleep_after"}
_OLD_MODEL_KEYS = {"idle_timeout": "sleep_after"}


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file, without the options of the command (`SETTINGS`)."""

    models: dict[str, ModelConfig]
    max_awake: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Maximum number of models awake at once; 0 is no limit."""
    gpu_memory: Bytes = Bytes(0)
    """GPU memory that the models awake may take together; 0 is no limit."""
    evict: Literal["lru", "priority"] = "lru"
    """Order of sleeping: `lru` is the longest idle first; `priority` is the lowest priority first, then the longest idle."""
    min_awake: Seconds = Seconds(5.0)
    evict_grace: Seconds = Seconds(60.0)
    """Time for a model to finish its requests before it sleeps for another; after that it continues to serve."""
    default: str | None = None
    max_body: Annotated[int, msgspec.Meta(ge=1024)] = 64 << 20


def _document(path: Path) -> dict[str, Any]:
    """Return the file's keys and values as they are written. Raises ValueError if it is not a YAML mapping, OSError."""
    import yaml

    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as exc:
        raise ValueError(f"{path}: not YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected keys and values, such as `models:`; see examples/proxy_models.yaml")
    return document


def _read(path: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """Return the file's keys and values, by their current names; a file of llama-swap as ours. Raises ValueError, OSError."""
    document = _document(path)
    if llama_swap.recognises(document):
        try:
            return llama_swap.convert(document, lambda text: warn(f"{path}: {text}"))
        except ValueError as exc:
            raise ValueError(f"{path}: {exc}") from exc
    _rename(document, _OLD_KEYS, f"{path}: ", warn)
    models = document.get("models")
    for name, model in models.items() if isinstance(models, dict) else ():
        if isinstance(model, dict):
            _rename(model, _OLD_MODEL_KEYS, f"{path}: model {name!r}: ", warn)
    return document


def _rename(keys: dict[str, Any], old_names: dict[str, str], where: str, warn: Callable[[str], None]) -> None:
    """Give old keys their current names, with a warning. A current key that is there too takes precedence."""
    for old, new in old_names.items():
        if old in keys:
            warn(f"{where}{old} is now {new}; the next version drops the old name")
            keys.setdefault(new, keys.pop(old))


def settings_in(path: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """Return the options of `quickthaw proxy` that the file sets. `warn` is called for each old key. Raises ValueError, OSError."""
    found = {key: value for key, value in _read(path, warn).items() if key in SETTINGS}
    return {key: [value] if key in _LISTS and isinstance(value, str) else value for key, value in found.items()}


def check_import(path: Path, warn: Callable[[str], None]) -> None:
    """Call `warn` for what has no counterpart here. Raises ValueError unless the file is a configuration of llama-swap, OSError."""
    if not llama_swap.recognises(_document(path)):
        raise ValueError(f"{path} is no configuration of llama-swap; give it as --config")
    _read(path, warn)


def load(path: Path) -> Config:
    """Read and validate the file, without the options in it.

    Raises:
        ValueError: it is not YAML, or not this configuration; the message names the place.
        OSError: it cannot be read.
    """
    document = {key: value for key, value in _read(path, lambda _: None).items() if key not in SETTINGS}
    try:
        config = msgspec.convert(document, Config, dec_hook=_times)
    except msgspec.ValidationError as exc:
        raise ValueError(f"{path}: {exc}") from exc
    if not config.models:
        raise ValueError(f"{path}: `models` names no model")
    names: dict[str, str] = {}
    for name, model in config.models.items():
        if sum(x is not None for x in (model.snapshot, model.command, model.upstream)) != 1:
            raise ValueError(f"{path}: model {name!r} needs exactly one of snapshot, command and upstream")
        if model.standby_after and model.snapshot is None:
            raise ValueError(f"{path}: model {name!r} is no snapshot, and only those have standby_after")
        if k8s.is_workload(model.upstream):
            k8s.parse(model.upstream or "")
            given = [key for key in ("wake", "sleep", "wake_url", "sleep_url") if getattr(model, key) is not None]
            if given:
                raise ValueError(f"{path}: model {name!r} is a workload, which is scaled: it has no {', '.join(given)}")
        elif model.upstream is not None:
            from_url(model.upstream)
        for alias in (name, *model.aliases):
            if alias in names:
                raise ValueError(f"{path}: {alias!r} names both {names[alias]!r} and {name!r}")
            names[alias] = name
        able = model.upstream is None or model.sleep or model.sleep_url or k8s.is_workload(model.upstream)
        for limit_name in ("max_awake", "gpu_memory"):
            if getattr(config, limit_name) and not able:
                raise ValueError(f"{path}: with {limit_name}, model {name!r} needs `sleep` or `sleep_url`")
        if config.gpu_memory and model.gpu_memory is None and model.snapshot is None:
            raise ValueError(f"{path}: model {name!r} needs its own gpu_memory, as the file limits it; 0 for none")
        if config.gpu_memory and (model.gpu_memory or 0) > config.gpu_memory:
            raise ValueError(f"{path}: gpu_memory of model {name!r} is more than that of all models")
    if config.default is not None and config.default not in names:
        raise ValueError(f"{path}: the default {config.default!r} is not one of the models")
    return config


def spec_of(model: ModelConfig, sleep_after: float, standby_after: float = 0.0) -> EndpointSpec:
    """Return the endpoint for a model's configuration, choosing the port of a command. The times are the command's, in seconds."""
    standby = model.standby_after if model.standby_after is not None else standby_after
    idle = model.sleep_after if model.sleep_after is not None else sleep_after
    wake, upstream, environment = model.wake, model.upstream, dict[str, str]()
    if model.rehearse is not None or "QUICKTHAW_REHEARSE" not in os.environ:
        environment["QUICKTHAW_REHEARSE"] = str(int(model.rehearse or False))
    if model.push is not None:
        environment["QUICKTHAW_PUSH"] = str(int(model.push))
    if upstream is None:
        port = free_port()
        upstream = f"http://127.0.0.1:{port}"
        environment["PORT"] = str(port)
        if model.command is not None:
            wake = model.command.replace("${PORT}", str(port))
        else:
            # No limit on silence: this proxy's own applies.
            options = ["--host", "127.0.0.1", "--port", str(port), "--upstream-timeout", "none"]
            # Only this proxy reads its admin endpoints, whatever token is in this process's environment.
            environment["QUICKTHAW_ADMIN_TOKEN"] = secrets.token_hex(16)
            if model.api_key is not None:
                environment["QUICKTHAW_API_KEY"] = model.api_key
            wake = "exec " + shlex.join([*own_module("plugin.restore"), *options, model.snapshot or ""])
    from plugin.records.about import facts_of_named  # only this mode needs what it imports

    facts = facts_of_named(model.snapshot)
    ready_path = (
        "/-/ready?strict=1" if model.snapshot is not None and model.ready_path == "/health" else model.ready_path
    )
    return EndpointSpec(
        upstream=from_url(upstream),
        wake=wake,
        sleep=model.sleep,
        wake_url=model.wake_url,
        sleep_url=model.sleep_url,
        ready_path=ready_path,
        ready_model=model.ready_model,
        api_key=model.api_key,
        wake_limit_s=model.wake_timeout,
        sleep_after_s=idle or None,
        standby_after_s=(standby or None) if model.snapshot is not None else None,
        environment=tuple(environment.items()),
        # The port differs on each run; the model is the same.
        key=f"{model.command}\n{model.snapshot}" if model.upstream is None else "",
        restores=model.snapshot is not None,
        admin_token=environment.get("QUICKTHAW_ADMIN_TOKEN"),
        exclusive_port=model.upstream is None,
        facts=facts if model.gpu_memory is None else replace(facts, gpu_memory=model.gpu_memory),
    )


def workload_of(model: ModelConfig, sleep_after: float, scales: bool) -> WorkloadSpec:
    """Return the workload for a model's configuration; `sleep_after` (seconds) is the command's."""
    from plugin.proxy.kubernetes.asking import WorkloadSpec

    return WorkloadSpec(
        address=k8s.parse(model.upstream or ""),
        ready_path=model.ready_path,
        ready_model=model.ready_model,
        api_key=model.api_key,
        wake_limit_s=model.wake_timeout,
        sleep_after_s=(model.sleep_after if model.sleep_after is not None else sleep_after) or None,
        schedule_grace_s=model.schedule_timeout,
        scales=scales,
        facts=Facts(gpu_memory=model.gpu_memory or 0),
    )
