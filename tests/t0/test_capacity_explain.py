"""No plan: the smallest conflict in the file's own names, and a nearest change that makes it feasible."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from capacity import document, explain, load, need, program
from capacity.errors import InfeasibleError
from capacity.plan import solve

pytestmark = pytest.mark.t0

TEXT = """
pools:
  - {name: east-a, gpu: H100, gpus: 8, memory: 80, region: east, zone: a, price: 24, quota: 2}
  - {name: west-a, gpu: H100, gpus: 8, memory: 80, region: west, zone: a, price: 22, quota: 1}
quotas:
  - {name: h100, gpu: H100, gpus: 400}
services:
  - {name: chat, gpus: 8, rate: 1, target_wait: 1h, regions: [east], lead_time: {cold: 9, restored: 1}}
  - {name: other, gpus: 1, rate: 1, target_wait: 1h, lead_time: {cold: 9, restored: 1}}
demand:
  quantile: 0.5
  forecast:
    chat: {0.5: [5], 0.9: [5]}
    other: {0.5: [1], 0.9: [1]}
policy: {headroom: 0, hysteresis: {band: 0}, zone_loss: 0, max_stop: 9}
"""


def conflict_of(problem):
    with pytest.raises(InfeasibleError) as caught:
        solve(problem)
    return caught.value.conflict


@pytest.fixture
def problem():
    return load.from_field(document.parse_text(TEXT, "plan.yaml"), Path("plan.yaml"))


def test_the_smallest_conflict_and_the_nearest_change(problem):
    """Five instances are asked of a pool of two. Nothing about west, the shared quota or the other service belongs to it."""
    conflict = conflict_of(problem)
    assert conflict.smallest
    assert conflict.constraints == (
        "demand of service chat (up to 5 requests/s)",
        "quota of pool east-a, 2 instances",
    )
    (change,) = conflict.changes
    assert (change.what, change.now, change.needed) == ("pools east-a quota", 2, 5)


def test_the_nearest_change_is_enough_and_no_more_than_enough(problem):
    east = problem.pools[0]
    enough = replace(problem, pools=(replace(east, quota=5), problem.pools[1]))
    assert solve(enough).instances[0].tolist()[0] == 5
    with pytest.raises(InfeasibleError):
        solve(replace(problem, pools=(replace(east, quota=4), problem.pools[1])))


def test_every_constraint_of_the_conflict_is_needed(problem):
    """Left out one at a time, the rest can hold together."""
    built = program.build(problem, need.compute(problem, "restored"))
    elastic = explain._elastic(built)
    deadline = 1e18
    named, smallest = explain._conflict(elastic, False, deadline)
    assert smallest
    assert explain._solve(elastic, set(named), deadline, whole=False).values is None
    for rest in combinations(named, len(named) - 1):
        assert explain._solve(elastic, set(rest), deadline, whole=False).values is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_start": 1}, "policy max_start"),
        ({"zone_loss": 1.0}, "largest zone"),
    ],
)
def test_policies_are_named(problem, change, words):
    pools = (replace(problem.pools[0], quota=9), replace(problem.pools[1], quota=0))
    services = (replace(problem.services[0], regions=None), problem.services[1])
    changed = replace(problem, pools=pools, services=services, policy=replace(problem.policy, **change))
    conflict = conflict_of(changed)
    assert any(words in text for text in conflict.constraints), conflict
    assert conflict.changes


def test_whole_numbers_that_cannot_be_are_explained_too(problem):
    """Half of all GPUs in each region is possible for fractions of instances, not for three of them."""
    from capacity.model import Share

    mix = {"east": Share(0.45, 0.55)}
    services = (replace(problem.services[0], gpus=8, minimum=1, maximum=1), replace(problem.services[1], maximum=1))
    forecasts = {n: replace(f, values=((0.5,), (0.5,))) for n, f in problem.demand.forecasts.items()}
    changed = replace(
        problem,
        services=services,
        pools=(replace(problem.pools[0], quota=1), replace(problem.pools[1], quota=1, gpus=4)),
        demand=replace(problem.demand, forecasts=forecasts),
        policy=replace(problem.policy, region_mix=mix),
    )
    conflict = conflict_of(changed)
    assert any("region_mix east" in text for text in conflict.constraints)


def test_the_message_is_one_line_with_the_code(problem):
    with pytest.raises(InfeasibleError) as caught:
        solve(problem)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith("[infeasible]")
    assert "pools east-a quota: from 2 to 5 instances" in text
