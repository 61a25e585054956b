"""The host folders bound into a sandbox: the compile cache, the engine's site folder, the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.files import private_folder
from checkpoint.sandbox.sandbox import CACHE_DIR, Bind
from launchers.base import ENGINE_SITE
from launchers.engine_site import engine_site

if TYPE_CHECKING:
    from plugin.runtime.config import LaunchSettings
    from plugin.runtime.steps.model_mount import Weights


def compile_cache(settings: LaunchSettings) -> Path:
    """Return the engine's compile cache folder, creating it if needed. Raises OSError."""
    folder = settings.home / "compile" / settings.engine
    private_folder(folder)
    (folder / "tmp-inductor").mkdir(mode=0o700, exist_ok=True)
    return folder


def binds(settings: LaunchSettings, weights: Weights, mounted: Path | None, place: str) -> list[Bind]:
    """Return the binds of a sandbox.

    The model appears at `place`, the path the engine reads, from `mounted` when the lazy mount is up.
    """
    found = [
        Bind(compile_cache(settings), Path(CACHE_DIR), read_only=False),
        Bind(engine_site(settings.home, Path(__file__).parents[2] / "engine"), Path(ENGINE_SITE)),
    ]
    if mounted:
        found.append(Bind(mounted, Path(place)))
    elif weights.path and place not in ("", weights.engine_path) and Path(place).is_dir():
        # `place` differs from the folder the user named and its contents are unchecked: bind the named folder over it.
        found.append(Bind(weights.path.absolute(), Path(place)))
    return found
