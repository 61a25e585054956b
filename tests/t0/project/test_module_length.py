"""Modules stay small enough to be read at once."""

from __future__ import annotations

from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
PACKAGES = ("plugin", "launchers", "lazyfs", "checkpoint", "capacity", "benchmarks")


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_no_module_is_over_500_lines(package: str) -> None:
    found = {
        str(path.relative_to(REPO)): len(path.read_bytes().splitlines()) for path in (REPO / package).rglob("*.py")
    }
    assert found and {name: lines for name, lines in found.items() if lines > 500} == {}
