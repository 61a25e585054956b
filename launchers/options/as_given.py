"""Decide by its options whether an engine runs as it was given, in place of quickthaw.

So does an engine that serves something else than HTTP/1.1 requests on one port, or that other hosts or processes connect to:
behind quickthaw's port, in a sandbox, it would not be the engine that its user started.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launchers.given_options import last_given

_TRUE = ("1", "true", "yes", "on")
_LOOPBACK = ("", "localhost", "127.0.0.1", "::1")
_ALIASES = {
    "vllm": {
        "asc": "api-server-count",
        "n": "nnodes",
        "r": "node-rank",
        "dp": "data-parallel-size",
        "dpn": "data-parallel-rank",
        "dpr": "data-parallel-start-rank",
        "dpa": "data-parallel-address",
        "dpb": "data-parallel-backend",
        "dph": "data-parallel-hybrid-lb",
        "dpe": "data-parallel-external-lb",
        "dpm": "data-parallel-multi-port-external-lb",
    },
    "sglang": {"nccl-init-addr": "dist-init-addr"},
}
_NO_HTTP = "serves no HTTP requests for text"
_HOSTS = "spans several hosts"
_PEERS = "exchanges data with other processes"
_LOCAL_CONNECTORS = frozenset(
    [
        "OffloadingConnector",
        "SimpleCPUOffloadConnector",
        "ExampleConnector",
        "SharedStorageConnector",
        "ExampleHiddenStatesConnector",
        "DecodeBenchConnector",
        "ECExampleConnector",
    ]
)
"""Connectors of vLLM that keep the KV cache in memory or files of this host."""

Options = Mapping[str, Sequence[str]]
Rule = Callable[[str, Sequence[str]], str]
"""Takes an option's name and its values; returns why the engine runs as given, without the name, or ""."""


def why_as_given(engine: str, options: Options, environment: Mapping[str, str]) -> str:
    """Return why an engine with these options (launchers.given_options) runs as given, in a few words, or ""."""
    aliases = _ALIASES.get(engine, {})
    for full, values in last_given((aliases.get(name, name), values) for name, values in options.items()).items():
        head = full.partition(".")[0]  # vLLM: `--kv-transfer-config.kv_connector NAME`
        rule = _RULES.get(engine, {}).get(head)
        if rule is None:
            continue
        if head != full:
            values = [json.dumps({full.partition(".")[2]: values[-1] if values else ""})]
        if why := rule(head, values):
            return f"--{why}" if why.startswith(head) else f"--{head} {why}"
    for name, what in _VARIABLES.get(engine, {}).items():
        if environment.get(name, "").lower() not in ("", "0", "false", "no", "off"):
            return f"{name} {what}"
    return ""


def option_names(engine: str) -> frozenset[str]:
    """Return the options of an engine, without dashes, that can make it run as given."""
    return frozenset(_RULES.get(engine, {}))


def _always(what: str) -> Rule:
    return lambda name, values: what


def _above(limit: int, what: str) -> Rule:
    """Match a number above `limit`."""

    def rule(name: str, values: Sequence[str]) -> str:
        number = _number(values)
        return f"{name} {number} {what}" if number is not None and number > limit else ""

    return rule


def _other_than(what: str, *usual: str) -> Rule:
    """Match a value that is none of the `usual`."""

    def rule(name: str, values: Sequence[str]) -> str:
        value = values[-1] if values else ""
        return "" if value.lower() in ("", *usual) else f"{name} {value} {what}"

    return rule


def _one_of(what: str, *matched: str) -> Rule:
    """Match one of these values."""
    return lambda name, values: f"{name} {values[-1]} {what}" if values and values[-1].lower() in matched else ""


def _servers(name: str, values: Sequence[str]) -> str:
    count = _number(values)
    if count is None or count == 1:
        return ""
    return f"{name} {count} {'starts several API servers' if count > 1 else _NO_HTTP}"


def _away(name: str, values: Sequence[str]) -> str:
    """Match the address, with or without a port, of another host or of this one for others."""
    value = (values[-1] if values else "").rpartition("://")[2]
    if value.startswith("["):
        host = value[1:].partition("]")[0]
    else:
        host = value.rpartition(":")[0] if value.count(":") == 1 else value
    return "" if host.lower() in _LOOPBACK else f"{name} {value} {_HOSTS}"


