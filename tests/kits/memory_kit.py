"""What an engine's processes hold of a snapshot's pages files, by /proc/PID/smaps."""

import re
from pathlib import Path


def mapped_pages(pids):
    """Return bytes resident from pages files (`pages-1.img`): (the page cache's, private copies), of all processes together."""
    shared = copied = 0
    for pid in pids:
        for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text()):
            head, *fields = mapping.splitlines() or [""]
            if not re.search(r"/pages-\d+\.img$", head):  # the folder before it is the sandbox's
                continue
            sizes = {
                name: int(rest.split()[0]) << 10 for name, _, rest in (f.partition(":") for f in fields) if "kB" in rest
            }
            copied += sizes["Anonymous"]
            shared += sizes["Rss"] - sizes["Anonymous"]
    return shared, copied
