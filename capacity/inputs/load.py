"""Load a `Problem` from a plan file: every value is checked, every error names its line and field.

Each section has a table of its fields and their readers; a field that is left out has the default of its class in `model.py`.
Lead times written in the file take precedence over those read from `lead_time.from`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from capacity.errors import Errors, InputError
from capacity.inputs import lead_times
from capacity.inputs.demand import learn
from capacity.inputs.document import Field, Reader, integer, quantity, read
from capacity.model import KINDS, Demand, Forecast, Hysteresis, Policy, Pool, Problem, Quota, Service, Share, Workload

LONGEST_START = 6 * 3600.0
MOST_MEMORY = 4096.0
MOST_RATE = 1e9  # units per second
MAX_STEPS = 10_000
Named = TypeVar("Named", Pool, Service, Quota)


_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_WORKLOAD = re.compile(
    rf"k8s://(?P<namespace>{_LABEL})/(?:(?P<kind>deployment|statefulset)/)?(?P<name>{_LABEL}(?:\.{_LABEL})*)(?::\d+)?/?"
)


def _starts(field: Field) -> tuple[float, ...]:
    return field.samples("duration", 0.0, LONGEST_START)


_rate = quantity("rate", 0.0, MOST_RATE, open_low=True)
_share = quantity("fraction", 0.0, 1.0)

POOL = {
    "name": Field.text,
    "instance": Field.text,
    "gpu": Field.text,
    "gpus": integer(1, 1024),
    "memory": quantity("memory", 0.0, MOST_MEMORY, open_low=True),
    "region": Field.text,
    "zone": Field.text,
    "price": quantity("price", 0.0, 1e6),
    "quota": integer(),
    "supply": integer(),
    "held": integer(),
    "boot": _starts,
    "interruptions": quantity("rate_per_hour", 0.0, 60.0),
    "host_memory": quantity("memory", 0.0, 2**20, open_low=True),
    "refused": lambda field: _refused(field),
}
LEAD_TIME: dict[str, Reader] = {
    "cold": _starts,
    "restored": _starts,
    "from": Field.text,
    "model": Field.text,
    "engine": Field.text,
}
POLICY = {
    "headroom": quantity("fraction", 0.0, 10.0),
    "switching_cost": lambda field: field.quantity("duration", 0.0, 7 * 86400.0) / 3600,
    "zone_loss": _share,
    "max_start": integer(),
    "max_stop": integer(),
    "lead_quantile": _share,
    "correlation": _share,
    "hysteresis": lambda field: Hysteresis(
        **field.record({"band": _share, "saving": _share, "hold_down": quantity("duration", 0.0, 86400.0)})
    ),
}


def load(path: Path) -> Problem:
    """Load the problem of a plan file. Raises InputError."""
    return from_field(read(path), path)


def from_field(root: Field, path: Path) -> Problem:
    """Load the problem of a parsed document; relative paths in it are relative to the folder of `path`.

    Raises InputError.
    """
    errors = Errors()
    top = root.entries(("version", "step", "pools", "services", "quotas", "demand", "policy"), errors)
    if "version" in top and top["version"].integer() != 1:
        raise top["version"].error("unknown-version", "this program reads version 1")
    for key in ("pools", "services", "demand"):
        if key not in top:
            errors.found.append(root.error("missing-field", f"{key} is missing"))
    step = errors.read(quantity("duration", 1.0, 7 * 86400.0), top["step"]) if "step" in top else 3600.0
    pools = errors.read(_named, top["pools"], _pool) if "pools" in top else None
    make = functools.partial(_service, pools=pools, path=path)
    services = errors.read(_named, top["services"], make) if "services" in top else None
    quotas = errors.read(_named, top["quotas"], lambda field: _quota(field, pools)) if "quotas" in top else ()
    policy = errors.read(_policy, top["policy"], pools) if "policy" in top else Policy()
    if pools and services:
        errors.read(_asked, top["pools"], pools, services, quotas or (), policy or Policy())
    demand = None
    if "demand" in top:
        demand = errors.read(_demand, top["demand"], services, pools, step, path)
    errors.check()
    assert pools and services and demand and policy and step and quotas is not None  # else an error was found
    return Problem(pools, services, demand, policy, quotas, step, str(path))


def _asked(
    field: Field, pools: tuple[Pool, ...], services: tuple[Service, ...], quotas: tuple[Quota, ...], policy: Policy
) -> None:
    """Raise InputError for pools without the memory or region that another part of the file asks for."""
    errors = Errors()
    heavy = next((s for s in services if s.memory), None)
    regional = [f"service {s.name} names its regions" for s in services if s.regions is not None]
    regional += [f"quota {q.name} is of a region" for q in quotas if q.region is not None]
    regional += ["policy.region_mix names regions"] if policy.region_mix else []
    for item, pool in zip(field.items(), pools, strict=True):
        if heavy and not pool.memory:
            text = f"memory is missing: service {heavy.name} needs {heavy.memory:g} GiB a GPU"
            errors.found.append(item.error("missing-field", text))
        if regional and not pool.region:
            errors.found.append(item.error("missing-field", f"region is missing: {regional[0]}"))
    errors.check()


def _known(field: Field, name: str, known: set[str], what: str) -> str:
    """Return the name; without known ones, because the pools have errors of their own, any name is accepted."""
    if known and name not in known:
        raise field.error("unknown-name", f"no pool has the {what} {name}; known: {', '.join(sorted(known))}")
    return name


def _region_in(pools: tuple[Pool, ...] | None) -> Callable[[Field], str]:
    return lambda field: _known(field, field.text(), _regions(pools), "region")


def _regions(pools: tuple[Pool, ...] | None) -> set[str]:
    return {pool.region for pool in pools or ()} - {""}


def _named(field: Field, make: Callable[[Field], Named]) -> tuple[Named, ...]:
    """Convert the members of a list. Raises InputError with the errors of all, also if two have the same name."""
    found: dict[str, tuple[Named, int]] = {}
    errors = Errors()
    for item in field.items():
        made = errors.read(make, item)
        if made is not None and made.name in found:
            text = f"{made.name} is named already on line {found[made.name][1]}"
            errors.found.append(item.error("repeated-name", text))
        elif made is not None:
            found[made.name] = (made, item.line)
    errors.check()
    return tuple(made for made, _ in found.values())


def _refused(field: Field) -> tuple[int, int]:
    pair = field.record({"asked": integer(), "got": integer()}, "asked", "got")
    if pair["got"] > pair["asked"]:
        raise field.mapping()["got"].error("out-of-range", f"got {pair['got']} of {pair['asked']} asked")
    return pair["asked"], pair["got"]


def _pool(field: Field) -> Pool:
    given = field.record(POOL, "name", "gpu", "gpus", "price", "boot")
    region = given.get("region", "")
    filled = {"instance": f"{given['gpus']}x{given['gpu']}", "memory": 0.0, "region": region, "zone": region} | given
    return Pool(**filled, labelled=frozenset({"instance", "region", "zone"} & given.keys()))


def _service(field: Field, *, pools: tuple[Pool, ...] | None, path: Path) -> Service:
    def rates(value: Field) -> dict[str, float]:
        if not value.is_mapping:
            return {"*": _rate(value)}
        types = {pool.gpu for pool in pools or ()}
        found = {_known(each, gpu, types, "GPU type"): _rate(each) for gpu, each in value.mapping().items()}
        if not found:
            raise value.error("empty", "no rate given")
        return found

    def unit(value: Field) -> str:
        if value.text() not in ("requests", "tokens"):
            raise value.error("unknown-name", f"expected requests or tokens, found {value.text()}")
        return value.text()

    readers: dict[str, Callable[[Field], Any]] = {
        "name": Field.text,
        "gpus": integer(1, 1024),
        "memory": quantity("memory", 0.0, MOST_MEMORY),
        "rate": rates,
        "unit": unit,
        "lead_time": lambda value: value,
        "target_wait": quantity("duration", 0.0, LONGEST_START),
        "probability": quantity("fraction", 0.0, 0.999999),
        "regions": lambda value: tuple(map(_region_in(pools), value.items())),
        "min": integer(),
        "max": integer(),
        "concurrency": integer(1, 4096),
        "standby": lambda value: value,
        "workload": _workload,
    }
    errors = Errors()
    given = errors.read(field.record, readers, "name", "gpus", "rate")
    entries = field.entries(None, Errors())
    samples = None
    if "name" in entries:
        samples = errors.read(_lead_times, field, entries.get("lead_time"), str(entries["name"].node.value), path)
    errors.check()
    assert given and samples  # else an error was found
    lead = given.pop("lead_time", None)
    given["cold"], given["restored"] = samples
    if "standby" in given:
        given["standby"], given["standby_memory"] = _standby(given["standby"], lead, given["name"], path)
    for key, attribute in (("rate", "rates"), ("min", "minimum"), ("max", "maximum")):
        if key in given:
            given[attribute] = given.pop(key)
    service = Service(**given)
    if service.maximum is not None and service.maximum < service.minimum:
        raise field.mapping()["max"].error("out-of-range", f"max {service.maximum} is below min {service.minimum}")
    if pools and all(pool.memory for pool in pools) and not any(service.fits(pool) for pool in pools):
        raise field.error("no-pool", service.no_pool())
    return service


def _workload(field: Field) -> Workload:
    """Return the workload of an address as `quickthaw proxy --upstream` takes it; its port is not used."""
    found = _WORKLOAD.fullmatch(field.text())
    if found is None:
        forms = "k8s://NAMESPACE/DEPLOYMENT or k8s://NAMESPACE/statefulset/NAME"
        raise field.error("not-a-workload", f"{field.text()!r} names no workload of a cluster: give {forms}")
    return Workload(found["namespace"], found["kind"] or "deployment", found["name"])


def _lead_times(
    field: Field, given: Field | None, service: str, path: Path
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the cold and restored samples, in seconds.

    Kinds missing in the file are read from measurements: those at `from`, else `$QUICKTHAW_HOME`, where the model's default
    name is the service's name.
    """
    here = field if given is None else given
    e = {} if given is None else given.record(LEAD_TIME)
    samples: dict[str, tuple[float, ...]] = {kind: e[kind] for kind in KINDS if kind in e}
    if len(samples) < len(KINDS):
        model, source = e.get("model"), lead_times.home()
        if given is not None and "from" in e:
            here, source = given.mapping()["from"], path.parent / Path(lead_times.expand(e["from"]))
        else:
            model = model or service
        lacking = " and ".join(kind for kind in KINDS if kind not in samples)
        advice = f"service {service}: write the {lacking} samples here, or measure them: quickthaw bench coldstart"
        try:
            read_there = lead_times.read(source, model=model, engine=e.get("engine"))
        except InputError as bad:
            more = "" if "from" in e else f"; {advice}"
            raise here.error(bad.code, f"lead times: {bad.message}{more}") from bad
        samples = {kind: values for kind, values in read_there.items() if values} | samples
        for kind in KINDS:
            if kind not in samples:
                raise here.error("missing-field", f"{source} has no {kind} start of {model or 'any model'}; {advice}")
    return samples["cold"], samples["restored"]


