"""Determine where an engine finds its model: a folder or file of this host, a hub, or a place that only the engine can read.

plugin.model.hub downloads a hub model before the engine starts, because a sandbox has no network. If only the engine can
read its model, it starts as it would alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.compatibility import hub
from launchers.base import EngineCommand
from launchers.given_options import given_options, last

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_QUANTIZED = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+|/.+\.gguf)")
_TRUE = ("1", "true", "yes", "on", "y")
_MODELSCOPE = {"vllm": "VLLM_USE_MODELSCOPE", "sglang": "SGLANG_USE_MODELSCOPE"}
_DRAFTS = {
    "speculative-draft-model-path": ("speculative-draft-model-revision",),
    "speculative-draft-model": ("speculative-draft-model-revision",),
    "speculative-model": ("speculative-model-revision",),
    "speculative-config.model": ("speculative-config.revision",),
}
_ADAPTERS = ("lora-modules", "lora-paths")
_CONFIGURED_DRAFTS = ("speculative-config", "sc")
_ELSEWHERE_FORMATS = ("remote", "remote_instance", "rdma", "modelexpress", "ipc_cache")
"""Load formats that read the weights from another process or host."""
_RELOADED_FORMATS = ("", "auto", "hf", "safetensors", "pt", "mistral")
"""Load formats that both engines can load a second time into a running engine."""


@dataclass(frozen=True)
class Repository:
    """A hub repository that a command line names. `part`: `model` (one format of its weights), `text` (no weights), or `all`."""

    name: str
    revision: str | None
    part: str


def load_format(command: EngineCommand) -> str:
    """Return the format that `--load-format` gives, or ""."""
    return last(given_options(command.arguments), "load-format").lower()


def can_reload(command: EngineCommand) -> bool:
    """Return whether a running engine can reload its weights, as a snapshot that excludes them requires."""
    return load_format(command) in _RELOADED_FORMATS and not Path(command.model).expanduser().is_file()


def repositories(command: EngineCommand) -> tuple[Repository, ...]:
    """Return the hub repositories that a command line names, the model's first if it is one."""
    options = given_options(command.arguments)
    found: dict[str, Repository] = {}

    def add(name: str, revision: str, part: str) -> None:
        if is_hub_name(name):
            found.setdefault(name, Repository(name, revision or None, part))

    add(command.model, last(options, "revision"), "model")
    for option, revisions in hub.TEXT_REVISIONS.items():
        add(last(options, option), last(options, *revisions), "text")
    for option, revisions in _DRAFTS.items():
        if "/" in last(options, option):  # a bare word is a method, such as ngram
            add(last(options, option), last(options, *revisions), "model")
    for option in _CONFIGURED_DRAFTS:
        draft = _json(last(options, option))
        if isinstance(draft, dict) and "/" in str(draft.get("model")):
            add(str(draft["model"]), str(draft.get("revision") or ""), "model")
    if "trust-remote-code" in options and (folder := Path(command.model).expanduser()).is_dir():
        for name in hub.code_repositories(folder):
            add(name, last(options, "code-revision"), "text")
    for option in _ADAPTERS:
        for value in options.get(option, ()):
            for name in _adapters(value):
                if "/" in name:
                    add(name, "", "all")
    return tuple(found.values())


def why_plain(command: EngineCommand, environment: Mapping[str, str]) -> str | None:
    """Return why the engine must load its model by itself, in one line, or None.

    It then starts as it would alone: a sandbox has no network, and quickthaw cannot verify which model the engine has read.
    """
    options = given_options(command.arguments)
    model, variable = command.model, _MODELSCOPE.get(command.engine, "")
    values = (model, last(options, "tokenizer", "tokenizer-path"), *options.get("model-loader-extra-config", ()))
    if any(_URL.search(value) and "file://" not in value for value in values):
        return "model-elsewhere: the engine reads its model from a URL itself; for snapshots give a local folder"
    if (form := load_format(command)) in _ELSEWHERE_FORMATS:
        return (
            f"model-elsewhere: --load-format {form} takes the weights from elsewhere; for snapshots give a local folder"
        )
    if environment.get(variable, "").lower() in _TRUE and not Path(model).expanduser().exists():
        return f"model-elsewhere: with {variable} the engine downloads its model itself; for snapshots give its local folder"
    if _QUANTIZED.fullmatch(model) and not Path(model).exists():
        return f"model-elsewhere: the engine chooses one GGUF file of {model} itself; for snapshots give a file's local path"
    if (file := last(options, "speculative-token-map")).count("/") > 1 and not Path(file).exists():
        return f"model-elsewhere: the engine downloads {file} itself; for snapshots give a local path"
    return None


def is_hub_name(value: str) -> bool:
    """Return whether a value names a hub repository, as the engines decide: it has that form, and no such path exists."""
    return hub.is_name(value) and not Path(value).exists()


def _adapters(value: str) -> Iterator[str]:
    """Yield the paths or names of adapters in one value: `NAME=PATH`, PATH, or JSON."""
    document = _json(value)
    for entry in document if isinstance(document, list) else [document]:
        if isinstance(entry, dict):
            yield str(entry.get("path") or entry.get("lora_path") or "")
        elif isinstance(entry, str):
            yield entry.partition("=")[2] or entry


def _json(value: str) -> Any:
    """Return the decoded JSON, or the value itself if it is not JSON."""
    if value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value
