"""Decide whether an engine needs a way out of its sandbox: for traces, tools, images by URL, or the hub.

Without one it would start, and fail only at the first request that needs it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_OPTIONS = {
    "vllm": ("otlp-traces-endpoint", "tool-server", "allowed-media-domains"),
    "sglang": ("enable-trace", "tool-server", "allowed-media-domains"),
}
_HUB_VARIABLES = ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_LORA_RESOLVER_HF_REPO_LIST")
_ENDPOINTS = ("otlp-traces-endpoint", "tool-server")
_ENDPOINT_VARIABLES = (
    *("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "HF_ENDPOINT"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
)
_TRACES_PORT = 4317
"""Where SGLang sends traces unless told otherwise: on this host."""
_LOCAL = re.compile(r"(?:^|//|@)(?:localhost|127(?:\.\d+){3}):(\d{1,5})(?![\d.])")
_MEDIA = re.compile(
    r'"(vision_|audio_|video_|mm_vision_|thinker_|vit_)\w+"\s*:|"(image|video|audio)_token_(id|index)"\s*:'
)
_CONFIG_LIMIT = 4 << 20

Options = Mapping[str, Sequence[str]]


def why_egress(engine: str, options: Options, environment: Mapping[str, str], model: Path | None) -> str:
    """Return what needs the network beyond the sandbox, in a few words, or "". `model`: the model's folder, if there is one."""
    for name in _OPTIONS.get(engine, ()):
        if name in options:
            return f"--{name}"
    if engine == "vllm" and (name := _hub_variable(environment)):
        return f"adapters from the hub ({name})"
    if model is not None and "language-model-only" not in options and fetches_media(model):
        return "a model that takes images, audio or video by URL"
    return ""


def uses_hub(environment: Mapping[str, str]) -> bool:
    """Return whether the engine loads adapters from the hub while it serves, and so must not be offline."""
    return bool(_hub_variable(environment))


def _hub_variable(environment: Mapping[str, str]) -> str:
    return next((name for name in _HUB_VARIABLES if environment.get(name, "").lower() not in ("", "0", "false")), "")


def fetches_media(model: Path) -> bool:
    """Return whether a model's configuration has a part for images, audio or video."""
    try:
        file = model / "config.json"
        return file.stat().st_size <= _CONFIG_LIMIT and bool(_MEDIA.search(file.read_text(errors="replace")))
    except OSError:
        return False


def host_ports(engine: str, options: Options, environment: Mapping[str, str]) -> tuple[int, ...]:
    """Return the ports of this host's loopback that the engine is told to use, such as a collector's beside it."""
    given = [value for name in _ENDPOINTS for value in options.get(name, ())]
    given += [environment[name] for name in _ENDPOINT_VARIABLES if name in environment]
    found = {int(port) for value in given for part in value.split(",") for port in _LOCAL.findall(part)}
    if engine == "sglang" and "enable-trace" in options and not any(options.get("otlp-traces-endpoint", ())):
        found.add(_TRACES_PORT)
    return tuple(sorted(port for port in found if 0 < port < 65536))
