"""What an engine's processes hold of a snapshot's files, by /proc/PID/smaps."""

import re
from pathlib import Path


def mapped_from(pids, folder):
    """Return bytes resident from files below `folder`: (of which no page was copied, private copies), of all processes together."""
    shared = copied = 0
    for pid in pids:
        for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text()):
            head, *fields = mapping.splitlines() or [""]
            if f" {folder}/" not in head:
                continue
            sizes = {
                name: int(rest.split()[0]) << 10 for name, _, rest in (f.partition(":") for f in fields) if "kB" in rest
            }
            copied += sizes["Anonymous"]
            shared += sizes["Rss"] - sizes["Anonymous"]
    return shared, copied