def _standby(field: Field, lead: Field | None, service: str, path: Path) -> tuple[tuple[float, ...], float]:
    """Return the wake times from standby and the host memory of a replica in it, as given or as measured on this host."""
    given = field.record({"wake": _starts, "memory": quantity("memory", 0.0, 2**20), "from": Field.text})
    if {"wake", "memory"} <= given.keys():
        return given["wake"], given["memory"]
    e = {} if lead is None else lead.record(LEAD_TIME)
    source = path.parent / Path(lead_times.expand(given["from"])) if "from" in given else lead_times.home()
    try:
        wake, memory = lead_times.wakes(source, model=e.get("model", service), engine=e.get("engine"))
    except InputError as bad:
        text = f"wake times: {bad.message}; write wake and memory here, or measure them: quickthaw launch --standby-after 1m"
        raise field.error(bad.code, text) from bad
    return given.get("wake", wake), given.get("memory", memory)


def _quota(field: Field, pools: tuple[Pool, ...] | None) -> Quota:
    def gpu(value: Field) -> str:
        return _known(value, value.text(), {pool.gpu for pool in pools or ()}, "GPU type")

    readers = {"name": Field.text, "gpu": gpu, "region": _region_in(pools), "gpus": integer()}
    given = field.record(readers, "gpu", "gpus")
    return Quota(**{"name": f"{given['gpu']}@{given.get('region', 'anywhere')}", "region": None} | given)


