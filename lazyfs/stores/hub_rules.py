"""What the hub's own client makes of revisions and of its environment. Quick to import."""

from __future__ import annotations

import re
from collections.abc import Mapping

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit, whose files never change. A branch or a tag may move."""
    return bool(revision and _COMMIT.fullmatch(revision))


def is_offline(environment: Mapping[str, str]) -> bool:
    """Return whether the hub's own client asks no hub with this environment."""
    given = environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE") or ""
    return given.upper() in ("1", "ON", "YES", "TRUE")
