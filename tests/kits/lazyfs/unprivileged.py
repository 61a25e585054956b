"""Run Python as a user without privileges, on a host whose /dev/fuse is for everybody, as udev makes it.

In a mount and PID namespace of its own: whatever it leaves running or mounted ends with it. The user may read every file
(CAP_DAC_READ_SEARCH), because this checkout and its Python may lie in root's home; it is the only privilege, and `fusermount3`
does not inherit it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
USER = 65534
_PREPARE = r"""
set -e
mount -t tmpfs -o dev tmpfs /mnt
mknod -m 666 /mnt/fuse c 10 229
[ ! -e "$FUSE_CONF" ] || mount --bind "$FUSE_CONF" /etc/fuse.conf
mount --bind /mnt/fuse /dev/fuse
exec setpriv --reuid USER --regid USER --clear-groups --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search "$@"
"""


def possible() -> bool:
    """Return whether this host can do it."""
    return os.geteuid() == 0 and os.path.exists("/dev/fuse") and shutil.which("fusermount3") is not None


def run(code: str, folder: Path, *arguments: str, allow_other: bool = False) -> str:
    """Run code as a user who owns `folder`; return what it prints. `allow_other`: /etc/fuse.conf has user_allow_other."""
    os.chown(folder, USER, USER)
    # Every folder above must let the user through without CAP_DAC_READ_SEARCH, which fusermount3 does not have.
    environment = {**os.environ, "QUICKTHAW_HOME": str(folder / "home"), "HOME": str(folder), "FUSE_CONF": ""}
    if allow_other:
        conf = folder / "fuse.conf"
        conf.write_text("user_allow_other\n")
        environment["FUSE_CONF"] = str(conf)
    apart = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run(
        [*apart, "sh", "-c", _PREPARE.replace("USER", str(USER)), "sh", sys.executable, "-c", code, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
