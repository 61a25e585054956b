"""Find hub models on this host, in the layout of huggingface_hub's cache.

huggingface_hub is not used: importing its look-up takes 180 ms of CPU time, more than half a restore.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

from lazyfs.stores.hub_rules import is_commit as is_commit
from lazyfs.stores.hub_rules import is_offline as is_offline

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DEFAULT_REVISION = "main"
TEXT_REVISIONS = {
    "tokenizer": ("tokenizer-revision", "revision"),
    "tokenizer-path": ("tokenizer-revision", "revision"),
    "hf-config-path": ("revision",),
}
"""Options that name a repository of which only the text is read, and the options of its revision, the first that is given."""
_CONFIGURATIONS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_CODE_ELSEWHERE = re.compile(r"([\w.-]+/[\w.-]+)--[\w.]+")


def is_name(value: str) -> bool:
    """Return whether a value has the form of a repository's name."""
    return bool(_NAME.fullmatch(value))


def code_repositories(model: Path) -> list[str]:
    """Return the names of the other repositories whose code the configuration in a model's folder refers to."""
    found: dict[str, None] = {}
    for file in (model / name for name in _CONFIGURATIONS):
        with contextlib.suppress(OSError):
            if file.is_file():  # a read of a pipe would block
                found |= dict.fromkeys(_CODE_ELSEWHERE.findall(file.read_text(errors="replace")))
    return list(found)


def caches(environment: Mapping[str, str], download_dir: str | None = None) -> list[Path]:
    """List the cache folders in which an engine with this environment looks for hub models, in order.

    `download_dir`: its option.
    """
    found = [download_dir] if download_dir else []
    home = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    found += [environment[name] for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if environment.get(name)][:1] or [
        f"{home}/hub"
    ]
    if environment.get("TRANSFORMERS_CACHE"):
        found.append(environment["TRANSFORMERS_CACHE"])
    return list(dict.fromkeys(map(_expanded, found)))


def _expanded(folder: str) -> Path:
    """Return a path without `~`, which stays where the user has neither a home nor a name, as the hub's own client has it."""
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        return Path(folder)


def folder(name: str, revision: str | None, places: list[Path]) -> Path | None:
    """Return a model's folder in the first cache that has this revision.

    `revision` is a branch, a tag or a commit; None means the default branch.
    """
    if not is_name(name):
        return None
    revision = revision or DEFAULT_REVISION
    if ".." in revision.split("/"):
        return None
    for cache in places:
        repo = cache / f"models--{name.replace('/', '--')}"
        try:
            commit = (repo / "refs" / revision).read_text().strip()
        except (OSError, ValueError):
            commit = revision  # a commit itself has no reference
        snapshot = repo / "snapshots" / commit
        if commit and "/" not in commit and snapshot.is_dir():
            return snapshot
    return None
