"""Ask a pod itself whether it serves, and how far its start is: the cluster's own probe may come seconds later."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field

from plugin.proxy.endpoints.readiness import PATH_LIMIT_S, generation_fault, path_fault
from plugin.proxy.endpoints.request import fetch
from plugin.proxy.errors import UpstreamFault
from plugin.proxy.http.address import Upstream
from plugin.proxy.kubernetes.address import WorkloadAddress
from plugin.proxy.pool.facts import Facts
from plugin.proxy.pool.replica import Replica
from plugin.runtime.phases import Phase, PhaseTracker

COLD = (Phase.MOUNTING, Phase.STARTING, Phase.LOADING, Phase.WARMING)
RESTORED = (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING)
_GENERATION_LIMIT_S = 60.0
_STRICT = "/-/ready?strict=1"


@dataclass(frozen=True)
class WorkloadSpec:
    """The configuration of a workload. Times in seconds."""

    address: WorkloadAddress
    ready_path: str = "/health"
    ready_model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    wake_limit_s: float = 600.0
    sleep_after_s: float | None = None
    schedule_grace_s: float = 30.0
    """How long a pod may be without a node, or its container without an image, before held requests get the reason."""
    scales: bool = True
    """False if another (KEDA, a HorizontalPodAutoscaler with a minimum of 0) writes `scale`."""
    facts: Facts = field(default_factory=Facts)


def advance(tracker: PhaseTracker, phases: tuple[Phase, ...], phase: Phase) -> None:
    """Make the transitions of a start up to `phase`, one by one, as the state machine requires; never back."""
    if tracker.phase in phases:
        for step in phases[phases.index(tracker.phase) + 1 : phases.index(phase) + 1]:
            tracker.to(step)


@dataclass(eq=False)
class Asker:
    """Ask one pod, again and again. It remembers whether a quickthaw answers there."""

    replica: Replica
    spec: WorkloadSpec
    quickthaw: bool | None = None

    async def not_ready(self) -> str | None:
        """Return None if the pod serves, else the reason; the replica's phase and step follow what it says.

        Raises StartFailed (api-key-refused).
        """
        replica, spec, why = self.replica, self.spec, None
        upstream = replica.upstream
        assert upstream is not None, "only pods with an address are asked"
        if self.quickthaw is not False:
            why = await self._ask_quickthaw(upstream)
        if self.quickthaw is False:
            why = await path_fault(upstream, spec.ready_path, spec.api_key)
            if why is not None and not why.startswith("refused"):
                advance(replica.tracker, COLD, Phase.LOADING)
        if why is None and spec.ready_model is not None:
            why = await generation_fault(upstream, spec.ready_model, spec.api_key, _GENERATION_LIMIT_S)
        return why

    async def _ask_quickthaw(self, upstream: Upstream) -> str | None:
        """Return why a quickthaw in the pod does not serve, None if it does; note whether one is there, and its phase."""
        try:
            status, body = await fetch(upstream, "GET", _STRICT, limit_s=PATH_LIMIT_S)
        except UpstreamFault as fault:
            self.quickthaw = False
            return fault.message
        except OSError as error:
            return f"refused ({type(error).__name__})"
        try:
            said = json.loads(body)
            ready = said["ready"]
        except (ValueError, LookupError, TypeError):
            self.quickthaw = False
            return "no quickthaw"
        self.quickthaw = True
        if status == 200 and ready is True:
            return None
        if isinstance(text := said.get("progress"), str):
            self.replica.step = " ".join(text.split())[:200]
        with contextlib.suppress(ValueError):
            phase = Phase(said.get("phase", ""))
            for steps in (RESTORED, COLD):
                if phase in steps[1:]:
                    advance(self.replica.tracker, steps, phase)
        return "it is starting"
