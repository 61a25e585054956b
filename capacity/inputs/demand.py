"""Learn demand from a trace: rates on a grid, a quantile forecast from them, and the history from which growth is read.

Uses only data before the moment of the forecast; the trace of a plan file is the past.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from capacity.inputs import trace as traces
from capacity.inputs.document import Field
from capacity.inputs.lead_times import expand
from capacity.model import Demand, Floats, Forecast, History, Service

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def learn(field: Field, services: tuple[Service, ...], level: float, step: float, path: Path) -> Demand:
    """Learn demand from `trace: {path, service, bin, steps}`.

    `service` names the service if the CSV has no Service column. Raises InputError.
    """
    e = field.mapping(("path", "service", "bin", "steps"))
    if "path" not in e:
        raise field.error("missing-field", "path is missing")
    source = path.parent / Path(expand(e["path"].text()))
    trace = traces.read(source)
    width = e["bin"].quantity("duration", 0.0, 3600.0, open_low=True) if "bin" in e else 10.0
    steps = e["steps"].integer(1, 1000) if "steps" in e else 1
    known = {service.name for service in services}
    names = list(trace.services)
    if names == [""]:
        only = e["service"].text() if "service" in e else (services[0].name if len(services) == 1 else "")
        if only not in known:
            raise e.get("service", field).error(
                "unknown-name", "the trace has no Service column: give the service of its requests in `service`"
            )
        names = [only]
    for name in names:
        if name not in known:
            raise e["path"].error(
                "unknown-name", f"the trace has requests of {name}, which is not a service of this file"
            )
    rows = np.zeros((len(services), max(1, int(np.ceil(trace.seconds / width)))))
    for j, service in enumerate(services):
        if service.name in names:
            at, work = trace.units(names.index(service.name), service.unit)
            rows[j] = traces.rates(at, work, width, max(trace.seconds, width))[: rows.shape[1]]
    return from_history(History(width, rows), services, level, step, steps)


def from_history(history: History, services: tuple[Service, ...], level: float, step: float, steps: int) -> Demand:
    """Return a flat forecast: the quantiles of the rates over the last step's length.

    Each rate is averaged over a bin. A shorter history is used as a whole.
    """
    bins = max(1, round(step / history.bin_seconds))
    forecasts: dict[str, Forecast] = {}
    for j, service in enumerate(services):
        recent: Floats = history.rates[j, -bins:]
        values = np.quantile(recent, LEVELS, method="higher") if recent.size else np.zeros(len(LEVELS))
        forecasts[service.name] = Forecast(LEVELS, tuple((float(v),) * steps for v in values))
    return Demand(level, forecasts, history)
