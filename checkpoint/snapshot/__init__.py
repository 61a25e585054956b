"""Snapshots: take (`dump`), restore (`restore`), describe (`manifest`), store (`library`), verify (`digests`, `signatures`)."""
