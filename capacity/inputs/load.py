"""Load a `Problem` from a plan file: every value is checked, every error names its line and field.

Lead times written in the file take precedence over those read from `lead_time.from`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from capacity.errors import InputError
from capacity.inputs import lead_times
from capacity.inputs.demand import learn
from capacity.inputs.document import Field, read
from capacity.model import Demand, Forecast, Hysteresis, Policy, Pool, Problem, Quota, Service, Share

LONGEST_START = 6 * 3600.0
MOST_MEMORY = 4096.0
MOST_RATE = 1e9  # units per second
MAX_STEPS = 10_000
Named = TypeVar("Named", Pool, Service, Quota)


def load(path: Path) -> Problem:
    """Load the problem of a plan file. Raises InputError."""
    return from_field(read(path), path)


def from_field(root: Field, path: Path) -> Problem:
    """Load the problem of a parsed document; relative paths in it are relative to the folder of `path`.

    Raises InputError.
    """
    top = root.mapping(("version", "step", "pools", "services", "quotas", "demand", "policy"))
    if "version" in top and top["version"].integer() != 1:
        raise top["version"].error("unknown-version", "this program reads version 1")
    for key in ("pools", "services", "demand"):
        if key not in top:
            raise root.error("missing-field", f"{key} is missing")
    step = top["step"].quantity("duration", 1.0, 7 * 86400.0) if "step" in top else 3600.0
    pools = _named(top["pools"], _pool)
    services = _named(top["services"], lambda field: _service(field, path))
    quotas = _named(top["quotas"], lambda f: _quota(f, pools)) if "quotas" in top else ()
    regions = {pool.region for pool in pools}
    for field in top["services"].items():
        for region in field.mapping().get("regions", field).items() if "regions" in field.mapping() else ():
            _known(region, regions, "region")
        rates = field.mapping()["rate"]
        if rates.is_mapping:
            for gpu in rates.mapping().values():
                _known_key(gpu, {pool.gpu for pool in pools}, "GPU type")
    for field, service in zip(top["services"].items(), services, strict=True):
        if not any(service.fits(pool) for pool in pools):
            raise field.error(
                "no-pool",
                f"{service.name} fits no pool: {service.memory:g} GiB a GPU, in {', '.join(service.regions or ('any region',))}, "
                f"with a rate for the GPU type",
            )
    policy = _policy(top["policy"], regions) if "policy" in top else Policy()
    demand = _demand(top["demand"], services, step, path)
    return Problem(pools, services, demand, policy, quotas, step, str(path))


def _known(field: Field, names: set[str], what: str) -> None:
    if field.text() not in names:
        raise field.error("unknown-name", f"no pool has the {what} {field.text()}; known: {', '.join(sorted(names))}")


def _known_key(field: Field, names: set[str], what: str) -> None:
    key = field.path.rsplit(".", 1)[-1]
    if key not in names:
        raise field.error("unknown-name", f"no pool has the {what} {key}; known: {', '.join(sorted(names))}")


def _named(field: Field, make: Callable[[Field], Named]) -> tuple[Named, ...]:
    """Convert the members of a list. Raises InputError if two have the same name."""
    found: dict[str, tuple[Named, int]] = {}
    for item in field.items():
        made = make(item)
        if made.name in found:
            raise item.error("repeated-name", f"{made.name} is named already on line {found[made.name][1]}")
        found[made.name] = (made, item.line)
    return tuple(made for made, _ in found.values())


def _need(field: Field, entries: dict[str, Field], *keys: str) -> None:
    for key in keys:
        if key not in entries:
            raise field.error("missing-field", f"{key} is missing")


def _pool(field: Field) -> Pool:
    known = (
        "name",
        "instance",
        "gpu",
        "gpus",
        "memory",
        "region",
        "zone",
        "price",
        "quota",
        "supply",
        "held",
        "boot",
        "interruptions",
        "refused",
    )
    e = field.mapping(known)
    _need(field, e, "name", "gpu", "gpus", "memory", "region", "price")
    refused = None
    if "refused" in e:
        pair = e["refused"].mapping(("asked", "got"))
        _need(e["refused"], pair, "asked", "got")
        asked, got = pair["asked"].integer(), pair["got"].integer()
        if got > asked:
            raise pair["got"].error("out-of-range", f"got {got} of {asked} asked")
        refused = (asked, got)
    name, region = e["name"].text(), e["region"].text()
    return Pool(
        name=name,
        instance=e["instance"].text() if "instance" in e else name,
        gpu=e["gpu"].text(),
        gpus=e["gpus"].integer(1, 1024),
        memory=e["memory"].quantity("memory", 0.0, MOST_MEMORY, open_low=True),
        region=region,
        zone=e["zone"].text() if "zone" in e else region,
        price=e["price"].quantity("price", 0.0, 1e6),
        quota=e["quota"].integer() if "quota" in e else None,
        supply=e["supply"].integer() if "supply" in e else None,
        held=e["held"].integer() if "held" in e else 0,
        boot=e["boot"].samples("duration", 0.0, LONGEST_START) if "boot" in e else (0.0,),
        interruptions=e["interruptions"].quantity("rate_per_hour", 0.0, 60.0) if "interruptions" in e else 0.0,
        refused=refused,
        labelled=frozenset({"region", *({"instance", "zone"} & e.keys())}),
    )


def _service(field: Field, path: Path) -> Service:
    known = (
        "name",
        "gpus",
        "memory",
        "rate",
        "unit",
        "lead_time",
        "target_wait",
        "probability",
        "regions",
        "min",
        "max",
        "concurrency",
    )
    e = field.mapping(known)
    _need(field, e, "name", "gpus", "rate")
    rates: dict[str, float] = {}
    if e["rate"].is_mapping:
        for gpu, value in e["rate"].mapping().items():
            rates[gpu] = value.quantity("rate", 0.0, MOST_RATE, open_low=True)
        if not rates:
            raise e["rate"].error("empty", "no rate given")
    else:
        rates["*"] = e["rate"].quantity("rate", 0.0, MOST_RATE, open_low=True)
    unit = e["unit"].text() if "unit" in e else "requests"
    if unit not in ("requests", "tokens"):
        raise e["unit"].error("unknown-name", f"expected requests or tokens, found {unit}")
    name = e["name"].text()
    cold, restored = _lead_times(field, e.get("lead_time"), name, path)
    minimum = e["min"].integer() if "min" in e else 0
    maximum = e["max"].integer() if "max" in e else None
    if maximum is not None and maximum < minimum:
        raise e["max"].error("out-of-range", f"max {maximum} is below min {minimum}")
    return Service(
        name=name,
        gpus=e["gpus"].integer(1, 1024),
        rates=rates,
        cold=cold,
        restored=restored,
        memory=e["memory"].quantity("memory", 0.0, MOST_MEMORY) if "memory" in e else 0.0,
        unit=unit,
        target_wait=e["target_wait"].quantity("duration", 0.0, LONGEST_START) if "target_wait" in e else 0.0,
        probability=e["probability"].quantity("fraction", 0.0, 0.999999) if "probability" in e else 0.99,
        regions=tuple(item.text() for item in e["regions"].items()) if "regions" in e else None,
        minimum=minimum,
        maximum=maximum,
        concurrency=e["concurrency"].integer(1, 4096) if "concurrency" in e else 1,
    )


def _lead_times(
    field: Field, given: Field | None, service: str, path: Path
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the cold and restored samples, in seconds.

    Kinds missing in the file are read from measurements: those at `from`, else `$QUICKTHAW_HOME`, where the model's default
    name is the service's name.
    """
    e = {} if given is None else given.mapping(("cold", "restored", "from", "model", "engine"))
    here = field if given is None else given
    samples: dict[str, tuple[float, ...]] = {}
    for kind in ("cold", "restored"):
        if kind in e:
            samples[kind] = e[kind].samples("duration", 0.0, LONGEST_START)
    if len(samples) == 2:
        return samples["cold"], samples["restored"]
    model = e["model"].text() if "model" in e else None if "from" in e else service
    engine = e["engine"].text() if "engine" in e else None
    if "from" in e:
        here, source = e["from"], path.parent / Path(lead_times.expand(e["from"].text()))
    else:
        source = lead_times.home()
    lacking = " and ".join(kind for kind in ("cold", "restored") if kind not in samples)
    advice = f"service {service}: write the {lacking} samples here, or measure them: quickthaw bench coldstart"
    try:
        for kind, values in lead_times.read(source, model=model, engine=engine).items():
            if values:
                samples.setdefault(kind, values)
    except InputError as bad:
        more = "" if "from" in e else f"; {advice}"
        raise here.error(bad.code, f"lead times: {bad.message}{more}") from bad
    for kind in ("cold", "restored"):
        if kind not in samples:
            raise here.error("missing-field", f"{source} has no {kind} start of {model or 'any model'}; {advice}")
    return samples["cold"], samples["restored"]


