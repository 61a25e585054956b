"""The command as it is typed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from capacity.cli import plan
from capacity.optimize import program, solver

pytestmark = pytest.mark.t0

REPO = Path(__file__).resolve().parents[3]
EXAMPLE = str(REPO / "examples" / "plan_trace.yaml")


def typed(*words, code=0, **options):
    result = CliRunner().invoke(plan, [str(word) for word in words], **options)
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.mark.parametrize("words", [(EXAMPLE, "--json"), ("--json", EXAMPLE), ("solve", EXAMPLE, "--json")])
def test_a_file_needs_no_subcommand(words):
    report = json.loads(typed(*words).stdout)
    assert [entry["action"] for entry in report["delta"]] == ["start"] * len(report["delta"])
    assert report["comparison"]["cold"]["gpus"] >= report["comparison"]["restored"]["gpus"]
    assert report["cost"] >= report["cost_of_linear_program"] - 1e-6


def test_tables_for_people():
    text = typed(EXAMPLE, "--explain", "--exact").stdout
    for words in (
        "What a faster start saves",
        "integer program",
        "gap",
        "no spare replica, for a start of 2.1s",
    ):
        assert words in text


def test_exact_prints_the_gap():
    report = json.loads(typed(EXAMPLE, "--exact", "--json").stdout)
    assert report["proven"] is True
    assert report["gap"] == pytest.approx(report["cost_of_rounding"] / report["cost_of_integer_program"] - 1, abs=1e-5)


def test_exact_says_when_time_ran_out():
    """What was found then, and what no plan undercuts; the rounding is never worse than what is given."""
    from capacity import report
    from capacity.optimize.plan import solve
    from tests.kits.capacity_kit import random_problem

    problem = random_problem(21, pools=9, services=9, steps=1)
    problem = replace(problem, quotas=(), policy=replace(problem.policy, region_mix={}, max_start=None, max_stop=None))
    problem = replace(problem, pools=tuple(replace(p, quota=60, supply=None, refused=None) for p in problem.pools))
    plan = solve(problem, exact=True, quick=True)
    assert plan.proven
    short = replace(plan, proven=False, bound=plan.exact_cost * 0.99, rounded_cost=plan.exact_cost * 1.01)
    text = report._solved(short)
    assert "time ran out" in text
    assert f"no plan costs less than ${short.bound:.2f}" in text
    assert "within 1.01% of the optimum" in text
    told = report.to_json(short)
    assert (told["proven"], told["lower_bound"]) == (False, round(short.bound, 6))
    assert told["gap"] == pytest.approx(1.01 / 0.99 - 1, abs=1e-5)
    built = program.build(problem, plan.need)
    start = solver.integers(built, solver.relax(built), problem, plan.need, quick=True).values
    none = solver.search(built, start=start, bound=1.0, limit=1e-9)
    assert not none.proven
    assert none.objective <= float(built.cost @ start) * (1 + 1e-9)
    assert 1.0 <= none.bound <= none.objective


def test_errors_are_clear_and_have_an_exit_code(tmp_path):
    missing = typed(tmp_path / "none.yaml", code=2)
    assert missing.stderr.count("\n") == 1
    assert missing.stderr.startswith("quickthaw: unreadable: ")
    tight = Path(EXAMPLE).read_text().replace("quota: 24", "quota: 1").replace("min: 1", "min: 2")
    (tmp_path / "tight.yaml").write_text(tight)
    infeasible = typed(tmp_path / "tight.yaml", code=1)
    first, *rest = infeasible.stderr.splitlines()
    assert "tight.yaml: no plan is possible" in first
    assert first.startswith("quickthaw: infeasible: ")
    assert rest == [
        "  - demand of service code (up to 13200 tokens/s)",
        "  - quota of pool h100-a, 1 instances",
        "the nearest change that makes one possible",
        "  - pools h100-a quota: from 1 to 7 instances",
    ]
    told = json.loads(typed(tmp_path / "tight.yaml", "--json", code=1).stdout)
    assert (told["error"], told["smallest"]) == ("infeasible", True)
    assert told["changes"] == [{"what": "pools h100-a quota", "now": 1, "needed": 7, "unit": "instances", "step": None}]
    typed("simulate", EXAMPLE, code=2)


def test_options_have_variables():
    report = json.loads(typed(EXAMPLE, env={"QUICKTHAW_PLAN_JSON": "1"}).stdout)
    assert "delta" in report


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--apply", "true"), "require --watch"),
        (("--rounds", "2"), "require --watch"),
        (("--watch", "1", "--emit", "kubernetes"), "--watch cannot be combined with"),
        (("--idle-by", "pause-pods", "--pause-image", "waits:1"), "requires --emit"),
        (("--watch", "0"), "0 is shorter than 0.1s"),
        (("--watch", "1GiB"), "is a memory; expected a time"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, said):
    assert said in typed(EXAMPLE, *words, code=2).stderr


@pytest.mark.slow
def test_generate_then_simulate(tmp_path):
    day = tmp_path / "day.csv"
    assert "requests" in typed("generate", day, "--requests", 600, "--hours", 0.3, "--services", "code").stdout
    report = json.loads(typed("simulate", EXAMPLE, "--trace", day, "--json", "--seed", 3).stdout)
    names = [row["policy"] for row in report["policies"]]
    assert names == ["no buffer", "fixed buffer 1", "hpa", "lp cold", "lp restored"]
    assert len({row["requests"] for row in report["policies"]}) == 1
    one = typed("simulate", EXAMPLE, "--trace", day, "--policy", "hpa").stdout
    assert "GPU hours" in one
    assert "lp" not in one
    nowhere = typed("simulate", EXAMPLE, "--trace", day, "--plot", tmp_path / "no" / "plot", code=2)
    assert "there is no folder" in nowhere.stderr
    bad = typed("simulate", EXAMPLE, "--trace", day, "--policy", "magic", code=2)
    assert "no policy is named 'magic'" in bad.stderr


def test_a_trace_instead_of_a_forecast(tmp_path):
    """Demand learned from requests: the rates' quantiles, and growth from the past; a relative path is beside the plan."""
    typed("generate", tmp_path / "past.csv", "--requests", 2000, "--hours", 0.5, "--services", "code", "--bursts", 200)
    text = Path(EXAMPLE).read_text()
    start, end = text.index("  forecast:"), text.index("policy:")
    (tmp_path / "plan.yaml").write_text(text[:start] + "  trace: {path: past.csv, bin: 5s, steps: 2}\n" + text[end:])
    report = json.loads(typed(tmp_path / "plan.yaml", "--json").stdout)
    assert len(report["steps"]) == 2
    assert report["comparison"]["cold"]["gpus"] >= report["comparison"]["restored"]["gpus"] > 0
    assert report["steps"][0]["instances"]["h100-a"] >= 1


