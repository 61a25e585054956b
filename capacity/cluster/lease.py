"""One controller at a time: who holds the Lease plans, the others wait.

The holder renews every `RENEW_S`. It counts as holder for `SURE_S` after its last renewal began; others take the Lease once
it has not changed for `VALID_S` on their own clock. The difference is longer than the API may be silent in a write
(`api.CALL_LIMIT_S`), so a holder that is cut off has stopped writing before another one begins. A write that is under way for
longer is bound to the version that was read: it fails where the next holder has written. In order, a holder gives the Lease up.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from typing import Any

from capacity.cluster.api import Api
from capacity.errors import CapacityError

RENEW_S = 3.0
SURE_S = 10.0
VALID_S = 15.0
_RETRY_S = 2.0
"""For so long a call is made again; the next renewal is one, too."""
_CLOSE_S = 10.0
"""For so long `close` waits for a call that is under way; the Lease then expires by itself."""


class Leadership:
    """This process's part in one Lease, kept by a thread of its own."""

    def __init__(self, api: Api, namespace: str, name: str, identity: str | None = None) -> None:
        host = "".join(c if c.isalnum() or c == "-" else "-" for c in socket.gethostname().lower()).strip("-")
        self.api, self.namespace, self.name = api, namespace, name
        self.identity = identity or f"{host[:40] or 'plan'}-{secrets.token_hex(3)}"
        self.error: CapacityError | None = None
        """Why the last attempt failed; None if it did not."""
        self.holder = ""
        """Who holds the Lease, as last seen."""
        self.asked = threading.Event()
        """Set once the Lease was read for the first time, or could not be."""
        self._renewed = -math.inf
        self._seen: tuple[str, float] = "", -math.inf
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plan-lease", daemon=True)

    def start(self) -> None:
        """Begin to hold the Lease, or to wait for it."""
        self._thread.start()

    @property
    def leading(self) -> bool:
        """Return True if this process holds the Lease."""
        return time.monotonic() - self._renewed < SURE_S

    def check(self) -> None:
        """Raise CapacityError (lease-lost) unless this process holds the Lease."""
        if not self.leading:
            held = f"{self.holder} holds it" if self.holder not in ("", self.identity) else "it was not renewed in time"
            raise CapacityError(
                "lease-lost", f"nothing is written without the Lease {self.namespace}/{self.name}: {held}"
            )

    def close(self) -> None:
        """Give the Lease up, so that another one takes it at once."""
        self._end.set()
        self._thread.join(_CLOSE_S)
        if self.leading and not self._thread.is_alive():
            self._renewed = -math.inf
            with contextlib.suppress(CapacityError):  # it expires by itself
                lease = self._read()
                if lease is not None and lease.spec.holderIdentity == self.identity:
                    lease.spec.holderIdentity = ""
                    self.api.put("update", "leases", lease, _RETRY_S)
        self.api.close()

    def _run(self) -> None:
        try:
            while True:
                try:
                    self._step()
                    self.error = None
                except CapacityError as error:
                    self.error = error
                self.asked.set()
                if self._end.wait(RENEW_S if self.leading else RENEW_S / 3):
                    return
        finally:
            if not self._end.is_set():  # a fault of ours: its traceback is in the log
                self.error = CapacityError("lease-failed", "the Lease is not renewed any more; start the plan again")
                self.asked.set()

    def _read(self) -> Any:
        from lightkube.resources.coordination_v1 import Lease

        return self.api.get(Lease, "leases", self.namespace, self.name, _RETRY_S)

    def _step(self) -> None:
        """Renew the Lease, take it if nobody holds it, or note who does."""
        from lightkube.models.coordination_v1 import LeaseSpec
        from lightkube.models.meta_v1 import ObjectMeta
        from lightkube.resources.coordination_v1 import Lease

        began, now = time.monotonic(), datetime.now(UTC)
        lease = self._read()
        if lease is None:
            meta = ObjectMeta(name=self.name, namespace=self.namespace)
            spec = LeaseSpec(
                holderIdentity=self.identity, leaseDurationSeconds=int(VALID_S), acquireTime=now, renewTime=now
            )
            if self.api.put("create", "leases", Lease(metadata=meta, spec=spec), _RETRY_S):
                self._renewed, self.holder = began, self.identity
            return
        spec = lease.spec or LeaseSpec()
        self.holder = spec.holderIdentity or ""
        if self.holder not in ("", self.identity):
            if lease.metadata.resourceVersion != self._seen[0]:
                self._seen = lease.metadata.resourceVersion, began
            if began - self._seen[1] < VALID_S:
                self._renewed = -math.inf  # another one has taken it
                return
        if self.holder != self.identity:
            spec.acquireTime, spec.leaseTransitions = now, (spec.leaseTransitions or 0) + 1
        spec.holderIdentity, spec.renewTime, spec.leaseDurationSeconds = self.identity, now, int(VALID_S)
        lease.spec = spec
        if self.api.put("update", "leases", lease, _RETRY_S):
            self._renewed, self.holder = began, self.identity