def _policy(field: Field, pools: tuple[Pool, ...] | None) -> Policy:
    def mix(value: Field) -> dict[str, Share]:
        regions = _regions(pools)
        found = {_known(each, name, regions, "region"): _region_share(each) for name, each in value.mapping().items()}
        if sum(share.least for share in found.values()) > 1 + 1e-9:
            raise value.error("out-of-range", "the minimum shares add up to more than 1")
        return found

    policy = Policy(**field.record({**POLICY, "region_mix": mix}))
    if policy.hysteresis.band > policy.headroom:
        where = field.mapping().get("hysteresis", field)
        raise where.error(
            "out-of-range",
            f"band {policy.hysteresis.band:g} is over headroom {policy.headroom:g}: demand could outgrow the plan without a reaction",
        )
    return policy


def _region_share(field: Field) -> Share:
    pair = field.record({"min": _share, "max": _share})
    share = Share(pair.get("min", 0.0), pair.get("max", 1.0))
    if share.most < share.least:
        raise field.error("out-of-range", f"max {share.most:g} is below min {share.least:g}")
    return share


def _demand(
    field: Field, services: tuple[Service, ...] | None, pools: tuple[Pool, ...] | None, step: float | None, path: Path
) -> Demand | None:
    """Return the demand; None if it cannot be learned because services, pools or step have errors of their own."""
    e = field.mapping(("quantile", "forecast", "trace"))
    level = e["quantile"].quantity("fraction", 0.0, 0.999999) if "quantile" in e else 0.9
    if ("forecast" in e) == ("trace" in e):
        raise field.error("missing-field", "give either a forecast or a trace to learn it from")
    if "trace" in e:
        return learn(e["trace"], services, pools, level, step, path) if services and pools and step else None
    names = [service.name for service in services or ()]
    forecasts: dict[str, Forecast] = {}
    errors = Errors()
    for name, value in e["forecast"].entries(None, errors).items():
        if names and name not in names:
            text = f"no service is named {name}; known: {', '.join(sorted(names))}"
            errors.found.append(value.error("unknown-name", text))
            continue
        forecast = errors.read(_forecast, value)
        if forecast is None:
            continue
        forecasts[name] = forecast
        if len(forecast.values[0]) != len(next(iter(forecasts.values())).values[0]):
            text = f"has {len(forecast.values[0])} steps, others have a different number"
            errors.found.append(value.error("unequal-length", text))
        if level > forecast.levels[-1] + 1e-9:
            text = f"ends at quantile {forecast.levels[-1]:g}, below demand.quantile {level:g}; add that quantile"
            errors.found.append(value.error("out-of-range", text))
    if not errors.found:
        for name in names:
            if name not in forecasts:
                errors.found.append(e["forecast"].error("no-demand", f"no forecast for service {name}"))
    errors.check()
    return Demand(level, forecasts)


