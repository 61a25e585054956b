"""List prices of GPU instances: a CSV of one's own, or a built-in table of one cloud on one day."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from capacity.errors import Errors, InputError
from capacity.files import read_text
from capacity.inputs.units import parse

MAX_BYTES = 4 * 1024 * 1024
# From the list of github.com/tsaol/aws-gpu at 77fcd9f, which takes AWS' prices from instances.vantage.sh. `init` prints
# this beside each price that it takes from the table.
SOURCE = "AWS on demand, us-east-1, as instances.vantage.sh had it on 2026-01-21; give yours by --prices"
_TABLE = """\
instance,gpu,gpus,memory,price
p6-b200.48xlarge,B200,8,179GiB,113.9328
p5en.48xlarge,H200,8,141GiB,63.296
p5.48xlarge,H100,8,80GiB,55.04
p4de.24xlarge,A100-80GB,8,80GiB,27.44705
p4d.24xlarge,A100-40GB,8,40GiB,21.957642
g6e.48xlarge,L40S,8,48GiB,30.13118
g6e.12xlarge,L40S,4,48GiB,10.49264
g6e.xlarge,L40S,1,48GiB,1.861
g6.12xlarge,L4,4,24GiB,4.6016
g6.xlarge,L4,1,24GiB,0.8048
g5.12xlarge,A10G,4,24GiB,5.672
g5.xlarge,A10G,1,24GiB,1.006
"""


@dataclass(frozen=True)
class Offer:
    """An instance type at a price in dollars an hour. `memory`: GiB a GPU, 0 if unknown; `region`: "" if for all."""

    instance: str
    gpu: str
    gpus: int
    price: float
    memory: float
    region: str
    source: str


def offers(path: Path | None) -> list[Offer]:
    """Return the offers of a CSV with the columns instance, gpu, gpus, price, and memory and region if wanted.

    Without a path: the built-in table. Raises InputError with all lines that are wrong.
    """
    if path is None:
        text, name, source = _TABLE, "the built-in prices", SOURCE
    else:
        text, name, source = read_text(path, MAX_BYTES), str(path), path.name
    rows = csv.DictReader(text.splitlines())
    lacking = {"instance", "gpu", "gpus", "price"} - {str(column).strip().lower() for column in rows.fieldnames or ()}
    if lacking:
        raise InputError("missing-field", f"no column {', '.join(sorted(lacking))}", file=name, line=1)
    errors, found = Errors(), []
    for row in rows:
        made = errors.read(_offer, row, name, rows.line_num, source)
        found += [] if made is None else [made]
    errors.check()
    return found


def _offer(row: dict[str, str], file: str, line: int, source: str) -> Offer:
    given = {str(key).strip().lower(): str(value or "").strip() for key, value in row.items()}
    try:
        gpus, price = int(given["gpus"]), parse(given["price"], "price")
        memory = parse(given["memory"], "memory") if given.get("memory") else 0.0
    except (ValueError, InputError) as bad:
        raise InputError("wrong-type", getattr(bad, "message", str(bad)), file=file, line=line) from bad
    if gpus < 1 or price < 0 or not given["instance"] or not given["gpu"]:
        raise InputError(
            "out-of-range", "an instance needs a name, a GPU, at least one of it, and a price", file=file, line=line
        )
    return Offer(given["instance"], given["gpu"], gpus, price, memory, given.get("region", ""), source)
