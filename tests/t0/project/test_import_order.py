"""The order in which folders may import each other, from docs/architecture.md."""

import ast
import functools
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.t0

REPO = Path(__file__).resolve().parents[3]
MAY_IMPORT = {
    "lazyfs": set(),
    "capacity": set(),
    "checkpoint": {"lazyfs"},
    "launchers": {"checkpoint"},
    "plugin": {"lazyfs", "capacity", "checkpoint", "launchers"},
}


@functools.cache
def import_nodes(file):
    """Return the import statements anywhere in a file."""
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(file):
    """Yield every module that a file imports absolutely, anywhere in the file."""
    for node in import_nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif not node.level:
            yield node.module


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_lower_packages(package):
    files = list((REPO / package).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(REPO)} imports {module}"
        for file in files
        for module in imports(file)
        if module.split(".")[0] in MAY_IMPORT.keys() - MAY_IMPORT[package] - {package}
    ]
    assert wrong == []


def test_code_inside_an_engine_imports_the_standard_library_and_the_engine_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "vllm", "sglang"}
    wrong = [
        f"{file.name} imports {module}"
        for file in (REPO / "plugin" / "engine").glob("*.py")
        for module in imports(file)
        if module.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_a_sandboxs_init_imports_the_standard_library_only():
    allowed = {*sys.stdlib_module_names, "checkpoint.sandbox.namespaces"}
    for file in ("init.py", "namespaces.py"):
        found = imports(REPO / "checkpoint" / "sandbox" / file)
        assert [m for m in found if m not in allowed and m.split(".")[0] not in allowed] == []


def test_the_proxy_imports_no_engine_or_snapshot_code():
    wrong = [
        f"{file.name} imports {module}"
        for file in (REPO / "plugin" / "proxy").rglob("*.py")
        for module in imports(file)
        if module.split(".")[0] in ("checkpoint", "launchers", "lazyfs", "capacity")
    ]
    assert wrong == []


def _modules():
    """Return every module of the product by its dotted name, with its file."""
    found = {}
    for package in MAY_IMPORT:
        for file in (REPO / package).rglob("*.py"):
            parts = file.relative_to(REPO).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def _imported(name, file, known):
    """Yield the product's modules that a module imports, also inside functions and for type checking."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in import_nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        else:
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            for alias in node.names:
                if f"{base}.{alias.name}" in known:
                    yield f"{base}.{alias.name}"
                elif base in known:
                    yield base


def circles(graph):
    """Return the modules that are part of an import circle or depend on one: leaves are removed until none is left."""
    left = {name: set(targets) & graph.keys() - {name} for name, targets in graph.items()}
    while leaves := [name for name, targets in left.items() if not targets]:
        for name in leaves:
            del left[name]
        for targets in left.values():
            targets.difference_update(leaves)
    return left


def test_no_modules_import_each_other_in_a_circle():
    known = _modules()
    assert circles({name: set(_imported(name, file, known)) for name, file in known.items()}) == {}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}).keys() == {"a", "b", "c", "d"}


def test_no_folder_has_too_many_modules():
    """About twelve; the page server's folder may have more until its caches are one module."""
    most = {"checkpoint/lazy_pages": 19}
    for folder in {file.parent for file in _modules().values()}:
        name = str(folder.relative_to(REPO))
        assert len(list(folder.glob("*.py"))) <= most.get(name, 14), name
