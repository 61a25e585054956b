"""Check that a model's folder can be served, before an engine is started with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.errors import BadModel
from launchers.given_options import given_options, last

if TYPE_CHECKING:
    from launchers.base import EngineCommand

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
REMOTE_FORMATS = (
    "dummy",
    "tensorizer",
    "runai_streamer",
    "runai_streamer_sharded",
    "remote",
    "remote_instance",
    "private",
)
"""Values of --load-format with which a model's folder need not hold weights."""


def check_model(model: Path, command: EngineCommand | None = None) -> None:
    """Check that a model directory can be served. Raises BadModel with what is missing and the remedy.

    Options in `command` may supply what is missing: weights from another place or none at all, or another configuration.
    """
    if not model.exists():
        raise BadModel(
            "model-missing", f"there is no model directory {model}; give the path of one with config.json and weights"
        )
    if not model.is_dir():
        return  # a file, such as GGUF: the engine validates it
    options = given_options(command.arguments) if command else {}
    names = [entry.name for entry in os.scandir(model)]
    if any(name.endswith(".gguf") for name in names):
        return
    configured = options.keys() & {"hf-config-path", "config-format"} or {"config.json", "params.json"} & set(names)
    if not configured:
        raise BadModel("model-without-config", f"{model} has no config.json; is it the right directory?")
    if last(options, "load-format") in REMOTE_FORMATS or "model-weights" in options:
        return
    if not any(name.endswith(WEIGHT_SUFFIXES) for name in names):
        raise BadModel(
            "model-without-weights",
            f"{model} holds no weights ({', '.join(WEIGHT_SUFFIXES[:3])} …); was the download completed?",
        )
