"""Retry Temporary errors with jittered exponential backoff, bounded by attempts and by a deadline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lazyfs.errors import Integrity, Temporary

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Retry limits, durations in seconds.

    The n-th pause is drawn from 0 to min(cap, base * 2**n) ("full jitter"). `limit` bounds the total time. `attempts`
    bounds the number of calls; None: only `limit` applies.
    """

    attempts: int | None = 8
    base: float = 0.05
    cap: float = 5.0
    limit: float = 60.0

    def __post_init__(self) -> None:
        if (self.attempts is not None and self.attempts < 1) or min(self.base, self.cap, self.limit) < 0:
            raise ValueError("attempts must be at least 1, and no duration may be negative")


def retrying(
    call: Callable[[], T], policy: RetryPolicy, *, on_retry: Callable[[Temporary, int], None] | None = None
) -> T:
    """Retry `call` until it returns, raises an error other than Temporary, or the policy is exhausted.

    Raises the last Temporary if the policy is exhausted.
    """
    deadline = time.monotonic() + policy.limit
    attempt = 0
    while True:
        try:
            return call()
        except Temporary as error:
            attempt += 1
            pause = random.uniform(0, min(policy.cap, policy.base * 2**attempt))
            if error.retry_after is not None:
                pause = min(max(pause, error.retry_after), policy.cap)
            spent = policy.attempts is not None and attempt >= policy.attempts
            if spent or time.monotonic() + pause > deadline:
                raise
            if on_retry is not None:
                on_retry(error, attempt)
            time.sleep(pause)


def retry_damaged(call: Callable[[], T]) -> T:
    """Run `call`, and once more if it raises Integrity: the bytes may have been damaged in transit.

    Raises the second Integrity.
    """
    try:
        return call()
    except Integrity:
        return call()
