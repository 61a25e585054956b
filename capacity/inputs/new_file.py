"""Write a first plan file, with comments, from flags, answers, prices, measured lead times and a trace.

What is missing is asked for in a terminal; elsewhere one error names all of it.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

import yaml

from capacity.errors import Errors, InputError, Value
from capacity.files import replacing
from capacity.inputs import document, lead_times, prices
from capacity.inputs.load import from_field
from capacity.inputs.prices import Offer
from capacity.inputs.units import duration_text, parse
from capacity.model import KINDS, Problem

Ask = Callable[[str, str | None], str | None]
"""Asks a question with a default; returns the answer, or None where there is nobody to ask."""
Words = dict[str, str]

MODEL = ("name", "gpus", "rate", "wait", "unit", "memory", "cold", "restored", "demand", "peak")
GPU = ("instance", "gpus", "memory", "price", "boot", "quota", "region", "zone")


@dataclass(frozen=True)
class Answers:
    """What was given by flags. A model and a GPU are their own name under "", then the words of `MODEL` and `GPU`."""

    models: list[Words]
    gpus: list[Words]
    regions: tuple[str, ...] = ()
    prices: Path | None = None
    trace: Path | None = None
    step: str = "1h"
    steps: int = 24


def words(text: str, known: tuple[str, ...], option: str) -> Words:
    """Parse `NAME,key=value,…`. Raises InputError for an unknown key."""
    first, *rest = (part.strip() for part in text.split(","))
    found = {"": first}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise InputError("unknown-field", f"{part!r}; known: {', '.join(f'{k}=…' for k in known)}", where=option)
        found[key] = value
    return found


class _Missing:
    """Asks for what is missing, and keeps what nobody answered."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.errors = Errors()

    def want(self, entry: Words, key: str, question: str, option: str, kind: str, default: str | None = None) -> None:
        """Fill in a key of an entry. `kind`: its unit (units.py), "count" or "word"; a wrong answer is an error."""
        if key not in entry:
            answer = self.ask(question, default)
            if answer is None and default is None:
                self.lacks(option, f"{question}?")
                return
            entry[key] = answer if answer is not None else str(default)
        if kind == "count":
            if not entry[key].isdecimal() or int(entry[key]) < 1:
                self.errors.found.append(
                    InputError("wrong-type", f"expected a count, found {entry[key]!r}", where=option)
                )
        elif kind != "word":
            for part in re.split(r"\s+", entry[key].strip()):
                bad = Errors()
                bad.read(parse, part, kind)
                self.errors.found += [InputError(e.code, e.message, where=option) for e in bad.found]

    def lacks(self, option: str, message: str) -> None:
        self.errors.found.append(InputError("missing-option", message, where=option))


def compose(path: Path, given: Answers, ask: Ask) -> tuple[str, Problem]:
    """Return the text of a plan file and the problem it states. Raises InputError with all that is missing or wrong."""
    missing = _Missing(ask)
    offers = prices.offers(given.prices)
    models = given.models or _several(ask, "A model, as it is launched (path or hub name)")
    if not models:
        missing.lacks("--model", "which model, such as /models/llama-8b,gpus=1,rate=3.5/s?")
    for model in models:  # first, for which instances can hold a replica
        missing.want(model, "gpus", f"{model['']}: GPUs of a replica", f"--model {model['']},gpus=…", "count")
    known = ", ".join(dict.fromkeys(offer.gpu for offer in offers))
    machines = given.gpus or _several(ask, f"A GPU or instance type ({known}, …)")
    if not machines:
        missing.lacks(
            "--gpu", f"which GPU or instance type, such as {offers[0].gpu},boot=180s? Prices are known of {known}"
        )
    largest = max((int(m["gpus"]) for m in models if m.get("gpus", "").isdecimal()), default=1)
    pools = [text for machine in machines for text in _pools(machine, given.regions, offers, largest, missing)]
    trace = given.trace
    if trace is None and not all("demand" in model for model in models):
        answer = ask(
            "A CSV of requests (TIMESTAMP, ContextTokens, GeneratedTokens, and Service of several models); empty: none",
            "",
        )
        trace = Path(answer) if answer else None
    services = [_service(model, trace, missing) for model in models]
    missing.errors.check()
    text = _HEAD.format(name=path.name, step=given.step)
    text += "".join(pools) + "\nservices:\n" + "".join(services) + _demand(models, path, trace, given.steps) + _POLICY
    return text, from_field(document.parse_text(text, str(path)), path)


