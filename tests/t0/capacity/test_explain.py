"""No plan: the smallest conflict in the file's own names, and a nearest change that makes it feasible."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from capacity import requirements
from capacity.errors import InfeasibleError
from capacity.inputs import document, load
from capacity.optimize import explain, program
from capacity.optimize.plan import solve
from capacity.report import error_json

pytestmark = pytest.mark.t0

TEXT = """
pools:
  - {name: east-a, gpu: H100, gpus: 8, memory: 80, region: east, zone: a, price: 24, boot: 0s, quota: 2}
  - {name: west-a, gpu: H100, gpus: 8, memory: 80, region: west, zone: a, price: 22, boot: 0s, quota: 1}
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


def test_without_time_for_the_nearest_change_the_error_says_so(problem):
    """400 services on 200 pools printed a conflict and nothing else after 15 s."""
    built = program.build(problem, requirements.compute(problem, "restored"))
    error = explain.infeasible(problem, built, integers=False, limit=0.0)
    assert error.conflict.changes == () and not error.conflict.smallest
    assert error.lines()[-1].startswith("no nearest change: time ran out")
    assert "no nearest change: time ran out" in str(error) and "\n" not in str(error)
    assert error_json(error)["changes_found"] is False
    found = explain.infeasible(problem, built, integers=False)
    assert "time ran out" not in str(found) + "".join(found.lines())
    assert error_json(found)["changes_found"] is True


def test_the_nearest_change_is_enough_and_no_more_than_enough(problem):
    east = problem.pools[0]
    enough = replace(problem, pools=(replace(east, quota=5), problem.pools[1]))
    assert solve(enough).instances[0].tolist()[0] == 5
    with pytest.raises(InfeasibleError):
        solve(replace(problem, pools=(replace(east, quota=4), problem.pools[1])))


@pytest.mark.parametrize("start", ["from HiGHS' proof", "from a wrong proof", "from all"])
def test_every_constraint_of_the_conflict_is_needed(problem, monkeypatch, start):
    """Left out one at a time, the rest can hold together."""
    monkeypatch.setattr(explain, "FEW", 60 if start == "from all" else 0)
    if start == "from a wrong proof":
        monkeypatch.setattr(explain, "_certificate", lambda *_: [0])
    built = program.build(problem, requirements.compute(problem, "restored"))
    owners, deadline = explain.owners_of(built), 1e18
    named, smallest = explain.conflict(built, owners, deadline, integers=False)
    assert smallest
    assert not explain.feasible(built, owners, set(named), deadline, integers=False)
    for rest in combinations(named, len(named) - 1):
        assert explain.feasible(built, owners, set(rest), deadline, integers=False)


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
    assert text.startswith("infeasible: ")
    assert "pools east-a quota: from 2 to 5 instances" in text


FLEET = """
pools:
  - {name: east-a, gpu: H100, gpus: 8, memory: 80, region: east, zone: a, price: 24, quota: 4, supply: 6, boot: 0s}
  - {name: east-b, gpu: H100, gpus: 8, memory: 80, region: east, zone: b, price: 25, quota: 4, supply: 6, boot: 0s}
  - {name: west-a, gpu: L40S, gpus: 4, memory: 48, region: west, zone: a, price: 6, quota: 10, supply: 10, boot: 0s}
quotas:
  - {name: h100-all, gpu: H100, gpus: 64}
services:
  - {name: chat, gpus: 4, memory: 70, rate: 2, target_wait: 5s, regions: [east], lead_time: {cold: 97, restored: 1.9}}
  - {name: embed, gpus: 1, memory: 20, rate: {H100: 10, L40S: 4}, target_wait: 5s, lead_time: {cold: 50, restored: 1}}
demand:
  forecast:
    chat: {0.5: [5, 6], 0.9: [7, 8]}
    embed: {0.5: [20, 20], 0.9: [25, 30]}
policy: {headroom: 10%, zone_loss: 50%}
"""
EAST_A, EAST_B = "price: 24, quota: 4, supply: 6", "price: 25, quota: 4, supply: 6"