def _connector(name: str, values: Sequence[str]) -> str:
    """Match the configuration of a connector of vLLM, unless it is known to stay on this host."""
    document = _json(values)
    kind = {key.replace("-", "_"): value for key, value in document.items()} if isinstance(document, dict) else {}
    kinds = {str(kind[key]) for key in ("kv_connector", "ec_connector") if kind.get(key)}
    if "MultiConnector" in kinds:
        inner = kind.get("kv_connector_extra_config", {})
        several = inner.get("connectors", ()) if isinstance(inner, dict) else ()
        kinds = {str(one.get("kv_connector")) if isinstance(one, dict) else "" for one in several} or kinds
    other = sorted(kinds - _LOCAL_CONNECTORS)
    return f"({other[0]}) {_PEERS}" if other else ""


def _events(name: str, values: Sequence[str]) -> str:
    document = _json(values)
    if isinstance(document, dict):
        kind = {key.replace("-", "_"): value for key, value in document.items()}
        enabled = str(kind.get("enable_kv_cache_events", kind.get("publisher", "null") != "null")).lower()
        if enabled not in _TRUE or kind.get("publisher") == "null":
            return ""
    return "publishes events to other processes"


def _published(name: str, values: Sequence[str]) -> str:
    """Match SGLang's configuration of events: any, unless its publisher is `null`."""
    document = _json(values)
    return "" if isinstance(document, dict) and document.get("publisher") == "null" else _events(name, ())


def _json(values: Sequence[str]) -> Any:
    try:
        return json.loads(values[-1]) if values else None
    except (ValueError, RecursionError):
        return None


def _number(values: Sequence[str]) -> int | None:
    try:
        return int(values[-1])
    except (LookupError, ValueError):
        return None


_RULES: dict[str, dict[str, Rule]] = {
    "vllm": {
        **dict.fromkeys(("omni", "headless", "grpc"), _always(_NO_HTTP)),
        "grpc-port": _always("serves a second protocol on a port of its own"),
        "api-server-count": _servers,
        "data-parallel-size": _above(1, "starts several engines, each with its API server"),
        "data-parallel-multi-port-external-lb": _always("serves on several ports"),
        **dict.fromkeys(
            ("data-parallel-rank", "data-parallel-start-rank", "data-parallel-hybrid-lb", "data-parallel-external-lb"),
            _always("makes it one of several engines"),
        ),
        "data-parallel-address": _away,
        "data-parallel-backend": _one_of("starts engines on other hosts", "ray"),
        "distributed-executor-backend": _one_of("has workers beyond this process", "ray", "external_launcher"),
        "nnodes": _above(1, _HOSTS),
        "node-rank": _above(0, _HOSTS),
        "enable-elastic-ep": _always("adds engines while it runs"),
        "kv-transfer-config": _connector,
        "ec-transfer-config": _connector,
        "kv-offloading-backend": _other_than(_PEERS, "native"),
        "kv-events-config": _events,
        "weight-transfer-config": _always("takes its weights from other processes"),
    },
    "sglang": {
        **dict.fromkeys(("smg-grpc-mode", "grpc-mode", "encoder-only"), _always(_NO_HTTP)),
        **dict.fromkeys(("grpc-port", "sidecar"), _always("serves a second protocol on a port of its own")),
        "enable-http2": _always("speaks HTTP/2, and quickthaw's port HTTP/1.1"),
        "use-ray": _always("starts workers on other hosts"),
        "nnodes": _above(1, _HOSTS),
        "node-rank": _above(0, _HOSTS),
        "dist-init-addr": _away,
        "gated-launch-port": _always("waits for a request on a port of its own"),
        "disaggregation-mode": _other_than(_PEERS, "null"),
        "decoupled-spec-role": _other_than(_PEERS, "null"),
        "elastic-ep-backend": _other_than(_PEERS, "none"),
        "radix-cache-backend": _other_than(_PEERS),
        "hicache-storage-backend": _other_than(_PEERS, "file", "sim"),
        "weight-cache-mode": _other_than("shares its weights with another process", "off"),
        "kv-events-config": _published,
        "load-publish-endpoint": _other_than("publishes its load to other processes", "off"),
        **dict.fromkeys(
            (
                "language-only",
                "encoder-urls",
                "encoder-register-urls",
                "enable-lmcache",
                "enable-flexkv",
                "enable-mm-global-cache",
                "enable-unified-cache-external-linker",
                "enable-elastic-expert-backup",
                "enable-forward-pass-metrics",
                "remote-instance-weight-loader-start-seed-via-transfer-engine",
            ),
            _always(_PEERS),
        ),
        **dict.fromkeys(
            ("modelexpress-config", "checkpoint-engine-wait-weights-before-ready"),
            _always("takes its weights from other processes"),
        ),
    },
}
_VARIABLES = {
    "vllm": {"VLLM_USE_RUST_FRONTEND": "replaces the engine's API server"},
    "sglang": {
        "SGLANG_GRPC_PORT": "serves a second protocol on a port of its own",
        "SGLANG_RUST_SERVER": "replaces the engine's API server",
    },
}
