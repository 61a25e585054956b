"""What an engine's options and its model say about weights that the engine's own reload may leave out.

By the options alone no engine need be asked; launchers.base.Engine.unsafe_reload decides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launchers.given_options import given_options, last

_CONFIGURED = ("speculative-config", "sc")
_SPECULATIVE = {
    *_CONFIGURED,
    *("speculative-model", "speculative-draft-model", "speculative-draft-model-path"),
    *("speculative-algorithm", "spec-method", "spec-model"),
}
"""Options with which an engine drafts tokens."""
_NO_WEIGHTS = ("ngram", "[ngram]", "suffix", "none")
"""Methods that draft from text alone."""
_QUANTIZED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def quantized(arguments: Sequence[str], folder: Path | None) -> str:
    """Return what says that an engine quantizes its weights, an option or a file of the model's `folder`, or ""."""
    options = given_options(arguments)
    for option in ("quantization", "q", "torchao-config"):
        if (value := last(options, option)) and value.lower() != "none":
            return f"--{option} {value}"
    config = model_config(folder)
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(key):
                return f"the model's {key}"
    found = next((name for name in _QUANTIZED_FILES if folder and (folder / name).exists()), "")
    return found and f"the model's {found}"


def draft_weights(arguments: Sequence[str], folder: Path | None) -> str:
    """Return what says that an engine has a draft model, an option or the model's own configuration, or ""."""
    options = given_options(arguments)
    named = [name for name in options if name.partition(".")[0] in _SPECULATIVE]
    methods = [last(options, name) for name in named if name.endswith(("method", "algorithm"))]
    for name in _CONFIGURED:
        try:
            given = json.loads(last(options, name) or "{}")
        except (ValueError, RecursionError):
            continue  # the engine will refuse it
        if isinstance(given, dict) and isinstance(given.get("method"), str):
            methods.append(given["method"])
    if named and not any(method.lower().startswith(_NO_WEIGHTS) for method in methods):
        return f"--{named[0]}"
    return "the model's speculators_config" if model_config(folder).get("speculators_config") else ""


def model_config(folder: Path | None) -> dict[str, Any]:
    """Return a model's config.json; empty if there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_bytes()) if folder else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