def _several(ask: Ask, question: str) -> list[Words]:
    """Ask for names until an empty answer."""
    found: list[Words] = []
    while answer := ask(question + ("; empty: no more" if found else ""), "" if found else None):
        found.append({"": answer})
    return found


def _word(text: str) -> str:
    """Return text as a YAML scalar."""
    return str(yaml.safe_dump(text, width=10_000).removesuffix("...\n").strip())


def _times(text: str) -> str:
    return "[" + ", ".join(text.split()) + "]"


def _near(named: str, offers: list[Offer]) -> str:
    """Return which GPU and instance types a name may mean, as the end of a question; "" if none is like it."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    known = dict.fromkeys(name for offer in offers for name in (offer.gpu, offer.instance))
    wanted = plain(named)
    found = [name for name in known if wanted and (wanted in plain(name) or plain(name) in wanted)]
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _pools(machine: Words, regions: tuple[str, ...], offers: list[Offer], largest: int, missing: _Missing) -> list[str]:
    """Return the pools of one GPU or instance type, such as `H100` or `8xH100`: one in each region, of each instance on offer.

    Instances with fewer GPUs than the largest replica has are left out where others are on offer.
    """
    named = machine[""]
    count = re.fullmatch(r"(\d+)x(.+)", named)
    machine = {"gpus": count[1]} | machine if count else dict(machine)
    gpu = count[2] if count else named
    able = [o for o in offers if named == o.instance or gpu == o.gpu]
    able = [o for o in able if machine.get("instance", o.instance) == o.instance]
    if "gpus" in machine:
        able = [o for o in able if str(o.gpus) == machine["gpus"]]
    able = [o for o in able if o.gpus >= largest] or able
    near = "" if able else _near(gpu, offers)
    found = []
    for region in (machine.get("region"),) if "region" in machine else regions or ("",):
        here: list[Offer | None] = [o for o in able if o.region in ("", region)]
        for offer in here[: 1 if "price" in machine else None] or [None]:
            own = dict(machine)
            if offer is not None:
                own = {"instance": offer.instance, "gpus": str(offer.gpus), "price": f"{offer.price:g}"} | own
                own = ({"memory": f"{offer.memory:g}GiB"} if offer.memory else {}) | own
            option = f"--gpu {named}"
            missing.want(own, "gpus", f"{named}: GPUs of an instance{near}", option + ",gpus=…", "count")
            missing.want(own, "price", f"{named}: price of an instance, $/h{near}", option + ",price=…", "price")
            question = f"{named}: how long an instance takes until a container can start (times, separated by spaces)"
            missing.want(own, "boot", question, option + ",boot=…", "duration")
            answered = ("boot",) if offer is not None else ("gpus", "price", "boot")
            machine |= {key: own[key] for key in answered if key in own}
            found.append(_pool(own, named, gpu if offer is None else offer.gpu, region or "", offer))
    return found


def _pool(own: Words, named: str, gpu: str, region: str, offer: Offer | None) -> str:
    """Return the entry of one pool."""
    name = "-".join(part for part in (own.get("instance", named).lower(), region, own.get("zone")) if part)
    priced = f"  # {offer.source}" if offer is not None and own.get("price") == f"{offer.price:g}" else ""
    lines = [f"  - name: {_word(name)}"]
    lines += [f"    instance: {_word(own['instance'])}  # the nodes' label, for --emit"] if "instance" in own else []
    lines += [f"    gpu: {_word(gpu)}", f"    gpus: {own.get('gpus')}"]
    lines += [f"    memory: {own['memory']}  # a GPU"] if "memory" in own else []
    lines += [f"    region: {_word(region)}"] if region else []
    lines += [f"    zone: {_word(own['zone'])}"] if "zone" in own else []
    lines += [f"    price: {own.get('price')} $/h{priced}".replace(" $/h $/h", " $/h")]
    lines += [f"    boot: {_times(own.get('boot', ''))}  # samples; the {0.9:.0%} quantile counts"]
    lines += [f"    quota: {own['quota']}  # instances" if "quota" in own else "    # quota: 4  # instances"]
    return "\n".join([*lines, "    held: 0  # instances now"]) + "\n"


def _measured(reader: Callable[..., Value], model: str) -> tuple[Value | None, str]:
    """Return what was measured on this host of a model; or None, and what is wrong with its file if it is there."""
    try:
        return reader(lead_times.home(), model=model), ""
    except InputError as bad:
        nothing = bad.code == "no-samples" or isinstance(bad.__cause__, FileNotFoundError)
        return None, "" if nothing else bad.message


def _service(model: Words, trace: Path | None, missing: _Missing) -> str:
    """Return the entry of one model."""
    path = model[""]
    option = f"--model {path}"
    model.setdefault("name", PurePath(path).name)
    missing.want(
        model, "rate", f"{path}: what a replica serves at full load, such as 3.5/s", option + ",rate=…", "rate"
    )
    missing.want(model, "wait", f"{path}: how long a request may wait", option + ",wait=…", "duration", "5s")
    if trace is None:
        unit = model.get("unit", "requests")
        missing.want(model, "demand", f"{path}: {unit} a second to expect", option + ",demand=…  or --trace", "rate")
        if "demand" in model:
            missing.want(
                model, "peak", f"{path}: {unit} a second at busy times (9 of 10 are below)", option + ",peak=…", "rate"
            )
    samples, measured = {}, {}
    found, damage = _measured(lead_times.read, path) if not {*KINDS} <= model.keys() else (None, "")
    for kind in KINDS:
        if kind not in model and found and found.get(kind):
            measured[kind] = f"{len(found[kind])} {kind}, median {duration_text(statistics.median(found[kind]))}"
            continue
        question = f"{path}: seconds of {kind} starts; {damage or 'none was measured here (quickthaw bench coldstart)'}"
        missing.want(model, kind, question, f"{option},{kind}=…", "duration")
        samples[kind] = _times(model.get(kind, ""))
    lead = ", ".join(
        [f"{kind}: {text}" for kind, text in samples.items()] + ([f"model: {_word(path)}"] if measured else [])
    )
    note = f"  # measured on this host: {'; '.join(measured.values())}" if measured else ""
    lines = [f"  - name: {_word(model['name'])}", f"    gpus: {model.get('gpus')}  # a replica"]
    lines += [f"    rate: {model.get('rate')}  # of a replica at full load; by GPU type: {{H100: 14/s, L40S: 5/s}}"]
    lines += [f"    unit: {model['unit']}"] if "unit" in model else []
    lines += [f"    memory: {model['memory']}  # a GPU"] if "memory" in model else []
    lines += [
        f"    target_wait: {model.get('wait')}",
        "    probability: 0.99  # of not waiting longer",
        f"    lead_time: {{{lead}}}{note}",
    ]
    wakes, damage = _measured(lead_times.wakes, path)
    lines += [f"    standby: {{}}  # measured on this host: {len(wakes[0])} wakes; for simulate"] if wakes else []
    lines += [f"    # standby: {{}}  # not read: {' '.join(damage.split())}"] if damage else []
    return "\n".join(lines) + "\n"


def _demand(models: list[Words], path: Path, trace: Path | None, steps: int) -> str:
    text = "\ndemand:\n  quantile: 0.9  # of demand that is served without a wait\n"
    if trace is not None:
        where = os.path.relpath(trace.absolute(), path.absolute().parent)
        named = (
            f"\n    service: {_word(models[0]['name'])}  # of a trace without a Service column"
            if len(models) == 1
            else ""
        )
        return text + (
            f"  trace:\n    path: {_word(where)}{named}\n    steps: {steps}\n"
            "    # start: now  # time of the first step; default: where the trace ends\n"
            "    # bin: 15s  # default: a request's service time and target wait\n"
        )
    rows = "".join(f"    {_word(m['name'])}: {{0.5: [{m['demand']}], 0.9: [{m['peak']}]}}\n" for m in models)
    return text + "  forecast:  # a number for each step\n" + rows


def write(path: Path, text: str) -> None:
    """Write the file. Raises InputError (cannot-write)."""
    try:
        with replacing(path) as file:
            file.write(text)
    except OSError as bad:
        raise InputError("cannot-write", f"{bad.strerror}", file=str(path)) from bad


_HEAD = """\
# quickthaw plan {name}
# All fields: docs/capacity.md. Units are written out: 97s, 80GiB, 24 $/h, 10%.
version: 1
step: {step}

pools:
"""
_POLICY = """
policy:
  headroom: 10%  # over the quantile
  zone_loss: 0  # share of the expected demand that is served when a zone is lost
"""
