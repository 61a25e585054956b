"""Counts in a file of the given folder, a hundred times a second, and once on standard output, which shows whether a
tree runs.
"""

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
