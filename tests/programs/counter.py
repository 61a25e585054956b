"""Counts in a file of the folder it is given, a hundred times a second, and on its standard output once: whether a tree runs can be
seen."""

import os
import sys
import time

folder = sys.argv[1]
number = 0
while True:
    number += 1
    with open(f"{folder}/count.new", "w") as file:
        file.write(str(number))
    os.replace(f"{folder}/count.new", f"{folder}/count")
    if os.path.exists(f"{folder}/say"):
        os.unlink(f"{folder}/say")
        print("heard", flush=True)
    time.sleep(0.01)
