"""A step of the set-up that fails ends it: no environment counts as made after a command of it failed."""

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.t0
COMMON = Path(__file__).parents[3] / "setup" / "common.sh"


@pytest.mark.parametrize(("commands", "code", "output"), [("false; true", 1, ""), ("true; echo x", 0, "after\n")])
def test_a_step_fails_with_any_command_of_its_function(commands, code, output, tmp_path):
    script = f'. "{COMMON}"; work() {{ {commands}; }}; step name work; echo after'
    environment = {"QUICKTHAW_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, output)
    assert ("setup: failed: work" in done.stderr) == bool(code)
