"""What a measured request is."""

from __future__ import annotations

from launchers.canary import CANARY_PROMPT
from plugin.bench.client import PROMPT


def test_no_prefix_cache_answers_a_measured_request_with_what_the_canary_left() -> None:
    assert PROMPT.split()[0] != CANARY_PROMPT.split()[0]
