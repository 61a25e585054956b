"""What a host or container must grant, tested without everything else (setpriv(1) limits a command's capabilities)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.t1
REPO = Path(__file__).parents[4]
ENOUGH = "-all,+sys_admin,+net_admin,+setpcap,+sys_chroot"
"""docs/deploy.md names these, and CAP_SYS_PTRACE for pages on demand."""


def doctor(bounds):
    """Return the findings of `quickthaw doctor` by name, with the capabilities limited in this way."""
    argv = ["setpriv", "--bounding-set", bounds, sys.executable, "-m", "plugin", "doctor", "--json"]
    result = subprocess.run(
        argv, cwd=REPO, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in result.stderr, result.stderr
    return {finding["what"]: finding for finding in json.loads(result.stdout)}


def test_the_minimal_set_of_capabilities_dumps_and_restores():
    found = doctor(ENOUGH)
    assert found["sandbox"]["state"] == "ok", found
    assert found["dump and restore"]["state"] == "ok", found
