"""`make test-fast` stays fast, and keeps tests of every package: what CONTRIBUTING.md says about the mark `slow`."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.t0

T1 = Path(__file__).parents[2] / "t1"
PACKAGES = ["lazyfs", "capacity", "checkpoint", "launchers", "plugin"]


def fast_tests(source):
    """Yield the test functions that are not marked slow, neither each, nor by one of its parameters, nor by the module's pytestmark."""
    body = ast.parse(source).body
    marks = [
        ast.unparse(node.value)
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found = marks + [ast.unparse(decorator) for decorator in node.decorator_list]
            if not any("mark.slow" in mark for mark in found):
                yield node


def starts_an_engine(test):
    """Return whether a test runs a launch until its engine serves (`Rig.take`, `Rig.running`): about a second each."""
    return any(isinstance(node, ast.Attribute) and node.attr in ("take", "running") for node in ast.walk(test))


def test_a_launch_that_serves_is_slow():
    files = list((T1 / "plugin" / "launch").rglob("test_*.py"))
    assert files
    wrong = [
        f"{file.relative_to(T1)}: {test.name}"
        for file in files
        for test in fast_tests(file.read_text())
        if starts_an_engine(test)
    ]
    assert wrong == []


def test_unmarked_launches_are_found():
    source = "def test_a(rig):\n    rig.take()\n\n@pytest.mark.slow\ndef test_b(rig):\n    rig.take()\n\ndef test_c(rig):\n    rig.cli()\n"
    assert [(test.name, starts_an_engine(test)) for test in fast_tests(source)] == [("test_a", True), ("test_c", False)]
    assert list(fast_tests("pytestmark = [pytest.mark.slow]\n" + source)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_keeps_fast_tests_with_real_processes(package):
    assert any(test for file in (T1 / package).rglob("test_*.py") for test in fast_tests(file.read_text()))