WRONG = {
    "demand over a quota": (
        {"0.9: [7, 8]": "0.9: [40, 50]"},
        {"demand of service chat (up to 55 requests/s)", "quota h100-all of 64 H100"},
    ),
    "shared quota": ({"gpus: 64}": "gpus: 16}"}, {"demand of service chat (up to 8.8 requests/s)", "quota h100-all of 16 H100"}),
    "no supply in a zone": (
        {EAST_B: "price: 25, quota: 4, supply: 0"},
        {"service chat serves on when its largest zone is lost", "supply of pool east-b, 0 starts a step"},
    ),
    "refused": (
        {EAST_A: EAST_A + ", refused: {asked: 3, got: 0}"},
        {
            "service chat serves on when its largest zone is lost",
            "supply of pool east-a, 0 starts a step (the last step got 0 of 3 asked)",
        },
    ),
    "max_start": ({"zone_loss: 50%": "zone_loss: 50%, max_start: 1"}, {"policy max_start 1"}),
    "max": (
        {"rate: 2, t": "rate: 2, max: 2, t"},
        {"demand of service chat (up to 8.8 requests/s)", "services chat max 2"},
    ),
    "min": ({"rate: 2, t": "rate: 2, min: 40, t"}, {"services chat min 40", "quota h100-all of 64 H100"}),
    "region min": (
        {"zone_loss: 50%": "zone_loss: 50%, region_mix: {west: {min: 80%}}"},
        {"region_mix west min 0.8", "quota of pool west-a, 10 instances"},
    ),
    "region max": (
        {"zone_loss: 50%": "zone_loss: 50%, region_mix: {east: {max: 10%}}"},
        {"region_mix east max 0.1", "quota of pool west-a, 10 instances", "demand of service chat (up to 8.8 requests/s)"},
    ),
    "stop limit": (
        {EAST_A: "price: 24, quota: 2, supply: 6, held: 6", "zone_loss: 50%": "zone_loss: 50%, max_stop: 1"},
        {"policy max_stop 1", "quota of pool east-a, 2 instances"},
    ),
    "a later step": (
        {"chat: {0.5: [5, 6], 0.9: [7, 8]}": "chat: {0.5: [5, 40], 0.9: [7, 44]}", "gpus: 64}": "gpus: 640}"},
        {"quota of pool east-b, 4 instances"},
    ),
    "a replica over many instances": (
        {"name: chat, gpus: 4": "name: chat, gpus: 64"},
        {"demand of service chat (up to 8.8 requests/s)", "quota h100-all of 64 H100"},
    ),
}  # fmt: skip


def changed(problem, changes):
    """The problem with the changes made that are proposed."""
    pools, quotas, services = list(problem.pools), list(problem.quotas), list(problem.services)
    policy = problem.policy
    for change in changes:
        section, *rest = change.what.split(" ")
        if section == "pools":
            k = next(k for k, p in enumerate(pools) if p.name == rest[0])
            if rest[1:] == ["refused", "got"]:
                pools[k] = replace(pools[k], refused=(pools[k].refused[0], int(change.needed)))
            else:
                pools[k] = replace(pools[k], **{rest[1]: int(change.needed)})
        elif section == "quotas":
            k = next(k for k, q in enumerate(quotas) if q.name == rest[0])
            quotas[k] = replace(quotas[k], gpus=int(change.needed))
        elif section == "services":
            k = next(k for k, s in enumerate(services) if s.name == rest[0])
            services[k] = replace(services[k], **{{"max": "maximum", "min": "minimum"}[rest[1]]: int(change.needed)})
        elif rest[0] == "region_mix":
            share = policy.region_mix[rest[1]]
            share = replace(share, **{{"min": "least", "max": "most"}[rest[2]]: change.needed})
            policy = replace(policy, region_mix={**policy.region_mix, rest[1]: share})
        else:
            assert section == "policy", change
            policy = replace(policy, **{rest[0]: int(change.needed)})
    return replace(problem, pools=tuple(pools), quotas=tuple(quotas), services=tuple(services), policy=policy)


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_and_the_change_makes_a_plan_possible(case):
    edits, named = WRONG[case]
    text = FLEET
    for old, new in edits.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    problem = load.from_field(document.parse_text(text, "plan.yaml"), Path("plan.yaml"))
    conflict = conflict_of(problem)
    assert conflict.smallest
    assert named <= set(conflict.constraints)
    assert conflict.changes
    solve(changed(problem, conflict.changes))
