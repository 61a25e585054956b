"""Snapshots in a remote store.

`archive` packs them into chunks, `upload` and `download` transfer these, `remote_restore` restores during a download.
"""
