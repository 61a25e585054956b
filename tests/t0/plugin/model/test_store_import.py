"""The process that imports a model for a launch."""

import subprocess
import sys

import pytest

from lazyfs.paths import child_environment

pytestmark = pytest.mark.t0


def test_it_ends_silently_where_its_launch_was_killed_before_it_asked():
    words = [sys.executable, "-P", "-m", "plugin.model.store_import"]
    done = subprocess.run(words, env=child_environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
