"""Tests, files and folders that the documents name exist."""

import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.t0

REPO = Path(__file__).resolve().parents[3]
PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])


def test_every_test_named_in_a_document_exists():
    """docs/security.md depends on it: without its test, a defence is not shown to work."""
    tests = "\n".join(file.read_text() for file in (REPO / "tests").rglob("*.py"))
    known = set(re.findall(r"def (test_\w+)", tests)) | {file.stem for file in (REPO / "tests").rglob("test_*.py")}
    missing = {
        f"{page.name}: {name}"
        for page in PAGES
        for name in re.findall(r"`(test_\w+?)(?:\.py)?`", page.read_text())
        if name not in known and not any(one.startswith(name) for one in known)
    }
    assert missing == set()


def test_every_file_named_in_a_document_exists():
    missing = set()
    for page in PAGES:
        for path in re.findall(
            r"`((?:plugin|checkpoint|lazyfs|launchers|capacity|tests|docs|benchmarks|setup|examples)/[\w./-]+)`",
            page.read_text(),
        ):
            if not (REPO / path).exists():
                missing.add(f"{page.name}: {path}")
    assert missing == set()


def test_every_module_named_without_its_path_exists():
    """A bare `second.py` is easily missed by a rename, since no other check covers it."""
    here = {file.name for file in REPO.rglob("*.py") if not {".git", "build"} & set(file.relative_to(REPO).parts)}
    elsewhere = {"sitecustomize.py", "environ.py"}
    missing = {
        f"{page.name}: {name}"
        for page in PAGES
        for name in re.findall(r"`(\w+\.py)`", page.read_text())
        if name not in here | elsewhere
    }
    assert missing == set()


def test_every_module_named_in_a_docstring_exists():
    """No tool finds `checkpoint.lazy_pages.cache` in prose when the module is renamed."""
    packages = ("lazyfs", "checkpoint", "launchers", "plugin", "capacity")
    missing = set()
    for source in sorted(file for package in packages for file in (REPO / package).rglob("*.py")):
        text = re.sub(r"getLogger\([^)]*\)", "", source.read_text())
        for name in re.findall(rf"(?<![\w/.])(?:{'|'.join(packages)})(?:\.\w+)+", text):
            module, *rest = (REPO / name.split(".")[0], *name.split(".")[1:])
            while rest and (module / rest[0]).is_dir():
                module /= rest.pop(0)
            if rest and (module / f"{rest[0]}.py").exists():
                module = module / f"{rest.pop(0)}.py"
            defined = (module if module.is_file() else module / "__init__.py").read_text()
            if rest and rest[0] not in ("py", "md") and not re.search(rf"\b{rest[0]}\b", defined):
                missing.add(f"{source.relative_to(REPO)}: {name}")
    assert missing == set()


def test_every_proxy_module_named_in_its_page_exists():
    text = (REPO / "docs" / "proxy.md").read_text()
    table = text[text.index("| module of `plugin/proxy/` |") :].split("\n\n")[0]
    named = re.findall(r"`([\w./]+)`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert named
    proxy = REPO / "plugin" / "proxy"
    assert [name for name in named if not (proxy / name).exists() and not (proxy / f"{name}.py").exists()] == []


def test_every_link_between_documents_resolves():
    missing = {
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    }
    assert missing == set()


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        # Scanners take such an address for a registry, whatever the host; tests put it together.
        (rb"://[^/\s{}]+/debian/", "an address like a package mirror's"),
        (rb"""(^|[\s"'`=:(,])/root/[.\w]""", "a path below one machine's home; another user's is elsewhere"),
    ],
)
def test_no_tracked_file_names_one_machine(pattern, what):
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True)
    files = [REPO / name for name in tracked.stdout.split("\0") if name]
    found = re.compile(pattern, re.MULTILINE)
    assert [str(file) for file in files if file.is_file() and found.search(file.read_bytes())] == [], what