def _quota(field: Field, pools: tuple[Pool, ...]) -> Quota:
    e = field.mapping(("name", "gpu", "region", "gpus"))
    _need(field, e, "gpu", "gpus")
    _known(e["gpu"], {pool.gpu for pool in pools}, "GPU type")
    if "region" in e:
        _known(e["region"], {pool.region for pool in pools}, "region")
    gpu, region = e["gpu"].text(), e["region"].text() if "region" in e else None
    name = e["name"].text() if "name" in e else f"{gpu}@{region or 'anywhere'}"
    return Quota(name, gpu, region, e["gpus"].integer())


def _policy(field: Field, regions: set[str]) -> Policy:
    known = (
        "headroom",
        "region_mix",
        "hysteresis",
        "switching_cost",
        "zone_loss",
        "max_start",
        "max_stop",
        "lead_quantile",
        "correlation",
    )
    e = field.mapping(known)
    default = Policy()
    mix: dict[str, Share] = {}
    if "region_mix" in e:
        for region, value in e["region_mix"].mapping().items():
            _known_key(value, regions, "region")
            pair = value.mapping(("min", "max"))
            least = pair["min"].quantity("fraction", 0.0, 1.0) if "min" in pair else 0.0
            most = pair["max"].quantity("fraction", 0.0, 1.0) if "max" in pair else 1.0
            if most < least:
                raise value.error("out-of-range", f"max {most:g} is below min {least:g}")
            mix[region] = Share(least, most)
        if sum(share.least for share in mix.values()) > 1 + 1e-9:
            raise e["region_mix"].error("out-of-range", "the minimum shares add up to more than 1")
    headroom = e["headroom"].quantity("fraction", 0.0, 10.0) if "headroom" in e else default.headroom
    hysteresis = default.hysteresis
    if "hysteresis" in e:
        h = e["hysteresis"].mapping(("band", "saving", "hold_down"))
        hysteresis = Hysteresis(
            h["band"].quantity("fraction", 0.0, 1.0) if "band" in h else hysteresis.band,
            h["saving"].quantity("fraction", 0.0, 1.0) if "saving" in h else hysteresis.saving,
            h["hold_down"].quantity("duration", 0.0, 86400.0) if "hold_down" in h else hysteresis.hold_down,
        )
    if hysteresis.band > headroom:
        raise e.get("hysteresis", field).error(
            "out-of-range",
            f"band {hysteresis.band:g} is over headroom {headroom:g}: demand could outgrow the plan without a reaction",
        )
    return Policy(
        headroom=headroom,
        region_mix=mix,
        hysteresis=hysteresis,
        switching_cost=e["switching_cost"].quantity("duration", 0.0, 7 * 86400.0) / 3600
        if "switching_cost" in e
        else default.switching_cost,
        zone_loss=e["zone_loss"].quantity("fraction", 0.0, 1.0) if "zone_loss" in e else default.zone_loss,
        max_start=e["max_start"].integer() if "max_start" in e else None,
        max_stop=e["max_stop"].integer() if "max_stop" in e else None,
        lead_quantile=e["lead_quantile"].quantity("fraction", 0.0, 1.0)
        if "lead_quantile" in e
        else default.lead_quantile,
        correlation=e["correlation"].quantity("fraction", 0.0, 1.0) if "correlation" in e else default.correlation,
    )


