"""An owner that takes and restores snapshots of the tree in a loop and prints its steps; tests kill it at any moment.

owner.py HOME ROUNDS
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from checkpoint.criu.binary import Criu
from checkpoint.sandbox.sandbox import CACHE_DIR, Bind, Sandbox, SandboxConfig
from checkpoint.snapshot.digests import digest_folder, verify
from checkpoint.snapshot.dump import take
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.restore import LazyRestore, restore
from plugin.runtime.config import state_home
from plugin.runtime.steps.engine_output import Output
from tests.kits.checkpoint.snapshots import draft
from tests.t1.checkpoint.test_process_tree import ask, start_tree


def main():
    home, rounds = Path(sys.argv[1]), int(sys.argv[2])
    library, criu = Library(home), Criu.find(state_home())
    library.sweep()
    binds = [Bind(home / "compile", Path(CACHE_DIR), read_only=False)]
    for _ in range(rounds):
        print("sandbox", flush=True)
        output = Output(None)
        with Sandbox(SandboxConfig(binds=binds)) as sandbox:
            pid = start_tree(sandbox, output, 8)
            print("take", flush=True)
            snapshot = take(
                library, criu, sandbox, draft("tree", pid, {"stdout": output.name}), home / "compile", digest_folder
            )
            print("taken", flush=True)
            ask(sandbox, op="count")
        filled = LazyRestore(None, False, print, print, fill=True)
        for lazy in (None, filled, LazyRestore(None, True, print, print)):
            print("restore", flush=True)
            snapshot = library.load("tree")
            verify(library.path("tree"), snapshot.files, always=True)
            output = Output(None)
            replica = restore(library, criu, snapshot, binds, home / "compile", {"stdout": output.write_fd}, lazy=lazy)
            output.close_write_end()
            print("restored", flush=True)
            assert ask(replica.sandbox, op="ballast")["wrong"] == 0
            replica.close()
    print("done", flush=True)


if __name__ == "__main__":
    main()
