"""Download the hub models of a launch before its engine starts, outside the sandbox.

The engine's own interpreter runs the download (plugin/engine/hub_download.py) with the user's environment. Replicas share
one download. huggingface_hub resumes an interrupted one.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from checkpoint import disk
from checkpoint.compatibility import hub
from checkpoint.files import write_private
from launchers.base import without_own_variables
from launchers.errors import LauncherError
from launchers.given_options import given_options, last
from launchers.model_source import Repository, load_format, repositories
from plugin.engine.hub_download import complete, configurations, names_speculators

if TYPE_CHECKING:
    from plugin.runtime.config import LaunchSettings

log = logging.getLogger("quickthaw")
_KEPT = 256
"""Commits of which the needed files are kept."""
PROGRAM = Path(__file__).parents[1] / "engine" / "hub_download.py"


class NotDownloaded(LauncherError):
    """A repository of the launch is not in the cache and could not be downloaded."""


class HubModels:
    """The hub repositories that a launch's command line names."""

    def __init__(self, settings: LaunchSettings) -> None:
        self.settings = settings
        self.repositories: tuple[Repository, ...] = () if settings.named else repositories(settings.command)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._ended = False

    @property
    def names_model(self) -> bool:
        """Return whether the model itself is a hub model."""
        return bool(self.repositories) and self.repositories[0].name == self.settings.command.model

    @property
    def download_dir(self) -> str:
        """Return the cache that the command line names, or ""."""
        return last(given_options(self.settings.command.arguments), "download-dir")

    def fetch(self, stderr: int | None) -> list[Path]:
        """Update every repository in the cache; return their snapshot folders. Progress goes to `stderr`.

        Raises NotDownloaded, with a stable code and the remedy, if one is neither at the hub nor complete in the cache.
        """
        command = self.settings.command
        options = given_options(command.arguments)
        # It includes a token that --scrub-env keeps from the engine.
        environment = without_own_variables(self.settings.environment)
        if token := last(options, "hf-token"):
            environment["HF_TOKEN"] = token
        request = {
            "parent": os.getpid(),
            "cache": str(Path(self.download_dir).expanduser()) if self.download_dir else None,
            "engine": command.engine,
            "load_format": load_format(command) or "auto",
            "remote_code": "trust-remote-code" in options,
            "code_revision": last(options, "code-revision") or None,
            "repositories": [asdict(repository) for repository in self.repositories],
        }
        if (known := self._in_cache(request)) is not None:
            return known
        with self._lock:
            if self._ended:
                raise NotDownloaded("stopped", "stopped before the download")
            try:
                process = self._process = subprocess.Popen(
                    [self.settings.engine_python, str(PROGRAM)],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL if stderr is None else stderr,
                )
            except OSError as error:
                raise NotDownloaded(
                    "hub-not-asked",
                    f"{self.settings.engine_python}: {error.strerror}; give the engine's interpreter with --engine-python",
                ) from error
        out, _ = process.communicate(json.dumps(request).encode())
        try:
            answer = json.loads(out)
        except ValueError:
            raise NotDownloaded(
                "hub-not-asked", f"the download ended with code {process.returncode}; its own output says why"
            ) from None
        if "code" in answer:
            raise NotDownloaded(answer["code"], answer["message"])
        self._note(request, answer["files"])
        return [Path(folder) for folder in answer["folders"]]

    def _in_cache(self, request: dict[str, Any]) -> list[Path] | None:
        """Return the snapshot folders if the engine itself would not ask the hub, and all files are in the cache; else None.

        So it is of commits of which a download has said what is needed, and offline. Asking the hub's client takes a second.
        """
        environment = self.settings.environment
        if request["remote_code"]:
            return None  # the code's repositories are named in configurations
        offline, notes, found = hub.is_offline(environment), self._notes(), []
        for one in self.repositories:
            folder = hub.folder(one.name, one.revision, hub.caches(environment, request["cache"])[:1])
            if folder is None or (one.part == "model" and names_speculators(configurations(str(folder)))):
                return None
            if offline:
                whole = complete(folder, one.part)
            else:
                needed = notes.get(_key(request, one), ()) if hub.is_commit(one.revision) else ()
                whole = bool(needed) and all((folder / name).is_file() for name in needed)
            if not whole:
                return None
            found.append(folder)
        return found

    def _note(self, request: dict[str, Any], files: list[list[str] | None]) -> None:
        """Keep which files of commits are needed."""
        new = {
            _key(request, one): names
            for one, names in zip(self.repositories, files, strict=True)
            if names and hub.is_commit(one.revision)
        }
        if new:
            kept = list((self._notes() | new).items())[-_KEPT:]
            with disk.optional("what a hub's commits hold is not kept", "hub-not-noted"):
                write_private(self._notes_file, json.dumps(dict(kept)).encode())

    @property
    def _notes_file(self) -> Path:
        return self.settings.home / "hub-commits.json"

    def _notes(self) -> dict[str, list[str]]:
        try:
            return msgspec.json.decode(self._notes_file.read_bytes(), type=dict[str, list[str]])
        except (OSError, msgspec.MsgspecError):
            return {}

    def close(self) -> None:
        """End a running download."""
        with self._lock:
            self._ended = True
            if self._process is not None and self._process.poll() is None:
                self._process.kill()


def _key(request: dict[str, Any], repository: Repository) -> str:
    """Return what the needed files depend on."""
    kind = (request["engine"], request["load_format"]) if repository.part == "model" else ()
    return " ".join((repository.name, repository.revision or "", repository.part, *kind))
