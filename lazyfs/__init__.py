"""Store weights and snapshots as content-addressed chunks and serve them as files at disk speed.

Imports no other package of this project. Programs use `lazyfs.api`; people use `quickthaw weights` and `quickthaw mount`.
"""