def test_emit_is_yaml(tmp_path):
    text = typed(EXAMPLE, "--emit", "kubernetes", "--idle-by", "pause-pods", "--pause-image", "waits:1").stdout
    assert text.startswith("---\n")
    assert "CapacityBuffer" not in text
    assert "CapacityBuffer" in typed(EXAMPLE, "--emit", "kubernetes", "--pause-image", "waits:1").stdout


def test_watch_remembers_and_settles(tmp_path):
    state = tmp_path / "state.json"
    words = (EXAMPLE, "--watch", 0.1, "--rounds", 2, "--json", "--state", state, "--apply", "cat > /dev/null")
    first, second = (json.loads(line) for line in typed(*words).stdout.splitlines())
    assert first["start"]["h100-a"] > 0
    assert second["start"] == second["stop"] == {}
    assert json.loads(state.read_text())["held"] == first["start"]


def test_numbers_that_are_none_are_refused_in_options_too():
    for words in (("--watch", "nan"), ("--limit", "nan"), ("--limit", "inf")):
        assert "expected a time" in typed(EXAMPLE, *words, code=2).stderr


def test_the_pods_image_must_be_named_since_none_can_be_pulled_everywhere():
    assert "--pause-image" in typed(EXAMPLE, "--emit", "kubernetes", code=2).stderr
