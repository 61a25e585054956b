"""Several threads decode a record type for the first time at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.t0
REPO = Path(__file__).resolve().parents[4]

# Without `ready` this crashes within the first few rounds.
PROGRAM = """
import sys, threading, types
import msgspec
from lazyfs.content.records import ready
sys.setswitchinterval(1e-6)
source = "from __future__ import annotations\\nimport msgspec\\n" + "".join(
    f"class S{k}(msgspec.Struct):\\n  a: dict[str, list[int]]\\n  b: tuple[{f'S{k - 1}' if k else 'int'}, ...]\\n" for k in range(8)
)
made = []
for number in range(100):
    module = sys.modules[f"m{number}"] = types.ModuleType(f"m{number}")
    exec(source, module.__dict__)
    barrier = threading.Barrier(3)
    def decode():
        barrier.wait()
        made.append(msgspec.convert({"a": {}, "b": []}, ready(module.S7)))
    threads = [threading.Thread(target=decode) for _ in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
assert len(made) == 300
"""


@pytest.mark.slow
def test_threads_can_decode_a_type_for_the_first_time_at_once():
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]


def decoded_types(file):
    """Return line and type of every decoding into a class that is not a builtin."""
    text = file.read_text()
    for node in ast.walk(ast.parse(text)) if "msgspec" in text else ():
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("msgspec."):
            continue
        types = [word.value for word in node.keywords if word.arg == "type"]
        if ast.unparse(node.func) == "msgspec.convert" and len(node.args) > 1:
            types.append(node.args[1])
        yield from ((node.lineno, kind) for kind in types if isinstance(kind, ast.Name) and kind.id != "int")


@pytest.mark.parametrize("package", ["lazyfs", "checkpoint", "launchers", "capacity", "plugin"])
def test_every_record_is_decoded_by_a_type_made_ready(package):
    files = [
        f for f in (REPO / package).rglob("*.py") if "proxy" not in f.parts
    ]  # the proxy decodes in a single thread
    assert [f"{file.relative_to(REPO)}:{line}" for file in files for line, _ in decoded_types(file)] == []
