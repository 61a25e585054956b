"""The demo's model and engines as installed by `make setup`, for the demo, the benchmark's defaults and the engine tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launchers.errors import Usage

MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Preset:
    """How to run an engine here: interpreter, arguments, and the environment variables that it needs on a CPU."""

    engine: str
    python: Path
    model: Path
    arguments: tuple[str, ...]
    environment: dict[str, str]


def preset(engine: str, home: Path, model: Path | None = None) -> Preset:
    """Return the preset of an engine. Raises Usage (engine-not-set-up) if `make setup` has not been run."""
    python = home / "venvs" / engine / "bin" / "python"
    model = model or home / "models" / MODEL
    if not python.exists():
        raise Usage("engine-not-set-up", f"there is no {python}; run: make setup (or give --engine-python)")
    if engine == "vllm":
        return Preset(engine, python, model, ("--model", str(model)), {"VLLM_CPU_KVCACHE_SPACE": "1"})
    arguments = (
        "--model-path",
        str(model),
        "--device",
        "cpu",
        "--attention-backend",
        "torch_native",
        "--max-total-tokens",
        "16384",
    )
    return Preset(engine, python, model, arguments, {"SGLANG_USE_CPU_ENGINE": "1"})
