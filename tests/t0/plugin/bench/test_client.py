"""The request that a benchmark measures."""

from __future__ import annotations

from launchers.canary import CANARY_PROMPT
from plugin.bench.client import PROMPT


def test_a_measured_request_shares_no_prefix_with_the_canary() -> None:
    assert PROMPT.split()[0] != CANARY_PROMPT.split()[0]
