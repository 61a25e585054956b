"""Measure what it costs to have an engine back.

    python benchmarks/standby.py rehearsal [--engine sglang|vllm] [--runs 3] [--json]

`rehearsal` (benchmarks/rehearsal.py): the first restore after a rehearsal, and the requests beside one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

from benchmarks.rehearsal import rehearsal  # noqa: E402


@click.group(help=__doc__)
def main() -> None:
    """Run one of the commands."""


main.add_command(rehearsal)

if __name__ == "__main__":
    sys.exit(main(standalone_mode=False))
