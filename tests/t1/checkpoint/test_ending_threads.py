"""A process whose threads end while a tree is listed belongs to it, and so do its children."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.sandbox.process_tree import processes
from plugin.proxy.process_tree import process_tree

pytestmark = [pytest.mark.t1, pytest.mark.slow]

# A parent, as init is, of a process whose threads come and go and that has a child. They end with their input.
PROGRAM = """
import subprocess, sys
INNER = '''
import select, subprocess, sys, threading, time
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    threads = [threading.Thread(target=time.sleep, args=(0.0002,)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
child.kill()
'''
inner = subprocess.Popen([sys.executable, "-c", INNER], stdout=subprocess.PIPE, text=True)
print(inner.pid, inner.stdout.readline(), flush=True)
inner.wait()
"""


def test_it_is_listed_with_its_children():
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=pipe, stdout=pipe, text=True) as parent:
        wanted = set(map(int, parent.stdout.readline().split()))
        looks = [set(processes(parent.pid)) for _ in range(1500)]
        parent.stdin.close()  # ends them
        assert parent.wait(30) == 0
    assert len(wanted) == 2 and [wanted - look for look in looks if not wanted <= look] == []


@pytest.mark.parametrize("listed", [processes, process_tree], ids=["sandbox", "proxy"])
def test_a_thread_that_ended_since_it_was_listed_hides_no_other_ones_children(monkeypatch, listed):
    tasks = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / "ended", *tasks(folder)]))
    with subprocess.Popen(["sleep", "60"]) as child:
        assert child.pid in listed(os.getpid())
        child.kill()
