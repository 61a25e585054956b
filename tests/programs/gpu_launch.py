"""`quickthaw launch` on a host whose GPU is the driver's double: python -m tests.programs.gpu_launch ARGUMENTS, with $GPU_DOUBLE as its folder."""

import os
import sys
from functools import partial
from pathlib import Path

from checkpoint.compatibility import host
from checkpoint.compatibility.gpu import Gpu
from checkpoint.cuda import helper
from plugin.runtime import replica
from tests.kits.checkpoint.cuda_double import GPU0, TOTAL

FOLDER = os.environ["GPU_DOUBLE"]


def main():
    found = ((Gpu(name="Double", memory=TOTAL, uuid=GPU0),), "580.159.03")
    host.gpu_facts = lambda environment=None: found
    replica.NVIDIA = Path(FOLDER)
    helper.Helper = partial(helper.Helper, "tests.kits.checkpoint.cuda_double:TreeDouble", FOLDER)
    from plugin.cli import run

    words = sys.argv[1:]
    run(words if words[:1] == ["launch"] else ["launch", *words])


if __name__ == "__main__":
    main()
