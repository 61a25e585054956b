"""The settings of a launch: one frozen object, validated when it is made. Precedence (by click): option > environment > default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.base import EngineCommand, without_own_variables
from plugin.runtime.home import state_home as state_home

WEIGHTS = ("auto", "included", "excluded")


@dataclass(frozen=True)
class LaunchSettings:
    """Settings of one launch. Times are in seconds.

    - weights: `included`: a snapshot has the weights; `excluded`: a restore reads them through the lazy mount; `auto`
      decides by measured rates.
    - name: the snapshot's name, if the user gave one.
    - named: serve exactly the snapshot `name`, or fail (`quickthaw restore`).
    - sleep_after_s: 0 never sleeps.
    - standby_after_s: 0 never goes to standby.
    - trim: False leaves the KV cache in the snapshot (to measure what excluding it gains).
    - snapshot_store: URL of the store for snapshots that this host lacks, and for compile caches.
    - cache_limit: bytes of the chunk cache; 0 none; -1 this host's bound, else what leaves part of the disk free (lazyfs/cache/bound.py).
    - rehearse: restore a snapshot once beside the serving engine (plugin/rehearsal); push: then push it to `snapshot_store`.
    - silence_limit_s: restart an engine that has not answered for this long; 0 never.
    - restore_concurrency: maximum of concurrent restores; 0 chooses by processors (plugin/runtime/restore_limit.py).
    - strict: fail, instead of continuing without, when a capability is off or a restore fails.
    - suspend_before_kill: take an engine off the GPU before it is ended: `always`, `never`, or `auto` where the driver needs it.
    - proxy: the user's values for plugin.proxy.settings.Settings.
    - admin_listen: host and port of a separate listener for the admin endpoints.
    - egress: whether the sandbox has a way out into this host's network; None where the command line asks for it.
    """

    engine: str
    command: EngineCommand
    engine_python: str
    home: Path
    store_url: str | None = None
    snapshot_store: str | None = None
    cache_limit: int = -1
    rehearse: bool = True
    push: bool = True
    name: str | None = None
    named: bool = False
    replicas: int = 1
    restore_concurrency: int = 0
    weights: str = "auto"
    mount: bool = True
    take_snapshot: bool = True
    use_snapshot: bool = True
    strict: bool = False
    egress: bool | None = None
    lazy_restore: bool = True
    trim: bool = True
    verify: str = "auto"
    sleep_after_s: float = 0.0
    standby_after_s: float = 0.0
    start_timeout_s: float = 1800.0
    grace_s: float = 30.0
    silence_limit_s: float = 60.0
    suspend_before_kill: str = "auto"
    scrub_env: tuple[str, ...] = ()
    sign_key: Path | None = None
    trust_keys: tuple[Path, ...] = ()
    proxy: Mapping[str, Any] = field(default_factory=dict)
    admin_listen: tuple[str, int] | None = None
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"--weights must be one of {', '.join(WEIGHTS)}, not {self.weights!r}")
        if self.verify not in ("auto", "always", "never"):
            raise ValueError(f"--verify must be auto, always or never, not {self.verify!r}")
        if self.replicas < 1:
            raise ValueError(f"--replicas must be at least 1, not {self.replicas}")
        if self.restore_concurrency < 0:
            raise ValueError(f"--restore-concurrency must not be negative, not {self.restore_concurrency}")
        if (
            min(self.sleep_after_s, self.standby_after_s, self.grace_s, self.silence_limit_s) < 0
            or self.start_timeout_s <= 0
        ):
            raise ValueError("times must not be negative, and --start-timeout must be above 0")

    @property
    def refuses_own(self) -> bool:
        """Return whether this launch would refuse the snapshot that it takes: it trusts keys, and signs with none."""
        return bool(self.trust_keys) and self.sign_key is None

    @property
    def push_to(self) -> str:
        """Return the store that a rehearsed snapshot is pushed to, or ""; one that is only read gets none."""
        from lazyfs.stores.urls import writable

        store = self.snapshot_store or ""
        return store if self.push and not self.refuses_own and writable(store) else ""

    @property
    def given_environment(self) -> dict[str, str]:
        """Return `environment` for the engine: without quickthaw's own variables and without those in `scrub_env`."""
        return {k: v for k, v in without_own_variables(self.environment).items() if k not in self.scrub_env}
