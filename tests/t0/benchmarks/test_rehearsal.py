"""What the measurement of a rehearsal ends with."""

import pytest

from benchmarks.rehearsal import targets_met

pytestmark = pytest.mark.t0


@pytest.mark.parametrize(
    ("ratio", "p99_ratio", "texts", "met"),
    [(1.1, 1.1, 1, True), (1.3, 1.1, 1, False), (1.1, 1.3, 1, False), (1.1, 1.1, 2, False), (None, 1.1, 1, False)],
)
def test_a_target_that_was_not_measured_is_not_met(ratio, p99_ratio, texts, met):
    assert targets_met({"ratio": ratio, "texts": texts, "end_s": {"p99_ratio": p99_ratio}}) is met