def _forecast(field: Field) -> Forecast:
    rows: list[tuple[float, tuple[float, ...], Field]] = []
    for key, value in field.mapping().items():
        try:
            level = float(key.removeprefix("p")) / (100 if key.startswith("p") else 1)
        except ValueError:
            level = math.nan
        if not 0 < level < 1:
            raise value.error(
                "out-of-range", f"a quantile is a fraction such as 0.9 or a percentile such as p90, found {key}"
            )
        rows.append((level, value.samples("rate", 0.0, MOST_RATE), value))
    if len(rows) < 2:
        raise field.error(
            "too-few", "give at least two quantiles, such as 0.5 and 0.9: their distance is the uncertainty"
        )
    rows.sort(key=lambda row: row[0])
    for (low, below, _), (high, above, where) in pairwise(rows):
        if low == high:
            raise where.error("repeated-field", f"the quantile {low:g} is given twice")
        if len(below) != len(above):
            raise where.error("unequal-length", f"has {len(above)} steps, {low:g} has {len(below)}")
        for t, (a, b) in enumerate(zip(below, above, strict=True)):
            if b < a:
                raise where.error("out-of-order", f"step {t + 1}: quantile {high:g} ({b:g}) lies below {low:g} ({a:g})")
    if len(rows[0][1]) > MAX_STEPS:
        raise field.error("too-large", f"over {MAX_STEPS} steps")
    return Forecast(tuple(level for level, _, _ in rows), tuple(values for _, values, _ in rows))
