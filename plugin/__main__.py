"""`quickthaw …` and `python -m plugin …`: start helpers for a restoring command, then run the command line."""

from __future__ import annotations

import sys

from plugin.startup import pid1


def main() -> None:
    """Run the console script."""
    if sys.argv[1:2] in (["launch"], ["restore"]):
        pid1.begin(sys.argv[1:])
    from plugin.cli import run  # imports click, which a restore need not wait for

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
