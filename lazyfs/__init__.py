"""lazyfs: weights and snapshots as content-addressed chunks, shown as files at once, at the speed of the disk.

Knows no other package of this project. Programs use `lazyfs.api`; people use `quickthaw weights` and `quickthaw mount`.
"""
