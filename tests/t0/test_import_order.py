"""The order in which folders may import each other, from docs/architecture.md: an import against it is a defect."""

import ast
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.t0

REPO = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "lazyfs": set(),
    "capacity": set(),
    "checkpoint": {"lazyfs"},
    "launchers": {"checkpoint"},
    "plugin": {"lazyfs", "capacity", "checkpoint", "launchers"},
}


def imports(file):
    """Every module that a file imports absolutely, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_lies_below_it(package):
    files = list((REPO / package).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(REPO)} imports {module}"
        for file in files
        for module in imports(file)
        if module.split(".")[0] in MAY_IMPORT.keys() - MAY_IMPORT[package] - {package}
    ]
    assert wrong == []


def test_what_runs_inside_an_engine_imports_the_standard_library_and_the_engine_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "vllm", "sglang"}
    wrong = [
        f"{file.name} imports {module}"
        for file in (REPO / "plugin" / "engine").glob("*.py")
        for module in imports(file)
        if module.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_process_one_of_a_sandbox_imports_the_standard_library_only():
    allowed = set(sys.stdlib_module_names)
    assert [m for m in imports(REPO / "checkpoint" / "sandbox" / "init.py") if m.split(".")[0] not in allowed] == []


def test_the_proxy_knows_nothing_of_engines_and_snapshots():
    wrong = [
        f"{file.name} imports {module}"
        for file in (REPO / "plugin" / "proxy").rglob("*.py")
        for module in imports(file)
        if module.split(".")[0] in ("checkpoint", "launchers", "lazyfs", "capacity")
    ]
    assert wrong == []
