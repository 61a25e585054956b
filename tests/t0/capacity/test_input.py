"""Bad input gives one clear error, with its line and field; good input gives what it says."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from capacity.errors import InputError
from capacity.inputs import document, load, trace, units

pytestmark = pytest.mark.t0

GOOD = """\
version: 1
step: 15m
pools:
  - name: a
    gpu: H100
    gpus: 8
    memory: 80GiB
    region: east
    price: 24.0 $/h
    quota: 4
    boot: 0s
services:
  - name: chat
    gpus: 4
    rate: {H100: 3/s}
    memory: 70GiB
    target_wait: 2s
    lead_time: {cold: [97s, 2m], restored: [900ms, 1.1s]}
demand:
  quantile: 90%
  forecast:
    chat: {p50: [5, 6], 0.9: [7, 8]}
policy:
  headroom: 10%
"""


def problem(text):
    return load.from_field(document.parse_text(text, "plan.yaml"), Path("plan.yaml"))


def test_a_good_file_says_what_it_says():
    read = problem(GOOD)
    service = read.services[0]
    assert read.step_seconds == 900
    assert service.cold == (97.0, 120.0)
    assert service.restored == (0.9, 1.1)
    assert read.demand.quantile == pytest.approx(0.9)
    assert read.demand.forecasts["chat"].at(0.9).tolist() == [7, 8]
    assert read.demand.forecasts["chat"].at(0.7).tolist() == pytest.approx([6, 7])
    assert read.pools[0].price == 24.0


CASES = [
    ("price: 24.0 $/h", "price: -3", "negative", 9, "pools[0].price"),
    ("price: 24.0 $/h", "price: .nan", "not-a-number", 9, "pools[0].price"),
    ("price: 24.0 $/h", "price: nan", "not-a-number", 9, "pools[0].price"),
    ("price: 24.0 $/h", "price: .inf", "not-a-number", 9, "pools[0].price"),
    ("price: 24.0 $/h", "price: 24s", "wrong-unit", 9, "pools[0].price"),
    ("price: 24.0 $/h", "price: 24 parsecs", "wrong-unit", 9, "pools[0].price"),
    ("memory: 80GiB", "memory: 80s", "wrong-unit", 7, "pools[0].memory"),
    ("memory: 80GiB", "memory: 81920", "out-of-range", 7, "pools[0].memory"),
    ("target_wait: 2s", "target_wait: 2GiB", "wrong-unit", 17, "services[0].target_wait"),
    ("cold: [97s, 2m]", "cold: [97000]", "out-of-range", 18, "services[0].lead_time.cold[0]"),
    ("cold: [97s, 2m]", "cold: []", "empty", 18, "services[0].lead_time.cold"),
    ("quantile: 90%", "quantile: 90", "wrong-unit", 20, "demand.quantile"),
    ("quota: 4", "quota: 4.5", "wrong-type", 10, "pools[0].quota"),
    ("quota: 4", "quota: .nan", "not-a-number", 10, "pools[0].quota"),
    ("quota: 4", "quotta: 4", "unknown-field", 10, "pools[0].quotta"),
    ("quota: 4", "price: 4", "repeated-field", 10, "pools[0].price"),
    ("gpus: 8", "gpus: 0", "out-of-range", 6, "pools[0].gpus"),
    ("gpus: 8", "gpus: true", "wrong-type", 6, "pools[0].gpus"),
    ("{H100: 3/s}", "{A100: 3/s}", "unknown-name", 15, "services[0].rate.A100"),
    ("{H100: 3/s}", "0", "out-of-range", 15, "services[0].rate"),
    ("memory: 70GiB", "regions: [mars]", "unknown-name", 16, "services[0].regions[0]"),
    ("memory: 70GiB", "memory: 141GiB", "no-pool", 13, "services[0]"),
    ("0.9: [7, 8]", "0.9: [4, 8]", "out-of-order", 22, "demand.forecast.chat.0.9"),
    ("0.9: [7, 8]", "0.9: [7]", "unequal-length", 22, "demand.forecast.chat.0.9"),
    ("0.9: [7, 8]", "p50: [7, 8]", "repeated-field", 22, "demand.forecast.chat.p50"),
    (", 0.9: [7, 8]", "", "too-few", 22, "demand.forecast.chat"),
    ("chat: {p50", "chatt: {p50", "unknown-name", 22, "demand.forecast.chatt"),
    ("headroom: 10%", "headroom: 1%", "out-of-range", 24, "policy"),
    ("quantile: 90%", "quantile: 100%", "out-of-range", 20, "demand.quantile"),
    ("quantile: 90%", "quantile: 99%", "out-of-range", 22, "demand.forecast.chat"),
    ("quota: 4", "quota: .inf", "not-a-number", 10, "pools[0].quota"),
    ("quota: 4", "<<: {quota: 4}", "unknown-field", 10, "pools[0].<<"),
    ("quota: 4", "quota: !!python/name:os.system 4", "wrong-type", 10, "pools[0].quota"),
    ("price: 24.0 $/h", "price: !strange 24", "wrong-type", 9, "pools[0].price"),
    ("price: 24.0 $/h", "price: 24 EUR/h", "wrong-unit", 9, "pools[0].price"),
    ("{H100: 3/s}", "1e300", "out-of-range", 15, "services[0].rate"),
    ("p50: [5, 6]", "p50: [-5, 6]", "negative", 22, "demand.forecast.chat.p50[0]"),
    ("memory: 70GiB", "regions: []", "empty", 16, "services[0].regions"),
    ("memory: 70GiB", "regions: east", "wrong-type", 16, "services[0].regions"),
    ("memory: 70GiB", "probability: 1.0", "out-of-range", 16, "services[0].probability"),
    ("cold: [97s, 2m]", "cold: 10d", "out-of-range", 18, "services[0].lead_time.cold"),
    ("version: 1", "version: " + "[" * 1000, "not-yaml", None, ""),
    ("policy:", "pools:", "repeated-field", 23, "pools"),
    ("version: 1", "version: 2", "unknown-version", 1, "version"),
    ("version: 1", "version: [1", "not-yaml", 2, ""),
]


@pytest.mark.parametrize(("old", "new", "code", "line", "where"), CASES, ids=[f"{c[1][:40]}" for c in CASES])
def test_one_error_with_line_and_field(old, new, code, line, where):
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        problem(GOOD.replace(old, new, 1))
    error = caught.value
    assert (error.code, error.line, error.field) == (code, line, where), str(error)
    assert "\n" not in str(error)
    assert "plan.yaml" in str(error)


def test_two_services_of_one_name():
    start = GOOD.index("  - name: chat")
    end = GOOD.index("demand:")
    with pytest.raises(InputError, match=r"plan\.yaml:19: services\[1\]: chat is named already on line 13") as caught:
        problem(GOOD[:end] + GOOD[start:end] + GOOD[end:])
    assert caught.value.code == "repeated-name"


@pytest.mark.parametrize("section", ["pools", "services"])
def test_empty_sections(section):
    lines = GOOD.splitlines()
    start = lines.index(f"{section}:")
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith(" "))
    with pytest.raises(InputError, match=section) as caught:
        problem("\n".join([*lines[:start], f"{section}: []", *lines[end:]]))
    assert caught.value.code == "empty"


def test_nothing_is_read_from_an_empty_or_missing_file(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    for name, code in (("empty.yaml", "empty"), ("missing.yaml", "unreadable")):
        with pytest.raises(InputError) as caught:
            load.load(tmp_path / name)
        assert caught.value.code == code


def test_an_alias_of_a_value_is_that_value():
    read = problem(GOOD.replace("price: 24.0 $/h", "price: &dear 24").replace("quota: 4", "quota: *dear"))
    assert (read.pools[0].price, read.pools[0].quota) == (24.0, 24)


def test_no_demand_needs_nothing():
    from capacity.optimize.plan import solve

    plan = solve(problem(GOOD.replace("[5, 6]", "[0, 0]").replace("[7, 8]", "[0, 0]")))
    assert plan.instances.tolist() == [[0], [0]]
    assert (plan.cost, plan.utilization) == (0.0, 1.0)


def test_aliases_do_not_blow_up():
    """Nodes are walked by what is known here, so nested anchors are never expanded."""
    bomb = "a: &a [x, x]\n" + "".join(
        f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, *{'a' if i == 0 else f'b{i - 1}'}]\n" for i in range(40)
    )
    with pytest.raises(InputError) as caught:
        problem(bomb)
    assert caught.value.code == "unknown-field"


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("97s", "duration", 97), ("1.5h", "duration", 5400), (3, "duration", 3), ("80GB", "memory", 80e9 / 2**30),
     ("0.4 $/min", "price", 24), ("15%", "fraction", 0.15), ("120/min", "rate", 2), ("1_000", "rate", 1000)],
)  # fmt: skip
def test_units(text, kind, value):
    assert units.parse(text, kind) == pytest.approx(value)


TRACE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
)


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        (TRACE + "2023-11-16 18:17:04.0319500,1,1\n", "out-of-order", 4),
        (TRACE + "2023-11-16 18:17:05,nan,1\n", "not-a-number", 4),
        (TRACE + "2023-11-16 18:17:05,-1,1\n", "negative", 4),
        (TRACE + "2023-11-16 18:17:05,many,1\n", "wrong-type", 4),
        (TRACE + "yesterday,1,1\n", "bad-time", 4),
        (TRACE + "nan,1,1\n", "not-a-number", 4),
        (TRACE + "2023-11-16 18:17:05,1\n", "bad-row", 4),
        (TRACE.splitlines()[0] + "\n", "empty", None),
        (TRACE.splitlines()[0] + "\n0,1,1\n1700000000,1,1\n", "out-of-range", None),
        ("TIMESTAMP,Tokens\n", "missing-field", 1),
        ("", "missing-field", 1),
    ],
)
def test_bad_traces(tmp_path, text, code, line):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        trace.read(path)
    assert (caught.value.code, caught.value.line) == (code, line), str(caught.value)


@pytest.mark.parametrize(
    "text", ["\ufeff" + TRACE, TRACE.replace("\n", "\r\n"), TRACE + "\n\n"], ids=["mark", "crlf", "blank"]
)
def test_traces_from_spreadsheets(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_bytes(text.encode())
    assert trace.read(path).context.tolist() == [4808, 3180]


def test_times_keep_their_seventh_digit(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    read = trace.read(path)
    assert read.at[0] == 0
    assert math.isclose(read.at[1], 0.052, abs_tol=1e-6)
    at, work = read.units(0, "tokens")
    assert work.tolist() == [4818, 3188]
    assert len(at) == 2


@pytest.mark.parametrize(
    "change", [{"price": math.nan}, {"price": -1.0}, {"memory": math.inf}, {"boot": (1.0, math.nan)}]
)
def test_a_problem_made_by_hand_has_its_numbers_checked_too(change):
    read = problem(GOOD)
    with pytest.raises(InputError, match="pool a: .* expected a number of at least 0"):
        replace(read, pools=(replace(read.pools[0], **change),))
