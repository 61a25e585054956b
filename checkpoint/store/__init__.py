"""Snapshots in a remote store.

`archive` packs them into chunks, `archive_entries` checks what an archive contains, `upload` and `download` transfer the chunks,
`remote_restore` restores during a download.
"""
