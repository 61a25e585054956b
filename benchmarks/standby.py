"""Measure what it costs to have an engine back.

    python benchmarks/standby.py rehearsal [--engine sglang|vllm] [--runs 3] [--json]
    python benchmarks/standby.py wake [--engine sglang|vllm] [--runs 10]
    python benchmarks/standby.py switch [--engine sglang|vllm] [--switches 50] [--starts 2] [--home FOLDER]
    python benchmarks/standby.py first-requests [--engine sglang|vllm] [--runs 5] [--batch 64] [--json]
    python benchmarks/standby.py pulled [--engine sglang|vllm] [--runs 3] [--later 3]

`rehearsal` (benchmarks/rehearsal.py): the first restore after a rehearsal, and the requests beside one.
`wake`, `switch` (benchmarks/switching.py): from standby to the first token; two models behind one port.
`first-requests`, `pulled` (benchmarks/first_requests.py): the requests just after a restore by their place, and a batch that waits for one;
the first restore of a pulled snapshot.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

from benchmarks.first_requests import first_requests, pulled  # noqa: E402
from benchmarks.rehearsal import rehearsal  # noqa: E402
from benchmarks.switching import switch, wake  # noqa: E402
from plugin.runtime.signals import unwind  # noqa: E402


@click.group(help=__doc__)
def main() -> None:
    """Run one of the commands."""
    unwind()


main.add_command(rehearsal)
main.add_command(wake)
main.add_command(switch)
main.add_command(first_requests)
main.add_command(pulled)

if __name__ == "__main__":
    sys.exit(main(standalone_mode=False))