def _demand(field: Field, services: tuple[Service, ...], step: float, path: Path) -> Demand:
    e = field.mapping(("quantile", "forecast", "trace"))
    level = e["quantile"].quantity("fraction", 0.0, 0.999999) if "quantile" in e else 0.9
    names = {service.name for service in services}
    if ("forecast" in e) == ("trace" in e):
        raise field.error("missing-field", "give either a forecast or a trace to learn it from")
    if "trace" in e:
        return learn(e["trace"], services, level, step, path)
    forecasts: dict[str, Forecast] = {}
    length: int | None = None
    for name, value in e["forecast"].mapping().items():
        if name not in names:
            raise value.error("unknown-name", f"no service is named {name}; known: {', '.join(sorted(names))}")
        forecasts[name] = _forecast(value)
        if length is not None and len(forecasts[name].values[0]) != length:
            raise value.error("unequal-length", f"has {len(forecasts[name].values[0])} steps, others have {length}")
        length = len(forecasts[name].values[0])
        if level > forecasts[name].levels[-1] + 1e-9:
            raise value.error(
                "out-of-range",
                f"ends at quantile {forecasts[name].levels[-1]:g}, below demand.quantile {level:g}; add that quantile",
            )
    for service in services:
        if service.name not in forecasts:
            raise e["forecast"].error("no-demand", f"no forecast for service {service.name}")
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
