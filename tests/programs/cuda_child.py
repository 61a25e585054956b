"""A process that "uses CUDA" as defined in tests/kits/checkpoint/cuda_double.py: it counts while its calls are not blocked.

`python cuda_child.py FOLDER SIZE GPU`. Few imports, all of the standard library, because tests start many of them. Its
host copy is SIZE bytes, but at most HOST_COPY_MOST.
"""

import json
import os
import sys
import time

import cuda_thread

HOST_COPY_MOST = 4 << 20


def write(path: str, value: object) -> None:
    with open(f"{path}.new-{os.getpid()}", "w") as file:
        json.dump(value, file)
    os.replace(file.name, path)


def main(folder: str, size: int, gpu: str) -> None:
    me = f"{folder}/{os.getpid()}"
    parent = os.getppid()
    cuda_thread.start(min(size, HOST_COPY_MOST))
    with open(f"{me}.vram", "w") as file:
        file.write(f"contents of {os.getpid()}")
    write(f"{me}.json", {"state": "RUNNING", "memory": {gpu: size}})
    count = 0
    while os.getppid() == parent:
        with open(f"{me}.json") as file:
            running = json.load(file)["state"] == "RUNNING"
        if running:
            count += 1
            write(f"{me}.count", count)
        with open(f"{me}.blocked", "w") as file:
            file.write("no" if running else "yes")
        time.sleep(0.002)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
