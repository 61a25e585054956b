"""Four models in turn through a cache on a file system of 64 MB, in the mount namespace that the caller made for it.

`python -m tests.programs.small_disk FOLDER` prints one JSON document. The first model stays mounted; the rest come and go.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lazyfs.api import import_directory
from lazyfs.cache.bound import AUTO, VARIABLE
from lazyfs.cache.cache import Cache
from tests.kits.lazyfs.rig import LIMIT_S, Rig, digest_or_errno, wait_for, write_model

MB = 1 << 20
SIZES = [9 * MB, 6 * MB]


def main() -> None:
    os.environ.pop(VARIABLE, None)  # of the tests, so that no cache depends on the machine's free space
    folder = Path(sys.argv[1])
    small = folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", small], check=True, timeout=LIMIT_S)
    models = [write_model(folder / f"m{i}", SIZES, seed=40 + i) for i in range(4)]
    digests = [import_directory(model) for model in models]
    rig, cache = Rig(folder), Cache(small / "c", AUTO)
    found: dict[str, list[object]] = {"right": [], "free": [], "cached": []}
    try:
        reader = rig.reader()
        for i, (model, digest) in enumerate(zip(models, digests, strict=True)):
            handle = rig.mount(digest, f"mnt{i}", cache_dir=small / "c", use_origin=False, cache_limit=AUTO)
            there = digest_or_errno(reader, handle.mountpoint / "model.safetensors")
            found["right"].append(there == reader.ask("digest", str(model / "model.safetensors")))
            wait_for(lambda h=handle: not h.status()["waiting"])
            found["free"].append(shutil.disk_usage(small).free)
            found["cached"].append(cache.usage())
            if i:
                handle.unmount()
        first = rig.handles[0]
        kept = first.status()["cached_bytes"]
        # Another program fills the disk below the low-water mark.
        with open(small / "others", "wb") as others:
            others.write(bytes(max(0, shutil.disk_usage(small).free - 8 * MB)))
        wait_for(lambda: shutil.disk_usage(small).free >= 14 * MB)
        found["after"] = [shutil.disk_usage(small).free, cache.usage(), kept, first.status()["cached_bytes"]]
        # The disk is full for the cache, and a fifth model is streamed.
        others_more = small / "more"
        others_more.write_bytes(bytes(max(0, shutil.disk_usage(small).free - 4 * MB)))
        streamed = rig.mount(
            import_directory(write_model(folder / "m4", SIZES, seed=50)),
            "mnt4", cache_dir=small / "c", use_origin=False, cache_limit=AUTO,
        )  # fmt: skip
        there = digest_or_errno(reader, streamed.mountpoint / "model.safetensors")
        found["right"].append(there == reader.ask("digest", str(folder / "m4" / "model.safetensors")))
        found["log"] = [line for line in streamed.log_file.read_text().splitlines() if "not cached" in line]
        found["streamed"] = [streamed.status()["counters"]["streamed"], shutil.disk_usage(small).free]
    finally:
        for handle in rig.handles:
            if handle.daemon() == "runs":
                handle.unmount(force=True)
        rig.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
