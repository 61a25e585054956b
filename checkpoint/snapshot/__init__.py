"""One snapshot: taken (`dump`), brought back (`restore`), described (`manifest`), kept (`library`), checked (`digests`, `signatures`)."""
