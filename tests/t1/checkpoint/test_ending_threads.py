"""A process whose threads end while a tree is listed belongs to it, and so do its children."""

import subprocess
import sys

import pytest

from checkpoint.sandbox.process_tree import processes
from plugin.proxy.process_tree import process_tree

pytestmark = [pytest.mark.t1, pytest.mark.slow]

# A parent, as init is, of a process whose threads come and go and that has a child.
PROGRAM = """
import subprocess, sys, threading, time
INNER = '''
import subprocess, sys, threading, time
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
limit = time.monotonic() + 3
while time.monotonic() < limit:
    threads = [threading.Thread(target=time.sleep, args=(0.0002,)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
child.kill()
'''
inner = subprocess.Popen([sys.executable, "-c", INNER], stdout=subprocess.PIPE, text=True)
print(inner.pid, inner.stdout.readline(), flush=True)
inner.wait()
"""


@pytest.mark.parametrize("listed", [processes, process_tree], ids=["sandbox", "proxy"])
def test_it_is_listed_with_its_children(listed):
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as parent:
        wanted = set(map(int, parent.stdout.readline().split()))
        looks = [set(listed(parent.pid)) for _ in range(1500)]
        assert parent.poll() is None, "it lived for all of them"
        parent.wait(30)
    assert len(wanted) == 2 and [wanted - look for look in looks if not wanted <= look] == []
